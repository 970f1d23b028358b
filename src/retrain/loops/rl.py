"""Reinforcement learning: sample groups, score them, learn, and again.

One loop for every `max_staleness`. A step's groups may start once the weights of the step that is
so many before the last one are with the engine; the rest is waiting for what is not there yet.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from retrain.config.algorithm import TOKEN_ADVANTAGES, Hyperparameters
from retrain.config.root import TrainingConfig
from retrain.data import TaskCursor, TaskSource, load_tasks
from retrain.engines import SamplingParams
from retrain.learner import NotFiniteError
from retrain.loops.build import build_calculator, build_sampler
from retrain.loops.checkpoint import RunState, Training
from retrain.loops.context import RunContext, check_prompts_fit
from retrain.loops.credit import has_variance, punish_overlong, rollout_advantages
from retrain.loops.evaluate import EvalStage
from retrain.loops.guidance import Guidance
from retrain.loops.metrics import rollout_metrics, speed_metrics
from retrain.loops.monitors import Monitors
from retrain.loops.pipeline import Pipeline, SampledGroup
from retrain.loops.success import check_curricula, counts, success_of
from retrain.loops.survivors import Freshness, Losses, large_enough, smallest_group
from retrain.loops.update import PolicyUpdate, build_update, check_critic
from retrain.loops.worker import Worker
from retrain.loops.world import build_environment, build_renderer
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
    guidance: Guidance | None = None
    """Teachers that speak of what was sampled."""

    @classmethod
    def prepare(cls, name: str, config: TrainingConfig, context: RunContext) -> RLStage:
        """Read and check everything that the stage needs, but its teachers.

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
        calculator = build_calculator(config.reward_setup, context.sandbox)
        rewards = [spec.name for spec in calculator.specs]
        check_curricula(config.prompt_source, config.evaluation, rewards)
        during = config.evaluation is not None and config.evaluation.every_steps is not None
        return cls(
            name=name,
            config=config,
            settings=settings,
            tasks=tasks,
            calculator=calculator,
            sampler=sampler,
            evaluation=EvalStage.prepare(f"{name}-eval", config, context) if during else None,
        )

    async def execute(self, context: RunContext) -> None:
        work = self._begin(context)
        try:
            if self.guidance is not None:
                ready = self.guidance.teachers.prepare(self.settings.temperature)
                await context.stop.watch(ready)
            await self._train(work, context)
        finally:
            await work.close()

    async def _train(self, work: _Work, context: RunContext) -> None:
        state = self._resume(work, context)
        context.progress.stage(self.name, total=self.settings.steps, kind="rl", done=state.step)
        if not state.evaluated:
            with context.saved_on_failure(self.config, state, work.training):
                await context.stop.watch(self._evaluate(state.step, work, context))
        if not state.evaluated or state.step == self.settings.steps:
            self._save(state.step, work, context)
        for step in range(state.step + 1, self.settings.steps + 1):
            if not work.losses.streak:  # steps that are lost are made again by a resumed run
                state = self._stand(step - 1, work, context)
            started = time.perf_counter()
            with context.saved_on_failure(self.config, state, work.training):
                context.stop.check()
                sampled = await context.stop.watch(self._sample(step, work, context))
                self.calculator.end_step(sampled.rollouts)
            work.tasks.observe(
                [r for r in sampled.rollouts if counts(r, self.config.evaluation)],
                success_of(self.config.evaluation),
            )
            generated = time.perf_counter()

            with context.saved_on_failure(self.config, state, work.training):
                sampled, taught = await context.stop.watch(self._teach(sampled, work))
            learn = functools.partial(self._learn, step, sampled, state, work, context)
            metrics, samples = await work.thread.run(learn)
            metrics |= taught
            metrics |= speed_metrics(sampled.groups, samples, generated - started, generated)
            metrics |= work.tasks.metrics()
            metrics["alerts"] = float(len(work.monitors.observe(step, metrics)))
            context.log(self.name, step, metrics)
            advantages = rollout_advantages(samples)
            if self.config.tracking.rollouts:
                write = functools.partial(context.run.write_rollouts, self.name, step)
                await work.thread.run(functools.partial(write, sampled.rollouts, advantages))
            context.trackers.log_rollouts(
                self.name, step, sampled.rollouts, advantages, training=True
            )

            with context.saved_on_failure(self.config, state, work.training):
                work.losses.check(step)
            if not work.losses.streak:
                state = self._stand(step, work, context)
                state = replace(state, finished=False, evaluated=False)
            with context.saved_on_failure(self.config, state, work.training):
                await context.stop.watch(self._evaluate(step, work, context))
            await work.thread.run(functools.partial(self._save, step, work, context))
        if work.update.learner.updates == 0:
            context.progress.line(
                f"{self.name}: nothing was learnt: no step had rollouts that teach; "
                "metrics.jsonl and failures.jsonl say why"
            )

    def _begin(self, context: RunContext) -> _Work:
        update = build_update(
            self.settings,
            context.policy,
            seed=self.config.seed,
            critic=context.critic,
            task_reward=1.0 if self.guidance is None else self.guidance.task_reward,
            teacher_coefficient=0.0 if self.guidance is None else self.guidance.coefficient,
        )
        context.critic = update.learner.critic
        most = self.config.rollout.max_lost_steps
        tasks = self.tasks.cursor("prompt_source")
        return _Work(
            tasks=tasks,
            pipeline=Pipeline(tasks, self._group()),
            freshness=Freshness(self.settings.max_staleness),
            thread=Worker(),
            update=update,
            training=Training(update.learner, update.reference),
            monitors=Monitors(
                thresholds(self.config, rewards_train=self._rewards_train), stage=self.name
            ),
            losses=Losses(self.name, context.run, context.engine, max_lost_steps=most),
        )

    def _resume(self, work: _Work, context: RunContext) -> RunState:
        """Put everything to where the stage was left, if it was; where it stands now.

        Raises:
            UserError: the data is no longer the same, or more steps are done than there are to be.
        """
        saved = context.take_resumed(self.name)
        if saved is None:
            return self._stand(0, work, context)
        saved.check_steps(self.settings.steps)
        work.tasks.restore(saved.state.position)
        self.calculator.restore(saved.state.rewards)
        work.training.restore(saved)
        work.monitors.replay(context.run.metrics_of(self.name))
        saved.state.put_generators()
        return saved.state

    def _stand(self, step: int, work: _Work, context: RunContext) -> RunState:
        """Where the stage stands after `step` steps."""
        return context.stand(
            RunState(
                stage=self.name,
                step=step,
                finished=step == self.settings.steps,
                version=context.version,
                position=work.pipeline.position(),
                updates=work.update.learner.updates,
                rewards=self.calculator.state(),
            )
        )

    def _save(self, step: int, work: _Work, context: RunContext) -> None:
        every = self.config.checkpoint.every_steps
        if step == self.settings.steps or (every is not None and step % every == 0):
            context.save_checkpoint(self.config, self._stand(step, work, context), work.training)
            self._check_rating(context.latest)

    def _check_rating(self, metrics: Mapping[str, float]) -> None:
        """
        Raises:
            UserError: checkpoints are to be kept by a metric that there is not.
        """
        best = self.config.checkpoint.keep_best
        if best is None or best.metric in metrics or best.metric.startswith("eval/"):
            return
        near = difflib.get_close_matches(best.metric, metrics, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"checkpoint.keep_best.metric: no step of {self.name} has a metric {best.metric}",
            f"{hint}docs/run_directory.md lists them; correct it, and go on with --resume.",
        )

    def _learn(
        self, step: int, sampled: _Sampled, before: RunState, work: _Work, context: RunContext
    ) -> tuple[dict[str, float], list[Sample]]:
        """The metrics of the step's rollouts and updates, and what trained.

        Raises:
            UserError: a loss or gradient is not finite; its batch is written down, and `before`
                saved where no update of the step was made.
        """
        groups = [group.rollouts for group in sampled.groups]
        metrics = work.losses.observe(step, groups) | rollout_metrics(
            groups,
            self.config.evaluation,
            version=context.version,
            freshness=work.freshness,
            per_turn=self.settings.credit == "turn",
            min_group_size=self._smallest_group,
        )
        work.freshness.warn(f"{self.name} step {step}", sampled.rollouts)
        update = work.update
        try:
            samples = update.samples(sampled.chosen, sampled.samples)
            if samples:
                metrics |= update.learn(samples, step, context.weights_changed)
        except NotFiniteError as error:
            if update.learner.updates == before.updates:
                context.save_if_new(self.config, before, work.training)
            raise context.write_down(error, self.name, step) from error
        return metrics, samples

    async def _sample(self, step: int, work: _Work, context: RunContext) -> _Sampled:
        """A step's groups, scored, under way since as many steps as they may be stale.

        With dynamic sampling, groups without variance are made up for by further tasks, as often
        as the settings allow; the step learns from as many groups as without it.
        """
        await context.bring_weights()
        work.freshness.publish(context.version)
        work.pipeline.begin_step()
        settings, least = self.settings, self._smallest_group
        ahead = min(settings.max_staleness, settings.steps - step) * settings.prompts_per_step
        groups: list[SampledGroup] = []
        missing = settings.prompts_per_step
        for _ in range(settings.dynamic_sampling_rounds + 1):
            groups += await work.pipeline.take(missing, ahead=ahead)
            per_turn = settings.credit == "turn"
            fresh = work.freshness.of([group.rollouts for group in groups])
            alive = [own for group in fresh if (own := large_enough(group, least))]
            full = [group for group in alive if has_variance(group, per_turn=per_turn)]
            missing = settings.prompts_per_step - len(full)
            if missing == 0:
                break
        return _Sampled(groups, full if settings.dynamic_sampling_rounds else alive)

    async def _teach(self, sampled: _Sampled, work: _Work) -> tuple[_Sampled, dict[str, float]]:
        """With the step's samples, and what teachers say of them; what is to be reported of it."""
        collect = functools.partial(work.update.collect, sampled.chosen)
        samples = await work.thread.run(collect)
        if self.guidance is None:
            return replace(sampled, samples=samples), {}
        rollouts = [rollout for group in sampled.chosen for rollout in group]
        temperature = self.settings.temperature
        samples, metrics = await self.guidance.teach(rollouts, samples, temperature)
        return replace(sampled, samples=samples), metrics

    @property
    def _rewards_train(self) -> bool:
        return self.guidance is None or self.guidance.task_reward > 0

    @property
    def _smallest_group(self) -> int:
        """Fewest survivors of a group that teaches; a teacher needs no second one."""
        given = self.config.rollout.min_group_size
        return 1 if self.guidance is not None and given is None else smallest_group(self.config)

    def _group(self) -> Callable[[int, Task], Awaitable[list[Rollout]]]:
        """Makes the group of an (epoch, task), all of them together within the concurrency that
        there may be."""
        gate = asyncio.Semaphore(self.sampler.max_concurrency)

        async def of(epoch: int, task: Task) -> list[Rollout]:
            size = self.settings.group_size
            return await self.sampler.scored_group(task, size, self._score, epoch=epoch, gate=gate)

        return of

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

    async def close(self) -> None:
        await self.sampler.environment.close()
        await self.calculator.close()
        if self.guidance is not None:
            await self.guidance.teachers.close()
        if self.evaluation is not None:
            await self.evaluation.close()

    async def _evaluate(self, step: int, work: _Work, context: RunContext) -> None:
        """Where it is due; what is under way ends before, and nothing starts meanwhile."""
        evaluation = self.evaluation
        every = None if evaluation is None else evaluation.settings.every_steps
        if evaluation is not None and every is not None and step % every == 0:
            await work.pipeline.settle()
            await evaluation.evaluate(context, evaluation.name, step=step, report=False)


