"""Evaluation: rollouts on held-out tasks, in several modes, with intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import length_hint

from retrain.config.agents import AgentsConfig
from retrain.config.environment import ToolEnvironmentConfig
from retrain.config.root import TrainingConfig
from retrain.config.stages import EvaluationConfig, EvaluationMode
from retrain.data import TaskSource, load_tasks
from retrain.engines import SamplingParams
from retrain.loops.build import build_calculator, build_sampler
from retrain.loops.context import RunContext, check_prompts_fit
from retrain.loops.metrics import means_by_name
from retrain.loops.success import counts, is_success
from retrain.loops.survivors import write_failures
from retrain.loops.world import build_environment, build_renderer
from retrain.rewards import RewardCalculator
from retrain.rollout import Sampler
from retrain.tracking.progress import summary
from retrain.tracking.report import EvaluationResult, transcript
from retrain.types import Rollout, Task, UserError

EVALUATION_EPOCH = -1
"""The epoch in the seeds of evaluation rollouts: each task draws the same numbers in every
evaluation of a run, so that before and after are paired."""


@dataclass(frozen=True)
class EvalStage:
    name: str
    config: TrainingConfig
    settings: EvaluationConfig
    tasks: TaskSource
    calculator: RewardCalculator
    samplers: Sequence[tuple[EvaluationMode, Sampler]]

    @classmethod
    def prepare(cls, name: str, config: TrainingConfig, context: RunContext) -> EvalStage:
        """Read and check everything that the stage needs.

        Raises:
            UserError: bad data, unknown names, or a success that no reward decides.
        """
        settings = config.evaluation
        assert settings is not None
        calculator = build_calculator(config.reward_setup, context.sandbox)
        tasks = held_out_tasks(config, settings, calculator)
        renderer = build_renderer(config, context.policy)
        limit = settings.max_new_tokens or config.algorithm.hyperparameters.max_new_tokens
        samplers = [
            (
                mode,
                build_sampler(
                    config,
                    build_environment(
                        config,
                        renderer,
                        context.sandbox,
                        tools_enabled=mode.tools,
                        user_models=context.user_models,
                    ),
                    context.engine,
                    renderer,
                    SamplingParams(limit, mode.temperature, mode.top_p, mode.top_k),
                ),
            )
            for mode in settings.modes
        ]
        check_prompts_fit(tasks, samplers[0][1], "evaluation.prompt_source")
        return cls(name, config, settings, tasks, calculator, samplers)

    async def close(self) -> None:
        for _, sampler in self.samplers:
            await sampler.environment.close()
        await self.calculator.close()

    async def execute(self, context: RunContext) -> None:
        context.progress.stage(self.name, total=len(self.samplers), kind="eval")
        await context.stop.watch(self.evaluate(context, self.name, step=0, report=True))

    async def evaluate(
        self, context: RunContext, stage: str, *, step: int, report: bool
    ) -> list[EvaluationResult]:
        """Run every mode; `report` also adds to the run's table and writes transcripts."""
        await context.bring_weights()
        metrics: dict[str, float] = {}
        results: list[EvaluationResult] = []
        tasks = [(EVALUATION_EPOCH, task) for task in self.tasks.epoch(0)]
        for done, (mode, sampler) in enumerate(self.samplers, 1):
            started = time.perf_counter()
            groups = await sampler.groups(tasks, mode.repeats, self.calculator.score)
            rollouts = [rollout for group in groups for rollout in group]
            result = self._result(stage, mode, rollouts)
            results.append(result)
            metrics |= _metrics(result, self.settings.group_by)
            counted = [rollout for rollout in rollouts if counts(rollout, self.settings)]
            for name, mean in means_by_name(counted).items():
                metrics[f"eval/{mode.name}/{name}"] = mean
            masked = sum(rollout.error is not None for rollout in rollouts)
            metrics[f"eval/{mode.name}/masked"] = float(masked)
            write_failures(context.run, stage, step, rollouts, f"{stage} step {step}, {mode.name}")
            metrics[f"eval/{mode.name}/seconds"] = time.perf_counter() - started
            name = f"{stage}-{_file_name(mode.name)}"
            if self.config.tracking.rollouts:
                context.run.write_rollouts(name, step, rollouts)
            context.trackers.log_rollouts(name, step, rollouts)
            if report:
                context.progress.update(done, metrics)
                self._write_transcripts(context, stage, mode, rollouts)
        context.note(stage, step, metrics)
        if report:
            context.results.extend(results)
        else:
            context.progress.line(f"{stage}, step {step}: {summary(metrics)}")
        return results

    def _result(
        self, stage: str, mode: EvaluationMode, rollouts: Sequence[Rollout]
    ) -> EvaluationResult:
        settings = self.settings
        by_group: dict[str, tuple[int, int]] = {}
        n = successes = 0
        total = 0.0
        for rollout in rollouts:
            if not counts(rollout, settings):
                continue
            won = is_success(rollout, settings.success_reward, settings.success_threshold)
            value = _group_value(rollout, settings.group_by)
            if value is not None:
                seen, good = by_group.get(value, (0, 0))
                by_group[value] = (seen + 1, good + won)
            if value is None or value not in settings.exclude:
                n += 1
                successes += won
                total += rollout.reward
        return EvaluationResult(
            stage=stage,
            mode=mode.name,
            n=n,
            successes=successes,
            reward_mean=total / n if n else float("nan"),
            by_group=by_group,
            excluded=tuple(settings.exclude),
        )

    def _write_transcripts(
        self, context: RunContext, stage: str, mode: EvaluationMode, rollouts: Sequence[Rollout]
    ) -> None:
        for index, rollout in enumerate(rollouts[: self.config.tracking.transcripts]):
            name = f"transcripts/{stage}-{_file_name(mode.name)}-{index + 1}.txt"
            context.run.write_text(name, transcript(rollout))


