"""Reinforcement learning: sample groups, score them, learn, and again."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from retrain.algorithms import grpo
from retrain.config.algorithm import Hyperparameters
from retrain.config.root import TrainingConfig
from retrain.data import TaskSource, load_tasks
from retrain.engines import SamplingParams
from retrain.learner import TorchLearner, policy_loss
from retrain.loops.build import (
    build_calculator,
    build_environment,
    build_learner,
    build_renderer,
)
from retrain.loops.context import RunContext, check_prompts_fit
from retrain.loops.evaluate import EvalStage
from retrain.loops.metrics import learner_metrics, rollout_metrics, update_metrics
from retrain.rewards import RewardCalculator
from retrain.rollout import Sampler, to_samples
from retrain.types import Rollout, Sample, Task, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RLStage:
    name: str
    config: TrainingConfig
    settings: Hyperparameters
    tasks: TaskSource
    calculator: RewardCalculator
    sampler: Sampler
    learner: TorchLearner
    evaluation: EvalStage | None

    @classmethod
    def prepare(cls, name: str, config: TrainingConfig, context: RunContext) -> RLStage:
        """Read and check everything that the stage needs.

        Raises:
            UserError: bad data, unknown names, or prompts that do not fit the context.
        """
        settings = config.algorithm.hyperparameters
        assert config.prompt_source is not None
        tasks = load_tasks(config.prompt_source, seed=config.seed)
        renderer = build_renderer(config, context.policy)
        sampler = Sampler(
            environment=build_environment(
                config, renderer, context.sandbox, user_models=context.user_models
            ),
            engine=context.engine,
            renderer=renderer,
            params=SamplingParams(settings.max_new_tokens, settings.temperature),
            run_seed=config.seed,
        )
        check_prompts_fit(tasks, sampler, "prompt_source")
        learner = build_learner(
            settings,
            context.policy,
            total_updates=settings.steps * settings.updates_per_step,
            temperature=settings.temperature,
        )
        during = config.evaluation is not None and config.evaluation.every_steps is not None
        return cls(
            name=name,
            config=config,
            settings=settings,
            tasks=tasks,
            calculator=build_calculator(config.reward_setup, context.sandbox),
            sampler=sampler,
            learner=learner,
            evaluation=EvalStage.prepare(f"{name}-eval", config, context) if during else None,
        )

    async def execute(self, context: RunContext) -> None:
        context.progress.stage(self.name, total=self.settings.steps, kind="rl")
        tasks = endless(self.tasks)
        for step in range(1, self.settings.steps + 1):
            started = time.perf_counter()
            batch = take_distinct(tasks, self.settings.prompts_per_step)
            groups = await self.sampler.groups(
                batch, self.settings.group_size, self.calculator.score
            )
            generated = time.perf_counter()
            _warn_of_masked(groups, self.name, step)

            advantages = group_advantages(groups, normalize_std=self.settings.normalize_std)
            samples = training_samples(groups, advantages)
            metrics = rollout_metrics(groups, advantages, self.config.evaluation)
            if samples:
                metrics |= await self._update(samples, context)
            metrics |= _speed(groups, samples, generated - started, generated)
            context.log(self.name, step, metrics)

            await self._write_down(step, groups, advantages, context)
        context.save_checkpoint(self.name, self.config)

    def forget(self) -> None:
        """Free what only training needs, the optimizer's state above all."""
        self.learner.optimizers.clear()

    async def close(self) -> None:
        await self.sampler.environment.close()
        if self.evaluation is not None:
            await self.evaluation.close()

    async def _update(self, samples: Sequence[Sample], context: RunContext) -> dict[str, float]:
        """The batch's updates; what changes from one to the next is reported of the last."""
        settings = self.settings
        if settings.updates_per_step > 1:
            self.learner.attach_old_logprobs(samples)
        loss = policy_loss(clip_low=settings.clip_low, clip_high=settings.clip_high)
        metrics: dict[str, float] = {}
        for update in range(settings.updates_per_step):
            totals = self.learner.forward_backward(samples, loss, settings.aggregation)
            stepped = self.learner.optim_step()
            if update == 0:
                metrics = learner_metrics(totals)
            metrics |= update_metrics(totals) | stepped
            await context.weights_changed()
        return metrics

    async def _write_down(
        self,
        step: int,
        groups: Sequence[Sequence[Rollout]],
        advantages: dict[str, float],
        context: RunContext,
    ) -> None:
        if self.config.tracking.rollouts:
            rollouts = [rollout for group in groups for rollout in group]
            context.run.write_rollouts(self.name, step, rollouts, advantages)
        last = step == self.settings.steps
        every = self.config.checkpoint.every_steps
        if every is not None and step % every == 0 and not last:
            context.save_checkpoint(self.name, self.config, step)
        evaluation = self.evaluation
        every = None if evaluation is None else evaluation.settings.every_steps
        if evaluation is not None and every is not None and step % every == 0:
            await evaluation.evaluate(context, evaluation.name, step=step, report=False)