@dataclass(frozen=True)
class _Work:
    """What a stage has in memory while it is executed."""

    tasks: TaskCursor
    pipeline: Pipeline
    freshness: Freshness
    thread: Worker
    update: PolicyUpdate
    training: Training
    monitors: Monitors
    losses: Losses

    async def close(self) -> None:
        await self.pipeline.close()
        self.thread.close()


@dataclass(frozen=True)
class _Sampled:
    """What a step has to learn from."""

    groups: list[SampledGroup]
    """All that were taken, in order."""
    chosen: list[list[Rollout]]
    """Those that teach, without what is stale."""
    samples: list[Sample] = field(default_factory=list)
    """Theirs."""

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]


def thresholds(config: TrainingConfig, *, rewards_train: bool = True) -> dict[str, float | None]:
    """Of the monitors; those of groups without variance are off where such groups teach too or
    rewards do not, and so is that of the gap between engine and learner where it holds what the
    policy has learnt since.
    """
    given: dict[str, float | None] = config.monitors.model_dump()
    if config.algorithm.hyperparameters.max_staleness > 0:
        given |= {"logprob_gap": None}
    by_token = config.algorithm.hyperparameters.advantage in TOKEN_ADVANTAGES
    if by_token or not rewards_train:
        given |= {"zero_variance": None, "flat_reward_steps": None}
    return given
