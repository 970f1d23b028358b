"""A run: prepare every stage, then execute them in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain.config.load import dump_yaml, load_config, resolve_stages
from retrain.config.root import StageKind, TrainingConfig
from retrain.loops.build import build_engine, build_sandbox, runs_code
from retrain.loops.context import RunContext
from retrain.loops.evaluate import EvalStage
from retrain.loops.rl import RLStage
from retrain.loops.sft import SFTStage
from retrain.models import load_policy
from retrain.tracking.plots import plot_curves
from retrain.tracking.progress import Progress
from retrain.tracking.report import EvaluationResult, print_results, results_table
from retrain.tracking.run_dir import RunDirectory

Stage = SFTStage | RLStage | EvalStage

STAGES: dict[StageKind, type[SFTStage] | type[RLStage] | type[EvalStage]] = {
    "sft": SFTStage,
    "rl": RLStage,
    "eval": EvalStage,
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
) -> RunResult:
    """Run a config: a path, a dict or a `TrainingConfig`; `only` runs the stages of one kind.

    Everything is read, resolved and checked before the run directory is made.

    Raises:
        UserError: something in the config, the data or the user's own code is wrong.
    """
    checked = load_config(config, overrides, only=only)
    stages = resolve_stages(checked, only=only)
    async with AsyncExitStack() as closing:
        sandbox = build_sandbox(checked)
        closing.push_async_callback(sandbox.close)
        if any(kind != "sft" and runs_code(stage) for _, kind, stage in stages):
            await sandbox.start()
        policy = load_policy(checked.model, seed=checked.seed)
        context = RunContext(policy, build_engine(checked, policy), sandbox)
        closing.push_async_callback(context.engine.close)
        prepared: list[Stage] = []
        for name, kind, stage_config in stages:
            prepared.append(STAGES[kind].prepare(name, stage_config, context))
            closing.push_async_callback(prepared[-1].close)
        directory = RunDirectory.create(checked.output_dir, checked.experiment_name)
        directory.write_text("config.yaml", dump_yaml(checked))
        with Progress(checked.tracking.progress) as progress:
            progress.line(f"run directory: {directory.path}")
            context.begin(directory, progress)
            for stage in prepared:
                await stage.execute(context)
        _write_results(checked, context)
        _say_where(context)
    return RunResult(
        path=directory.path,
        status="completed",
        metrics=context.last_metrics,
        evaluations=context.results,
        checkpoint=None if context.checkpoint is None else Path(context.checkpoint),
    )


def run_sync(
    config: str | Path | Mapping[str, Any] | TrainingConfig,
    *,
    overrides: Sequence[str] = (),
    only: StageKind | None = None,
) -> RunResult:
    """`run`, for scripts that have no event loop."""
    return asyncio.run(run(config, overrides=overrides, only=only))


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
        print_results(context.results)
    if config.tracking.plots:
        plot_curves(context.run)


def _say_where(context: RunContext) -> None:
    """Tell the user where to look; what the run did not write is left out."""
    for name in ("results.md", "plots/curves.png", "transcripts"):
        if (context.run.path / name).exists():
            context.progress.line(f"{Path(name).stem}: {context.run.path / name}")
    if context.checkpoint is not None:
        context.progress.line(f"checkpoint: {context.checkpoint}")
