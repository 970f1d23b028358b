"""A run: prepare every stage, then execute them in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain.config.engine import TorchEngineConfig
from retrain.config.load import dump_yaml, load_config, resolve_stages
from retrain.config.root import StageKind, TrainingConfig, evaluates, generates
from retrain.loops.context import RunContext
from retrain.loops.distill import prepare_distillation
from retrain.loops.engines import build_engine
from retrain.loops.evaluate import EvalStage
from retrain.loops.interrupt import Interrupted, Stop
from retrain.loops.pipeline import overlapping
from retrain.loops.repeatable import circumstances, repeatable
from retrain.loops.resume import Resumption, find_run, read_resumption, stages_left
from retrain.loops.rl import RLStage
from retrain.loops.sft import SFTStage
from retrain.loops.world import build_sandbox, endpoints_asked, runs_code
from retrain.models import load_policy
from retrain.rollout import set_aside
from retrain.tracking.plots import plot_curves
from retrain.tracking.progress import Progress
from retrain.tracking.report import EvaluationResult, print_results, results_table
from retrain.tracking.run_dir import ABOUT_FILE, CONFIG_FILE, RunDirectory
from retrain.tracking.trackers import RunInfo, Trackers, build_trackers, sharing
from retrain.tracking.trackers.base import Status
from retrain.types import UserError

Stage = SFTStage | RLStage | EvalStage

STAGES: dict[StageKind, Callable[[str, TrainingConfig, RunContext], Stage]] = {
    "sft": SFTStage.prepare,
    "rl": RLStage.prepare,
    "distill": prepare_distillation,
    "eval": EvalStage.prepare,
}


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    path: Path
    """The run directory."""
    status: str
    """`completed`; a run that fails raises."""
    metrics: dict[str, float]
    """Of the last training step."""
    evaluations: list[EvaluationResult] = field(default_factory=list)
    checkpoint: Path | None = None
    """The last one saved, in Hugging Face format."""


async def run(
    config: str | Path | Mapping[str, Any] | TrainingConfig,
    *,
    overrides: Sequence[str] = (),
    only: StageKind | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """Run a config: a path, a dict or a `TrainingConfig`; `only` runs the stages of one kind.

    `resume` goes on with a run that was stopped: `latest`, the newest of the experiment in its
    output_dir; `auto`, that one unless it is complete or there is none, else a new run; or the path
    of a run directory. Everything is read, resolved and checked before the run directory is made
    or touched.

    Raises:
        UserError: something in the config, the data or the user's own code is wrong.
        Interrupted: SIGINT or SIGTERM asked the run to stop; what it had learnt is saved.
    """
    checked = load_config(config, overrides, only=only)
    stages = resolve_stages(checked, only=only)
    trackers = _trackers(checked, stages)
    found = None if resume is None else find_run(checked, str(resume))
    async with AsyncExitStack() as closing:
        going_on = None
        if found is not None:
            closing.enter_context(found.locked())
            going_on = read_resumption(checked, found, only)
        closing.enter_context(repeatable(checked.seed))
        sandbox = build_sandbox(checked)
        closing.push_async_callback(sandbox.close)
        if any(generates(kind, stage) and runs_code(stage) for _, kind, stage in stages):
            await sandbox.start()
        policy = load_policy(checked.model, seed=checked.seed)
        context = RunContext(policy, build_engine(checked, policy), sandbox, trackers)
        closing.push_async_callback(context.engine.close)
        deterministic = await _prepare_engine(context, stages)
        if going_on is not None and going_on.saved is not None:
            context.go_on_from(going_on.saved)
        prepared: list[Stage] = []
        for name, kind, stage_config in stages_left(stages, going_on):
            prepared.append(STAGES[kind](name, stage_config, context))
            closing.push_async_callback(prepared[-1].close)
        if deterministic:
            deterministic = all([await m.engine.prepare() for m in context.user_models.values()])
        directory = found or _create(checked, only=only, deterministic=deterministic)
        if found is None:
            closing.enter_context(directory.locked())
        if going_on is not None:
            going_on.clear_away(directory)
        news = [*_news(going_on, deterministic, checked), *_unlike(stages)]
        closing.enter_context(set_aside())
        training = [name for name, kind, _ in stages if kind != "eval"]
        info = _info(checked, directory, going_on, training)
        await _execute(checked, context, prepared, directory, news, info=info, training=training)
    return _result(directory, context)


def _result(directory: RunDirectory, context: RunContext) -> RunResult:
    return RunResult(
        path=directory.path,
        status="completed",
        metrics=context.last_metrics,
        evaluations=context.results,
        checkpoint=None if context.checkpoint is None else Path(context.checkpoint),
    )


def _create(config: TrainingConfig, **about: object) -> RunDirectory:
    """A new run directory, with all that resuming asks of it from the first moment on."""
    files = {
        CONFIG_FILE: dump_yaml(config),
        ABOUT_FILE: json.dumps(about | circumstances(), indent=1) + "\n",
    }
    return RunDirectory.create(config.output_dir, config.experiment_name, files)


def _news(
    going_on: Resumption | None, deterministic: bool | None, config: TrainingConfig
) -> Iterator[str]:
    """What a user should know before the run begins, or goes on."""
    if going_on is not None:
        yield from going_on.say(deterministic)
    if ahead := overlapping(config):
        stages = ", ".join(f"{name} (max_staleness {steps})" for name, steps in ahead.items())
        yield f"rollouts overlap training in {stages}: a resumed run is not the same bit for bit"
    elif going_on is None and deterministic is False and not _asked_for_speed(config):
        yield "the engine is not deterministic here: a resumed run is not the same bit for bit"


def _trackers(
    config: TrainingConfig, stages: Sequence[tuple[str, StageKind, TrainingConfig]]
) -> Trackers:
    """
    Raises:
        UserError: a tracker's package is missing, or there is no such class.
    """
    during = [(name, kind, evaluates(stage)) for name, kind, stage in stages]
    return build_trackers(config.tracking, prefixed=sharing(during))


def _info(
    config: TrainingConfig,
    directory: RunDirectory,
    going_on: Resumption | None,
    training: Iterable[str],
) -> RunInfo:
    """What trackers are told of the run."""
    rewound_to = None
    if going_on is not None:
        rewound_to = -1 if going_on.saved is None else directory.steps_made(training)
    return RunInfo(directory.path.name, directory.path, config.model_dump(mode="json"), rewound_to)


def _unlike(stages: Sequence[tuple[str, StageKind, TrainingConfig]]) -> Iterator[str]:
    for name, kind, stage in stages:
        for clause in endpoints_asked(stage) if generates(kind, stage) else ():
            yield f"{clause} in {name}: a resumed run is not the same bit for bit"


def _asked_for_speed(config: TrainingConfig) -> bool:
    """Whether the config itself says that the engine need not be deterministic."""
    engine = config.engine
    return isinstance(engine, TorchEngineConfig) and engine.deterministic is False


async def _prepare_engine(
    context: RunContext, stages: Sequence[tuple[str, StageKind, TrainingConfig]]
) -> bool | None:
    """Whether the engine is deterministic; None where no stage generates."""
    if not any(generates(kind, stage) for _, kind, stage in stages):
        return None
    return await context.engine.prepare()


async def _execute(
    config: TrainingConfig,
    context: RunContext,
    stages: Sequence[Stage],
    directory: RunDirectory,
    news: Iterable[str],
    *,
    info: RunInfo,
    training: Sequence[str],
) -> None:
    """The stages that are left, and the results; run.json says how it ended."""
    status: Status = "failed"
    trackers = context.trackers
    with Progress(config.tracking.progress) as progress, Stop() as stop:
        for line in (f"run directory: {directory.path}", *news):
            progress.line(line)
        context.begin(directory, progress, stop)
        directory.describe(status="running")
        try:
            trackers.start(info, progress.line)
            starting = await context.engine.start(directory.path)
            if any(not isinstance(s, SFTStage) or s.evaluation is not None for s in stages):
                if starting is not None:
                    progress.line(starting)
                await stop.watch(context.bring_weights())
            for stage in stages:
                others = [name for name in training if name != stage.name]
                trackers.begin_stage(directory.steps_made(others))
                await stage.execute(context)
            stop.check()
            _write_results(config, context)
            _hand_over(config, context)
            status = "completed"
        except Interrupted as interrupted:
            interrupted.checkpoint = interrupted.checkpoint or context.checkpoint
            status = "interrupted"
            raise
        finally:
            with suppress(UserError):
                directory.describe(status=status)
            trackers.finish(status)
    if context.results:
        print_results(context.results)
    _say_where(context)


def run_sync(
    config: str | Path | Mapping[str, Any] | TrainingConfig,
    *,
    overrides: Sequence[str] = (),
    only: StageKind | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """`run`, for scripts that have no event loop."""
    return asyncio.run(run(config, overrides=overrides, only=only, resume=resume))


def _write_results(config: TrainingConfig, context: RunContext) -> None:
    if context.results:
        context.run.write_text("results.md", results_table(context.results))
        rows = [
            {
                "stage": r.stage,
                "mode": r.mode,
                "n": r.n,
                "successes": r.successes,
                "interval": list(r.interval),
                "reward_mean": r.reward_mean if r.n else None,
                "by_group": {k: list(v) for k, v in r.by_group.items()},
                "excluded": list(r.excluded),
            }
            for r in context.results
        ]
        context.run.write_text("results.json", json.dumps(rows, indent=1) + "\n")
    if config.tracking.plots:
        plot_curves(context.run)


def _hand_over(config: TrainingConfig, context: RunContext) -> None:
    """Give the trackers what a complete run leaves behind."""
    for name, file in (("results", "results.md"), ("curves", "plots/curves.png")):
        context.trackers.log_artifact(name, context.run.path / file)
    if config.tracking.artifacts and context.checkpoint is not None:
        context.trackers.log_artifact("checkpoint", Path(context.checkpoint))


def _say_where(context: RunContext) -> None:
    """Tell the user where to look; what the run did not write is left out."""
    for name in ("results.md", "plots/curves.png", "transcripts"):
        if (context.run.path / name).exists():
            context.progress.line(f"{Path(name).stem}: {context.run.path / name}")
    if context.checkpoint is not None:
        context.progress.line(f"checkpoint: {context.checkpoint}")