def held_out_tasks(
    config: TrainingConfig, settings: EvaluationConfig, calculator: RewardCalculator
) -> TaskSource:
    """The tasks of an evaluation, with everything checked that can be without the policy.

    Raises:
        UserError: bad data, a success that no reward decides, or keys that do not fit.
    """
    names = [spec.name for spec in calculator.specs]
    if settings.success_reward is not None and settings.success_reward not in names:
        raise UserError(
            f"evaluation.success_reward: there is no reward {settings.success_reward!r}",
            f"Rewards: {', '.join(names) or 'none'}.",
        )
    check_modes(settings.modes, config)
    tasks = load_tasks(settings.prompt_source, seed=config.seed)
    check_groups(tasks, settings)
    return tasks


def check_groups(tasks: TaskSource, settings: EvaluationConfig) -> None:
    """Every task has the column to group by, and every excluded value occurs, as far as the tasks
    are known.

    Raises:
        UserError: one does not.
    """
    if settings.group_by is None:
        return
    values = {_value_of(task, settings.group_by) for task in tasks.known()}
    if length_hint(tasks, -1) < 0:
        return
    for value in settings.exclude:
        if value not in values:
            raise UserError(
                f"evaluation.exclude: no task has {settings.group_by} = {value!r}",
                f"Values: {', '.join(sorted(values))}.",
            )


def check_modes(modes: Sequence[EvaluationMode], config: TrainingConfig) -> None:
    environment = config.environment
    has_tools = isinstance(environment, ToolEnvironmentConfig) and bool(environment.tools)
    if isinstance(environment, AgentsConfig):
        has_tools = any(agent.tools for agent in environment.agents.values())
    for mode in modes:
        if not mode.tools and not has_tools:
            raise UserError(
                f"evaluation.modes: {mode.name!r} has tools: false, "
                "but the environment has no tools to switch off",
                "Remove the key, or list tools under environment.tools.",
            )


def _group_value(rollout: Rollout, column: str | None) -> str | None:
    return None if column is None or rollout.task is None else _value_of(rollout.task, column)


def _value_of(task: Task, column: str) -> str:
    value = task.metadata.get(column)
    if value is None:
        raise UserError(
            f"evaluation.group_by: task {task.id} has no column {column!r}",
            f"Columns: {', '.join(sorted(task.metadata)) or 'none'}.",
        )
    return str(value)


def _metrics(result: EvaluationResult, column: str | None) -> dict[str, float]:
    low, high = result.interval
    prefix = f"eval/{result.mode}"
    metrics = {
        f"{prefix}/success": result.success,
        f"{prefix}/success_low": low,
        f"{prefix}/success_high": high,
        f"{prefix}/reward": result.reward_mean,
        f"{prefix}/n": float(result.n),
    }
    for value, (n, successes) in sorted(result.by_group.items()):
        metrics[f"{prefix}/{column}={value}/success"] = successes / n
    return metrics


def _file_name(mode: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in mode)
