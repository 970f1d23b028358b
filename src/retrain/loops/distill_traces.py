"""Another agent's log to an SFT stage."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from retrain.config.environment import QAConfig, ToolEnvironmentConfig
from retrain.config.root import TrainingConfig
from retrain.config.traces import TracesDistillation
from retrain.data import Trace, load_tasks, load_traces, messages_to_dicts
from retrain.data.imports import Logged, read_logs
from retrain.data.imports.filters import (
    best_of_each,
    each_turn_once,
    opening,
    prompt_of,
    questions,
    sound,
)
from retrain.data.imports.report import Report
from retrain.envs.tools import with_system
from retrain.loops.build import build_calculator
from retrain.loops.context import RunContext
from retrain.loops.sft import SFTStage, check_calls, steps_of, trace_samples
from retrain.loops.world import (
    build_renderer,
    build_sandbox,
    describes_tools,
    endpoints_asked,
    tool_schemas,
)
from retrain.rendering import Renderer, ToolSchema
from retrain.types import MessageType, Rollout, Task, UserError

_GROUPS_AT_ONCE = 32


def prepare_traces(name: str, config: TrainingConfig, context: RunContext) -> SFTStage:
    """Read the log, keep what is worth imitating, and prepare SFT on it.

    A stage that is resumed trains on what it kept before, whatever became of the log.

    Raises:
        UserError: a bad source, a reward that fails, or nothing left to train on.
    """
    settings = _settings(config)
    before = _kept_before(name, context)
    if before is not None:
        return SFTStage.of(name, config, context, settings, before)
    selection = _select(config, settings, _Fit.of(config, context))
    traces = [logged.trace for logged in selection.kept]
    stage = SFTStage.of(name, config, context, settings, traces)
    return replace(stage, announce=functools.partial(_announce, name, selection))


def describe_traces(config: TrainingConfig) -> Iterator[str]:
    """What `retrain check` says of it. Rewards that ask an endpoint are left out, and so is what
    takes a tokenizer to know: which traces are too long.

    Raises:
        UserError: as `prepare_traces`.
    """
    settings = _settings(config)
    asked = [clause for clause in endpoints_asked(config) if clause.startswith("the reward")]
    scored = settings.threshold is not None
    if scored and asked:
        settings = settings.model_copy(update={"threshold": None, "tasks": None})
    selection = _select(config, settings, None)
    traces = [logged.trace for logged in selection.kept]
    check_calls(traces, config)
    first, *rest = selection.report.lines()
    yield f"traces from {', '.join(settings.sources)}: {first}"
    yield from rest
    yield "not looked for here: traces that are unwritable or too_long, which takes the tokenizer"
    if scored and asked:
        yield f"not scored here: {' and '.join(asked)}"
    if not scored and config.changed("reward_setup"):
        yield "note: reward_setup scores no trace: distillation.threshold is not set"
    yield (
        f"{steps_of(settings, len(traces))} steps of {settings.batch_size}, {settings.optimizer}, "
        f"learning rate {settings.learning_rate:g}, {settings.schedule}"
    )


def _settings(config: TrainingConfig) -> TracesDistillation:
    assert isinstance(config.distillation, TracesDistillation)
    return config.distillation


@dataclass(frozen=True)
class _Selection:
    kept: Sequence[Logged]
    report: Report


def _select(config: TrainingConfig, settings: TracesDistillation, fit: _Fit | None) -> _Selection:
    """
    Raises:
        UserError: as `prepare_traces`.
    """
    report = Report(list(settings.sources))
    kept = sound(
        read_logs(settings.sources, format=settings.format),
        report,
        tools=_student_tools(config),
        system_prompt=settings.system_prompt,
        min_reward=settings.min_reward,
    )
    if settings.threshold is not None:
        kept = _accepted(config, settings, kept, report, threshold=settings.threshold)
    if fit is not None:
        kept = fit.those_that_fit(kept, report)
    if settings.per_prompt is not None:
        kept = best_of_each(kept, report, per_prompt=settings.per_prompt)
    kept = each_turn_once(kept)
    report.kept = len(kept)
    report.targets = sum(
        m.type is MessageType.MODEL for logged in kept for m in logged.trace.messages
    )
    report.require_some()
    return _Selection(kept, report)


def _student_tools(config: TrainingConfig) -> frozenset[str] | None:
    """Names; None where the environment does not say before it runs."""
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig):
        schemas = tool_schemas(environment.tool_list(), build_sandbox(config))
        return frozenset(schema["function"]["name"] for schema in schemas)
    return frozenset() if isinstance(environment, QAConfig) else None


def _accepted(
    config: TrainingConfig,
    settings: TracesDistillation,
    kept: Sequence[Logged],
    report: Report,
    *,
    threshold: float,
) -> list[Logged]:
    """Those that the verifiers of `reward_setup` pass and its rewards find good enough, with that
    reward.

    Raises:
        UserError: there is nothing to score with, or a reward failed under `on_error: stop`.
    """
    setup = config.reward_setup
    if not setup.changed(*type(setup).model_fields):
        raise UserError(
            f"distillation.threshold is {threshold:g}, but reward_setup is empty",
            "Add rewards or verifiers to it, or remove threshold.",
        )
    tasks = _tasks_of(settings, config.seed)
    pairs: list[tuple[Logged, Rollout]] = []
    for logged in kept:
        task = _task(logged, tasks)
        if task is None:
            asked = " or ".join(repr(text[:60]) for text in questions(logged))
            report.drop("no_task", logged.trace.place, asked)
        else:
            pairs.append((logged, _rollout(logged, task)))
    with ThreadPoolExecutor(1) as thread:  # there may be a running event loop in this one
        scoring = _score([rollout for _, rollout in pairs], config)
        thread.submit(asyncio.run, scoring).result()
    good = []
    for logged, rollout in pairs:
        failed = next((p.verifier for p in rollout.reward_parts if p.kind == "verifier"), None)
        if rollout.error is not None:
            report.drop("unscored", logged.trace.place, rollout.error)
        elif failed is not None:
            report.drop("verifier", logged.trace.place, failed)
        elif rollout.reward < threshold:
            report.drop("threshold", logged.trace.place, f"reward {rollout.reward:g}")
        else:
            good.append(replace(logged, reward=rollout.reward))
    return good


def _tasks_of(settings: TracesDistillation, seed: int) -> dict[str, Task] | None:
    """By what they ask; None where the log is to have the answers itself."""
    if settings.tasks is None:
        return None
    source = load_tasks(settings.tasks, seed=seed)
    tasks: dict[str, Task] = {}
    for task in source.epoch(0):
        tasks.setdefault(task.prompt[-1].content.strip(), task)
    return tasks


def _task(logged: Logged, tasks: dict[str, Task] | None) -> Task | None:
    """What the rewards may look at: the task's own columns, and before them the log's."""
    columns = dict(logged.metadata)
    if tasks is None:
        answer = columns.pop("answer", None)
        return Task(logged.trace.id, opening(logged), answer, columns)
    found = next((tasks[text] for text in questions(logged) if text in tasks), None)
    if found is None:
        return None
    return Task(found.id, opening(logged), found.answer, {**columns, **found.metadata})


def _rollout(logged: Logged, task: Task) -> Rollout:
    """The trace as if the student had said it: text, without a ledger."""
    return Rollout(
        id=logged.trace.id,
        group_id=prompt_of(logged),
        task=task,
        messages=list(logged.trace.messages),
        stop_reason="answered",
    )


async def _score(rollouts: Iterable[Rollout], config: TrainingConfig) -> None:
    """Fill in the rewards, in place. Traces of one prompt are a group."""
    groups: dict[str | None, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group_id, []).append(rollout)
    gate = asyncio.Semaphore(_GROUPS_AT_ONCE)
    sandbox = build_sandbox(config)
    try:
        calculator = build_calculator(config.reward_setup, sandbox)

        async def score(group: list[Rollout]) -> None:
            async with gate:
                await calculator.score(group)

        try:
            await asyncio.gather(*(score(group) for group in groups.values()))
        finally:
            await calculator.close()
    finally:
        await sandbox.close()


@dataclass(frozen=True)
class _Fit:
    """What it takes to know how long a trace is."""

    renderer: Renderer
    tools: Sequence[ToolSchema]
    limit: int
    describes: bool
    """The environment tells the student of its tools."""

    @classmethod
    def of(cls, config: TrainingConfig, context: RunContext) -> _Fit:
        environment = config.environment
        listed = environment.tool_list() if isinstance(environment, ToolEnvironmentConfig) else []
        schemas = tool_schemas(listed, context.sandbox)
        return cls(
            build_renderer(config, context.policy),
            schemas,
            context.engine.context_limit,
            describes_tools(config),
        )

    def those_that_fit(self, kept: Sequence[Logged], report: Report) -> list[Logged]:
        """Every trace is rendered, so that none stops the training later."""
        fitting = []
        for found in kept:
            logged = self._described(found)
            try:
                samples = trace_samples(logged.trace, self.renderer, self.tools)
            except UserError as error:
                report.drop("unwritable", logged.trace.place, error.cause)
                continue
            size = max(map(len, samples), default=0)
            if size > self.limit:
                detail = f"{size} tokens, the limit is {self.limit}"
                report.drop("too_long", logged.trace.place, detail)
            else:
                fitting.append(logged)
        return fitting

    def _described(self, logged: Logged) -> Logged:
        """A trace with the words about its tools that a rollout will begin with."""
        form, trace = self.renderer.tool_format, logged.trace
        tools = trace.tools or self.tools
        about = form.describe(tools) if form is not None and tools and self.describes else ""
        if not about:
            return logged
        return replace(
            logged, trace=replace(trace, messages=tuple(with_system(trace.messages, about)))
        )


def _files(name: str) -> tuple[str, str]:
    """Of the report and of the traces, in the run directory."""
    prefix = "" if name == "distill" else f"{name}_"
    return f"{prefix}distill_report.json", f"{prefix}traces.jsonl"


def _announce(name: str, selection: _Selection, context: RunContext) -> None:
    """Write down and show what was kept, before the first step."""
    report, traces = _files(name)
    context.run.write_text(report, selection.report.to_json())
    lines = []
    for logged in selection.kept:
        row: dict[str, object] = {"messages": messages_to_dicts(logged.trace.messages)}
        if logged.trace.tools:
            row["tools"] = [dict(tool) for tool in logged.trace.tools]
        lines.append(json.dumps(row) + "\n")
    context.run.write_text(traces, "".join(lines))
    for line in selection.report.lines():
        context.progress.line(line)
    context.progress.line(f"written: {report}, {traces}")


def _kept_before(name: str, context: RunContext) -> list[Trace] | None:
    """What a stage that is under way trains on."""
    saved = context.resumed
    if saved is None or saved.state.stage != name:
        return None
    path = saved.path.parent.parent / _files(name)[1]
    return load_traces(path) if path.is_file() else None
