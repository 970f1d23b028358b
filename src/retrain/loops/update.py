"""A step's rollouts to a better policy: what samples carry, which train, and the updates."""

from __future__ import annotations

import functools
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retrain import algorithms
from retrain.config.algorithm import Hyperparameters
from retrain.config.terms import CorrectionConfig
from retrain.learner import Critic, PolicyObjective, Reference, TorchLearner
from retrain.learner.objectives import Correction, Metrics, PolicyLoss
from retrain.loops.build import build_learner
from retrain.loops.credit import Credit, truncated
from retrain.loops.metrics import learner_metrics, update_metrics
from retrain.models import Policy
from retrain.models.save import CRITIC_FILE
from retrain.rollout import to_samples
from retrain.types import Rollout, Sample, UserError

SEQUENCE_LOSSES = ("gspo", "gmpo")
"""Losses whose ratio is that of a whole rollout."""


@dataclass(frozen=True)
class PolicyUpdate:
    """Everything between scored groups and new weights.

    Args:
        seed: of the order in which groups are dealt to mini-batches.
        task_reward: weight of the rewards' advantages; with 0 they train nothing.
        teacher_coefficient: weight of the KL to teachers; above 0 every sample trains.
    """

    settings: Hyperparameters
    learner: TorchLearner
    reference: Reference | None
    seed: int
    task_reward: float = 1.0
    teacher_coefficient: float = 0.0

    def collect(self, groups: Sequence[Sequence[Rollout]]) -> list[Sample]:
        """The samples of all rollouts that may train, bare."""
        settings = self.settings
        return [
            sample
            for group in groups
            for rollout in group
            if settings.train_truncated or not truncated(rollout)
            for sample in to_samples(rollout, last_turn_only=settings.train_turns == "last")
        ]

    def samples(
        self, groups: Sequence[Sequence[Rollout]], collected: Sequence[Sample] | None = None
    ) -> list[Sample]:
        """What trains, with its advantages; of all samples, where none were `collected` before.

        A rollout whose group teaches nothing (all its advantages are zero) is left out, its tokens
        uncounted, as in DAPO's dynamic sampling; unless the loss has a term that needs no
        advantage. In the other groups a rollout whose advantage happens to be zero counts in the
        means.
        """
        settings = self.settings
        samples = self.collect(groups) if collected is None else list(collected)
        penalised = settings.kl is not None and settings.kl.place == "reward"
        if penalised and self.reference is not None:
            self.learner.attach_old_logprobs(samples)
            self.learner.attach_reference(samples, self.reference)
        if settings.critic is not None:
            self.learner.attach_values(samples)
        if self.task_reward:
            self._credit().assign(groups, samples)
        if self.task_reward not in (0.0, 1.0):
            _scale(samples, self.task_reward)
        if not self._trains_everything:
            samples = _that_teach(samples)
        if not penalised and self.reference is not None:
            self.learner.attach_reference(samples, self.reference)
        if not penalised and settings.epochs * settings.mini_batches > 1:
            self.learner.attach_old_logprobs(samples)
        return samples

    def learn(
        self, samples: Sequence[Sample], step: int, weights_changed: Callable[[], None]
    ) -> dict[str, float]:
        """The batch's updates; what changes from one to the next is reported of the last."""
        settings = self.settings
        warming = settings.critic is not None and step <= settings.critic.warmup_steps
        objective = build_objective(settings, teacher_coefficient=self.teacher_coefficient)
        metrics: dict[str, float] = {}
        begun = (step - 1) * settings.epochs * settings.mini_batches
        for number, part in enumerate(self._parts(samples, step)):
            totals = self.learner.forward_backward(
                part,
                objective,
                settings.aggregation,
                constant_length=settings.aggregation_length or settings.max_new_tokens,
                whole_rollouts=needs_whole_rollouts(settings),
                skip_zero_advantages=not self._trains_everything,
                entropy_gradient=settings.entropy_coefficient > 0,
                train_policy=not warming,
            )
            stepped = self.learner.optim_step(part, schedule_step=begun + number)
            if not metrics:
                metrics = learner_metrics(totals)
                metrics["tokens/trained"] = float(sum(sum(s.loss_mask) for s in samples))
            metrics |= update_metrics(totals) | stepped
            if not warming:
                weights_changed()
        if self.reference is not None and settings.kl is not None:
            every = settings.kl.refresh_steps
            if every is not None and step % every == 0:
                self.reference.refresh()
        return metrics

    @property
    def _trains_everything(self) -> bool:
        taught = self.teacher_coefficient > 0 or self.settings.critic is not None
        return taught or build_objective(self.settings).trains_everything

    def _credit(self) -> Credit:
        settings = self.settings
        in_reward = settings.kl if settings.kl and settings.kl.place == "reward" else None
        return Credit(
            advantage=settings.advantage,
            normalize_advantages=settings.normalize_advantages,
            per_turn=settings.credit == "turn",
            gamma=settings.gamma,
            gae_lambda=settings.critic.gae_lambda if settings.critic else 1.0,
            kl_coefficient=in_reward.coefficient if in_reward else 0.0,
            kl_estimator=in_reward.estimator if in_reward else "k1",
        )

    def _parts(self, samples: Sequence[Sample], step: int) -> Iterator[list[Sample]]:
        """Each pass's mini-batches; the samples of a group stay together."""
        by_group: dict[str | None, list[Sample]] = {}
        for sample in samples:
            by_group.setdefault(sample.group_id, []).append(sample)
        for epoch in range(self.settings.epochs):
            groups = list(by_group.values())
            count = min(self.settings.mini_batches, len(groups))
            if count > 1:
                random.Random(f"{self.seed}:mini-batches:{step}:{epoch}").shuffle(groups)
            for number in range(count):
                dealt = groups[number::count]
                yield [sample for group in dealt for sample in group]


