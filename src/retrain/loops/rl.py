"""Reinforcement learning: sample groups, score them, learn, and again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from retrain.config.algorithm import TOKEN_ADVANTAGES, Hyperparameters
from retrain.config.root import TrainingConfig
from retrain.data import Cursor, TaskSource, load_tasks
from retrain.engines import SamplingParams
from retrain.learner import NotFiniteError
from retrain.loops.build import (
    build_calculator,
    build_environment,
    build_renderer,
    build_sampler,
)
from retrain.loops.checkpoint import RunState, Training
from retrain.loops.context import RunContext, check_prompts_fit
from retrain.loops.credit import has_variance, punish_overlong, rollout_advantages, sampled_tokens
from retrain.loops.evaluate import EvalStage
from retrain.loops.metrics import rollout_metrics
from retrain.loops.monitors import Monitors
from retrain.loops.survivors import Losses, large_enough, smallest_group
from retrain.loops.update import build_update, check_critic
from retrain.rewards import RewardCalculator
from retrain.rollout import Sampler
from retrain.types import Rollout, Sample, Task, UserError


@dataclass(frozen=True)
class RLStage:
    name: str
    config: TrainingConfig
    settings: Hyperparameters
    tasks: TaskSource
    calculator: RewardCalculator
    sampler: Sampler
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
        sampler = build_sampler(
            config,
            build_environment(config, renderer, context.sandbox, user_models=context.user_models),
            context.engine,
            renderer,
            SamplingParams(settings.max_new_tokens, settings.temperature),
        )
        check_prompts_fit(tasks, sampler, "prompt_source")
        check_critic(settings)
        during = config.evaluation is not None and config.evaluation.every_steps is not None
        return cls(
            name=name,
            config=config,
            settings=settings,
            tasks=tasks,
            calculator=build_calculator(config.reward_setup, context.sandbox),
            sampler=sampler,
            evaluation=EvalStage.prepare(f"{name}-eval", config, context) if during else None,
        )

    async def execute(self, context: RunContext) -> None:
        context.progress.stage(self.name, total=self.settings.steps, kind="rl")
        tasks = Cursor(self.tasks, place="prompt_source")
        update = build_update(
            self.settings, context.policy, seed=self.config.seed, critic=context.critic
        )
        context.critic = update.learner.critic
        training = Training(update.learner, update.reference)
        monitors = Monitors(thresholds(self.config), stage=self.name)
        most = self.config.rollout.max_lost_steps
        losses = Losses(self.name, context.run, context.engine, max_lost_steps=most)
        state = self._resume(context, tasks, training, monitors)
        if not state.evaluated:
            with context.saved_on_failure(self.config, state, training):
                await context.stop.watch(self._evaluate(state.step, context))
            self._save(state.step, tasks, training, context)
        for step in range(state.step + 1, self.settings.steps + 1):
            if not losses.streak:
                state = self._stand(step - 1, tasks, training, context)
            started = time.perf_counter()
            with context.saved_on_failure(self.config, state, training):
                context.stop.check()
                groups, chosen = await context.stop.watch(self._sample(tasks))
            generated = time.perf_counter()

            metrics = losses.observe(step, groups) | rollout_metrics(
                groups,
                self.config.evaluation,
                version=context.version,
                per_turn=self.settings.credit == "turn",
                min_group_size=smallest_group(self.config),
            )
            try:
                samples = update.samples(chosen)
                if samples:
                    metrics |= await update.learn(samples, step, context.weights_changed)
            except NotFiniteError as error:
                raise context.write_down(error, self.name, step) from error
            metrics |= _speed(groups, samples, generated - started, generated)
            metrics["alerts"] = float(len(monitors.observe(step, metrics)))
            context.log(self.name, step, metrics)

            self.calculator.end_step([rollout for group in groups for rollout in group])
            self._write_down(step, groups, rollout_advantages(samples), context)
            with context.saved_on_failure(self.config, state, training):
                losses.check(step)
            state = self._stand(step, tasks, training, context)
            unevaluated = replace(state, finished=False, evaluated=False)
            with context.saved_on_failure(self.config, unevaluated, training):
                await context.stop.watch(self._evaluate(step, context))
            self._save(step, tasks, training, context)

    def _resume(
        self,
        context: RunContext,
        tasks: Cursor[Task],
        training: Training,
        monitors: Monitors,
    ) -> RunState:
        """Put everything to where the stage was left, if it was; where it stands now."""
        saved = context.take_resumed(self.name)
        if saved is None:
            return self._stand(0, tasks, training, context)
        tasks.restore(saved.state.position)
        self.calculator.restore(saved.state.rewards)
        training.restore(saved.tensors, saved.state.updates)
        rows = context.run.metrics_of(self.name)
        monitors.replay(rows)
        context.progress.update(saved.state.step, rows[-1] if rows else {})
        saved.put_random_state()
        return saved.state

    def _stand(
        self, step: int, tasks: Cursor[Task], training: Training, context: RunContext
    ) -> RunState:
        """Where the stage stands after `step` steps."""
        return context.stand(
            RunState(
                stage=self.name,
                step=step,
                finished=step == self.settings.steps,
                version=context.version,
                position=tasks.position(),
                updates=training.learner.updates,
                rewards=self.calculator.state(),
            )
        )

    async def _sample(
        self, tasks: Iterator[tuple[int, Task]]
    ) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """A step's groups, scored: all of them, and those to learn from.

        With dynamic sampling, groups without variance are made up for by further tasks, as often
        as the settings allow; the step learns from as many groups as without it.
        """
        settings, least = self.settings, smallest_group(self.config)
        groups: list[list[Rollout]] = []
        drawn: set[tuple[int, str]] = set()
        missing = settings.prompts_per_step
        for _ in range(settings.dynamic_sampling_rounds + 1):
            batch = take_distinct(tasks, missing, drawn)
            groups += await self.sampler.groups(batch, settings.group_size, self._score)
            per_turn = settings.credit == "turn"
            alive = [group for group in groups if large_enough(group, least)]
            full = [group for group in alive if has_variance(group, per_turn=per_turn)]
            missing = settings.prompts_per_step - len(full)
            if missing == 0:
                break
        return groups, full if settings.dynamic_sampling_rounds else alive

    async def _score(self, group: list[Rollout]) -> None:
        await self.calculator.score(group)
        overlong = self.settings.overlong_punishment
        if overlong is not None:
            punish_overlong(
                group,
                limit=self.settings.max_new_tokens,
                buffer_share=overlong.buffer_share,
                weight=overlong.weight,
            )

    def _save(
        self, step: int, tasks: Cursor[Task], training: Training, context: RunContext
    ) -> None:
        every = self.config.checkpoint.every_steps
        if step == self.settings.steps or (every is not None and step % every == 0):
            state = self._stand(step, tasks, training, context)
            context.save_checkpoint(self.config, state, training)

    async def close(self) -> None:
        await self.sampler.environment.close()
        if self.evaluation is not None:
            await self.evaluation.close()

    def _write_down(
        self,
        step: int,
        groups: Sequence[Sequence[Rollout]],
        advantages: dict[str, float],
        context: RunContext,
    ) -> None:
        if self.config.tracking.rollouts:
            rollouts = [rollout for group in groups for rollout in group]
            context.run.write_rollouts(self.name, step, rollouts, advantages)

    async def _evaluate(self, step: int, context: RunContext) -> None:
        evaluation = self.evaluation
        every = None if evaluation is None else evaluation.settings.every_steps
        if evaluation is not None and every is not None and step % every == 0:
            await evaluation.evaluate(context, evaluation.name, step=step, report=False)


def thresholds(config: TrainingConfig) -> dict[str, float | None]:
    """Of the monitors; those of groups without variance are off where such groups teach too."""
    given: dict[str, float | None] = config.monitors.model_dump()
    if config.algorithm.hyperparameters.advantage in TOKEN_ADVANTAGES:
        given |= {"zero_variance": None, "flat_reward_steps": None}
    return given


def take_distinct(
    tasks: Iterator[tuple[int, Task]], count: int, seen: set[tuple[int, str]]
) -> list[tuple[int, Task]]:
    """The next tasks; `seen` are those of the same step, and these are added to them.

    Raises:
        UserError: two of them have one id, which would mix their groups up.
    """
    batch = [next(tasks) for _ in range(count)]
    for epoch, task in batch:
        if (epoch, task.id) in seen:
            raise UserError(
                f"prompt_source: two tasks have the id {task.id!r}",
                "Give each its own, or leave out prompt_source.id_column.",
            )
        seen.add((epoch, task.id))
    return batch


def _speed(
    groups: Sequence[Sequence[Rollout]],
    samples: Sequence[Sample],
    generating: float,
    generated: float,
) -> dict[str, float]:
    training = time.perf_counter() - generated
    sampled = sum(sampled_tokens(rollout) for group in groups for rollout in group)
    return {
        "seconds/generate": generating,
        "seconds/train": training,
        "tokens_per_s/generate": sampled / max(generating, 1e-9),
        "tokens_per_s/train": sum(map(len, samples)) / max(training, 1e-9),
    }