def _warn_of_masked(groups: Sequence[Sequence[Rollout]], stage: str, step: int) -> None:
    errors = [r.error for group in groups for r in group if r.error is not None]
    if errors:
        total = sum(map(len, groups))
        logger.warning(
            "%s step %d: %d of %d rollouts are masked; the first: %s",
            *(stage, step, len(errors), total, errors[0]),
        )


def take_distinct(tasks: Iterator[tuple[int, Task]], count: int) -> list[tuple[int, Task]]:
    """The next tasks.

    Raises:
        UserError: two of them have one id, which would mix their groups up.
    """
    batch = [next(tasks) for _ in range(count)]
    seen: set[tuple[int, str]] = set()
    for epoch, task in batch:
        if (epoch, task.id) in seen:
            raise UserError(
                f"prompt_source: two tasks have the id {task.id!r}",
                "Give each its own, or leave out prompt_source.id_column.",
            )
        seen.add((epoch, task.id))
    return batch


def endless(source: TaskSource) -> Iterator[tuple[int, Task]]:
    """(epoch, task) without end, epoch after epoch."""
    epoch = 0
    while True:
        before = epoch
        for task in source.epoch(epoch):
            yield epoch, task
            before = epoch + 1
        if before == epoch:
            raise UserError(f"prompt_source: there is no task in epoch {epoch}")
        epoch += 1


def group_advantages(
    groups: Sequence[Sequence[Rollout]], *, normalize_std: bool
) -> dict[str, float]:
    """Rollout id -> advantage within its group; masked rollouts have none."""
    advantages: dict[str, float] = {}
    for group in groups:
        kept = [rollout for rollout in group if rollout.error is None]
        if not kept:
            continue
        rewards = torch.tensor([rollout.reward for rollout in kept], dtype=torch.float64)
        values = grpo(rewards, normalize_std=normalize_std).tolist()
        advantages |= {rollout.id: value for rollout, value in zip(kept, values, strict=True)}
    return advantages


def training_samples(
    groups: Sequence[Sequence[Rollout]], advantages: dict[str, float]
) -> list[Sample]:
    """The samples of every group that teaches something.

    A group whose advantages are all zero is left out, its tokens uncounted, as in DAPO's dynamic
    sampling. In the others a rollout whose advantage happens to be zero counts in the means.
    """
    samples: list[Sample] = []
    for group in groups:
        if not any(advantages.get(rollout.id, 0.0) for rollout in group):
            continue
        for rollout in group:
            for sample in to_samples(rollout):
                sample.advantages = array("d", [advantages[rollout.id]]) * len(sample)
                samples.append(sample)
    return samples


def _speed(
    groups: Sequence[Sequence[Rollout]],
    samples: Sequence[Sample],
    generating: float,
    generated: float,
) -> dict[str, float]:
    training = time.perf_counter() - generated
    sampled = sum(
        span.end - span.start
        for group in groups
        for rollout in group
        for segment in rollout.segments
        for span in segment.turns
    )
    return {
        "seconds/generate": generating,
        "seconds/train": training,
        "tokens_per_s/generate": sampled / max(generating, 1e-9),
        "tokens_per_s/train": sum(map(len, samples)) / max(training, 1e-9),
    }
