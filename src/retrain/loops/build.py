"""From config sections to the objects that sample, score and learn."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from retrain.config.algorithm import CriticConfig, Optimization
from retrain.config.rewards import RewardConfig, RewardSetup, RolloutRewardConfig
from retrain.config.root import TrainingConfig
from retrain.engines import PolicyEngine, SamplingParams
from retrain.envs import (
    Environment,
)
from retrain.learner import Critic, Schedule, TorchLearner
from retrain.models import Policy, load_critic
from retrain.models.forward import splits_exactly
from retrain.rendering import (
    Renderer,
)
from retrain.rewards import (
    DistributionStrategy,
    RewardCalculator,
    RewardKind,
    RewardSpec,
    resolve_reward,
    resolve_verifier,
    takes_sandbox,
)
from retrain.rewards.state import reward_object
from retrain.rollout import Sampler
from retrain.sandbox import Sandbox
from retrain.types import UserError


def build_sampler(
    config: TrainingConfig,
    environment: Environment,
    engine: PolicyEngine,
    renderer: Renderer,
    params: SamplingParams,
) -> Sampler:
    """The sampler, with the deadlines and retries of the section `rollout`.

    Where a rollout keeps its slot in the engine until it ends, no more attempts are under way than
    there are slots for all of their agents: further ones would only run out of time.

    Raises:
        UserError: there are fewer slots than agents in one attempt.
    """
    section = config.rollout
    slots, agents = engine.most_sessions, environment.most_agents
    if slots is not None and slots < agents:
        raise UserError(
            f"{agents} agents take part in one attempt, and the engine has {slots} slots, which "
            "each of them keeps until its end",
            f"Set engine.max_slots: {agents} or more.",
        )
    most = section.max_concurrency
    return Sampler(
        environment=environment,
        engine=engine,
        renderer=renderer,
        params=params,
        run_seed=config.seed,
        turn_timeout_s=section.turn_limit_s,
        timeout_s=section.timeout_s,
        retries=section.retries,
        backoff_s=section.backoff_s,
        max_concurrency=most if slots is None else min(most, slots // agents),
    )


def build_calculator(setup: RewardSetup, sandbox: Sandbox) -> RewardCalculator:
    """The reward set-up with every name resolved; rewards that run code share `sandbox`.

    Raises:
        UserError: unknown reward or verifier, or parameters that do not fit.
    """
    specs = [
        *(_spec(k, c, "step", sandbox) for k, c in setup.step_reward_configs.items()),
        *(_spec(k, c, "rollout", sandbox) for k, c in setup.rollout_reward_configs.items()),
        *(_spec(k, c, "group", sandbox) for k, c in setup.group_reward_configs.items()),
    ]
    return RewardCalculator(
        specs,
        verifiers=[(name, resolve_verifier(name)) for name in setup.verifiers],
        verifier_penalty=setup.verifier_penalty,
        on_error=setup.on_error,
        error_penalty=setup.error_penalty,
    )


def _spec(key: str, config: RewardConfig, kind: RewardKind, sandbox: Sandbox) -> RewardSpec:
    strategy: DistributionStrategy = "last_step"
    if isinstance(config, RolloutRewardConfig):
        strategy = config.distribution_strategy
    params: dict[str, Any] = dict(config.params)
    function = resolve_reward(config.function or key, kind)
    if takes_sandbox(function):
        if "sandbox" in params:
            raise UserError(
                f"reward '{key}': params.sandbox is set, but the reward gets the run's sandbox",
                "remove it, and set the section sandbox",
            )
        params["sandbox"] = sandbox
    if inspect.isclass(function):
        function, params = reward_object(key, function, params), {}
    return RewardSpec(
        name=key,
        function=function,
        kind=kind,
        weight=config.weight,
        params=params,
        agents=None if config.agents is None else tuple(config.agents),
        verifiers=tuple((name, resolve_verifier(name)) for name in config.verifiers),
        verifier_penalty=config.verifier_penalty,
        distribution_strategy=strategy,
    )


def build_learner(
    settings: Optimization,
    policy: Policy,
    *,
    total_updates: int,
    temperature: float = 1.0,
    critic: CriticConfig | None = None,
    critic_before: Critic | None = None,
) -> TorchLearner:
    """The learner, with a critic where one is asked for; that of the stage before goes on."""
    return TorchLearner(
        policy.model,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        schedule=Schedule(
            settings.schedule, total_updates, settings.warmup_steps, settings.min_lr_ratio
        ),
        max_grad_norm=settings.max_grad_norm,
        micro_batch_tokens=settings.micro_batch_tokens,
        temperature=temperature,
        share_prefixes=settings.share_prefixes,
        critic=None if critic is None else _build_critic(critic, policy, critic_before),
        critic_learning_rate=critic.learning_rate if critic else None,
        value_clip=critic.value_clip if critic else None,
        value_coefficient=critic.loss_coefficient if critic else 1.0,
    )


def _build_critic(settings: CriticConfig, policy: Policy, before: Critic | None) -> Critic:
    shared = settings.backbone == "shared"
    if settings.from_checkpoint is None and before and (before.backbone is None) == shared:
        return before
    if shared and not splits_exactly(policy.model):
        raise UserError(
            "critic.backbone: shared needs hidden states; "
            f"{type(policy.model).__name__} does not give them apart from its logits",
            "Use critic.backbone: own.",
        )
    critic = Critic(policy.model, own_backbone=settings.backbone == "own")
    if settings.from_checkpoint is not None:
        load_critic(critic, Path(settings.from_checkpoint).expanduser())
    return critic
