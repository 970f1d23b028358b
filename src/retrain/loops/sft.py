"""Supervised fine-tuning on traces: loss on the policy's own tokens only."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.config.environment import ToolEnvironmentConfig
from retrain.config.root import TrainingConfig
from retrain.config.stages import SFTConfig
from retrain.data import Cursor, Trace, TraceSource, load_traces
from retrain.learner import NotFiniteError, TorchLearner, sft_loss
from retrain.loops.build import build_learner
from retrain.loops.checkpoint import RunState, Training
from retrain.loops.context import RunContext
from retrain.loops.worker import Worker
from retrain.loops.world import build_renderer, tool_schemas
from retrain.rendering import Renderer, ToolSchema
from retrain.rollout import to_samples
from retrain.types import Rollout, Sample, UserError

if TYPE_CHECKING:
    from retrain.loops.run import RunResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTStage:
    name: str
    config: TrainingConfig
    settings: SFTConfig
    traces: Sequence[Trace]
    renderer: Renderer
    steps: int
    tools: Sequence[ToolSchema]

    @classmethod
    def prepare(cls, name: str, config: TrainingConfig, context: RunContext) -> SFTStage:
        """Read and check everything that the stage needs.

        Raises:
            UserError: bad data, or no trace that fits the context.
        """
        settings = config.sft
        assert settings is not None
        renderer = build_renderer(config, context.policy)
        environment = config.environment
        listed = environment.tool_list() if isinstance(environment, ToolEnvironmentConfig) else []
        tools = tool_schemas(listed, context.sandbox)
        traces, steps = traces_and_steps(config, settings)
        _check_fit(traces, renderer, tools, context.engine.context_limit)
        return cls(name, config, settings, traces, renderer, steps, tools)

    async def execute(self, context: RunContext) -> None:
        thread = Worker()
        try:
            await self._train(context, thread)
        finally:
            thread.close()

    async def _train(self, context: RunContext, thread: Worker) -> None:
        learner = build_learner(self.settings, context.policy, total_updates=self.steps)
        order = TraceSource(self.traces, shuffle=self.settings.shuffle, seed=self.config.seed)
        traces = Cursor(order, place="sft.dataset", noun="trace")
        batches = self._batches(traces, context.engine.context_limit)
        every = self.config.checkpoint.every_steps
        state = self._resume(context, traces, learner)
        context.progress.stage(self.name, total=self.steps, kind="sft", done=state.step)
        if state.step == self.steps:
            context.save_checkpoint(
                self.config, self._stand(state.step, context, traces, learner), Training(learner)
            )
        for step in range(state.step + 1, self.steps + 1):
            started = time.perf_counter()
            with context.saved_on_failure(self.config, state, Training(learner)):
                context.stop.check()
                samples = next(batches)
            try:
                totals, metrics = await thread.run(functools.partial(_update, learner, samples))
            except NotFiniteError as error:
                raise context.write_down(error, self.name, step) from error
            context.weights_changed()
            seconds = time.perf_counter() - started
            metrics["loss"] = totals["loss"]
            metrics["tokens"] = totals["tokens"]
            metrics["entropy"] = totals["entropy"] / max(totals["tokens"], 1.0)
            metrics["tokens_per_s"] = sum(map(len, samples)) / seconds
            context.log(self.name, step, metrics)
            state = self._stand(step, context, traces, learner)
            if state.finished or (every is not None and step % every == 0):
                save = functools.partial(context.save_checkpoint, self.config, state)
                await thread.run(functools.partial(save, Training(learner)))

    def _resume(
        self, context: RunContext, traces: Cursor[Trace], learner: TorchLearner
    ) -> RunState:
        """Put everything to where the stage was left, if it was; where it stands now."""
        saved = context.take_resumed(self.name)
        if saved is None:
            return self._stand(0, context, traces, learner)
        saved.check_steps(self.steps)
        traces.restore(saved.state.position)
        Training(learner).restore(saved)
        saved.state.put_generators()
        return saved.state

    def _stand(
        self, step: int, context: RunContext, traces: Cursor[Trace], learner: TorchLearner
    ) -> RunState:
        """Where the stage stands after `step` steps."""
        return context.stand(
            RunState(
                stage=self.name,
                step=step,
                finished=step == self.steps,
                version=context.version,
                position=traces.position(),
                updates=learner.updates,
            )
        )

    async def close(self) -> None:
        return None

    def _batches(self, traces: Cursor[Trace], limit: int) -> Iterator[list[Sample]]:
        batch: list[Sample] = []
        taken = 0
        for _, trace in traces:
            samples = [
                s for s in trace_samples(trace, self.renderer, self.tools) if len(s) <= limit
            ]
            if not samples:
                continue
            batch += samples
            taken += 1
            if taken == self.settings.batch_size:
                yield batch
                batch, taken = [], 0


def trace_samples(
    trace: Trace, renderer: Renderer, tools: Sequence[ToolSchema] = ()
) -> list[Sample]:
    """A trace through the renderer and the ledger, as any rollout goes; its targets train."""
    rollout = Rollout(id=trace.id)
    rollout.add_messages(*trace.messages)
    renderer.enter(rollout, trace.tools or tools, close=False)
    return to_samples(rollout, "cross_entropy")


def _check_fit(
    traces: Sequence[Trace], renderer: Renderer, tools: Sequence[ToolSchema], limit: int
) -> None:
    """Warn of traces that are too long, which are left out; refuse when the shortest is."""
    by_size = sorted(traces, key=_characters)
    shortest = max(map(len, trace_samples(by_size[0], renderer, tools)), default=0)
    if shortest > limit:
        raise UserError(
            f"no trace fits the context: the shortest has {shortest} tokens, the limit is {limit}",
            "Shorten the traces, or raise engine.context_limit if the model allows it.",
        )
    longest = max(map(len, trace_samples(by_size[-1], renderer, tools)), default=0)
    if longest > limit:
        logger.warning("sequences over the context limit of %d tokens are left out", limit)


def _characters(trace: Trace) -> int:
    return sum(
        len(m.content) + len(m.reasoning or "") + sum(len(str(c.arguments)) for c in m.tool_calls)
        for m in trace.messages
    )


def traces_and_steps(config: TrainingConfig, settings: SFTConfig) -> tuple[list[Trace], int]:
    """What an SFT stage trains on, and how many steps it takes.

    Raises:
        UserError: bad data, traces that call tools where there are none, or a warm-up that takes
            all the steps.
    """
    traces = load_traces(settings.dataset, params=settings.params)
    check_calls(traces, config)
    steps = settings.steps or max(1, settings.epochs * len(traces) // settings.batch_size)
    if settings.warmup_steps >= steps:
        raise UserError(
            f"sft.warmup_steps is {settings.warmup_steps}, but {settings.epochs} x {len(traces)} "
            f"traces in batches of {settings.batch_size} make {steps} steps: none would have the "
            "learning_rate given",
            "Lower warmup_steps, or train for more epochs.",
        )
    return traces, steps


def check_calls(traces: Sequence[Trace], config: TrainingConfig) -> None:
    """Refuse traces that call tools where nothing says how a call is written.

    Raises:
        UserError: names the first such trace.
    """
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig) and environment.tools:
        return
    for trace in traces:
        if any(message.tool_calls for message in trace.messages):
            raise UserError(
                f"{trace.place or trace.id}: it calls tools, but the environment has none",
                "Set environment.type: smolagent, list its tools, and choose a tool_format.",
            )


def _update(
    learner: TorchLearner, samples: Sequence[Sample]
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step; totals over the batch, and what the step reports."""
    totals = learner.forward_backward(samples, sft_loss)
    return totals, learner.optim_step(samples)


class SFTTrainer:
    """Fine-tune on a dataset of traces, as `retrain sft` does.

    `SFTTrainer(config).train("traces.jsonl")` returns the run's result; `config` is a dict or a
    `TrainingConfig` whose `sft` section may leave out `dataset`.
    """

    def __init__(self, config: Mapping[str, Any] | TrainingConfig) -> None:
        self._config = config

    def train(self, dataset: str | Path | None = None) -> RunResult:
        """Train on `dataset`, or on the config's own.

        Raises:
            UserError: a config or data that does not check.
        """
        from retrain.loops.run import run_sync

        data = (
            self._config.model_dump(mode="json")
            if isinstance(self._config, TrainingConfig)
            else dict(self._config)
        )
        if dataset is not None:
            data["sft"] = {**(data.get("sft") or {}), "dataset": str(dataset)}
        return run_sync(data, only="sft")