def check_critic(settings: Hyperparameters) -> None:
    """What can be checked of a critic's checkpoint before it is loaded.

    Raises:
        UserError: the directory has no critic.
    """
    critic = settings.critic
    if critic is None or critic.from_checkpoint is None:
        return
    if not (Path(critic.from_checkpoint).expanduser() / CRITIC_FILE).is_file():
        raise UserError(
            f"critic.from_checkpoint: {critic.from_checkpoint} has no {CRITIC_FILE}",
            "Give the directory of a checkpoint that a PPO stage saved.",
        )


def build_update(
    settings: Hyperparameters,
    policy: Policy,
    *,
    seed: int,
    critic: Critic | None = None,
    task_reward: float = 1.0,
    teacher_coefficient: float = 0.0,
) -> PolicyUpdate:
    """The learner, and a reference that is the policy as it is now.

    So is the critic, unless the stage before left one on the same kind of backbone.
    """
    learner = build_learner(
        settings,
        policy,
        total_updates=settings.steps * settings.epochs * settings.mini_batches,
        temperature=settings.temperature,
        critic=settings.critic,
        critic_before=critic,
    )
    reference = None if settings.kl is None else Reference(policy.model)
    return PolicyUpdate(settings, learner, reference, seed, task_reward, teacher_coefficient)


def _scale(samples: Sequence[Sample], weight: float) -> None:
    for sample in samples:
        if sample.advantages is not None:
            sample.advantages = array("d", [weight * value for value in sample.advantages])


def _that_teach(samples: Sequence[Sample]) -> list[Sample]:
    teaching = {
        sample.group_id
        for sample in samples
        if sample.advantages is not None and any(sample.advantages)
    }
    return [sample for sample in samples if sample.group_id in teaching]


def needs_whole_rollouts(settings: Hyperparameters) -> bool:
    """Whether a ratio is taken over all of a rollout's samples."""
    correction = settings.correction
    by_sequence = correction is not None and correction.level == "sequence"
    return settings.loss in SEQUENCE_LOSSES or by_sequence


def build_objective(
    settings: Hyperparameters, *, teacher_coefficient: float = 0.0
) -> PolicyObjective:
    """The per-token loss that the hyperparameters describe."""
    in_loss = settings.kl if settings.kl and settings.kl.place == "loss" else None
    return PolicyObjective(
        loss=_policy_loss(settings),
        correction=None if settings.correction is None else _correction(settings.correction),
        kl_estimator=settings.kl.estimator if settings.kl else "k3",
        kl_coefficient=in_loss.coefficient if in_loss else 0.0,
        entropy_coefficient=settings.entropy_coefficient,
        teacher_coefficient=teacher_coefficient,
    )


def _policy_loss(settings: Hyperparameters) -> PolicyLoss:
    low, high = settings.clip
    bounds: dict[str, Any] = {"clip_low": low, "clip_high": high}
    if settings.loss == "ppo_clip":
        bounds["dual_clip"] = settings.dual_clip
    losses: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
        "ppo_clip": functools.partial(algorithms.ppo_clip, **bounds),
        "gspo": functools.partial(algorithms.gspo, **bounds),
        "cispo": functools.partial(algorithms.cispo, **bounds),
        "gmpo": functools.partial(algorithms.gmpo, **bounds),
        "sapo": algorithms.sapo,
        "reinforce": algorithms.reinforce,
    }
    loss = losses[settings.loss]
    by_sequence = settings.loss in SEQUENCE_LOSSES

    def of(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, sequences: Tensor
    ) -> tuple[Tensor, Metrics]:
        if by_sequence:
            return loss(logprobs, old, advantages, mask, sequences=sequences)
        return loss(logprobs, old, advantages, mask)

    return of


def _correction(settings: CorrectionConfig) -> Correction:
    weigh = {"tis": algorithms.tis, "mis": algorithms.mis}[settings.kind]

    def of(old: Tensor, behavior: Tensor, mask: Tensor, sequences: Tensor) -> Tensor:
        return weigh(
            old, behavior, mask, level=settings.level, cap=settings.cap, sequences=sequences
        )

    return of
