"""Supervised fine-tuning on traces: loss on the policy's own tokens only."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import TYPE_CHECKING, Any

from retrain.config.environment import ToolEnvironmentConfig
from retrain.config.external import ExternalConfig
from retrain.config.imitation import Imitation, TraceData
from retrain.config.root import TrainingConfig, evaluates
from retrain.data import Cursor, Trace, TraceReader, Traces, TraceSource, TraceStream
from retrain.data.buffer import DEFAULT_BUFFER
from retrain.learner import NotFiniteError, TorchLearner, sft_loss
from retrain.learner.objectives import Objective
from retrain.loops.build import build_learner
from retrain.loops.checkpoint import RunState, Training
from retrain.loops.context import RunContext
from retrain.loops.evaluate import EvalStage
from retrain.loops.validation import Validation, hold_out
from retrain.loops.worker import Worker
from retrain.loops.world import build_renderer, tool_schemas
from retrain.rendering import Renderer, ToolSchema
from retrain.rollout import to_samples
from retrain.types import Rollout, Sample, UserError

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SFTStage:
    """
    Args:
        objective: the loss of each token.
        attach: fills in, of a batch's samples, what the objective looks at.
        announce: called before the first step; writes down what only a run directory can take.
        let_go: called at the end, of what `attach` holds.
    """

    name: str
    config: TrainingConfig
    settings: Imitation
    traces: Traces
    renderer: Renderer
    steps: int
    tools: Sequence[ToolSchema]
    objective: Objective = sft_loss
    attach: Callable[[Sequence[Sample]], Coroutine[Any, Any, None]] | None = None
    validation: Validation | None = None
    evaluation: EvalStage | None = None
    announce: Callable[[RunContext], None] | None = None
    let_go: Callable[[], Coroutine[Any, Any, None]] | None = None

    @classmethod
    def prepare(cls, name: str, config: TrainingConfig, context: RunContext) -> SFTStage:
        """Read and check everything that the stage needs.

        Raises:
            UserError: bad data, or no trace that fits the context.
        """
        assert config.sft is not None
        return cls.of(name, config, context, config.sft, read_traces(config, config.sft))

    @classmethod
    def of(
        cls,
        name: str,
        config: TrainingConfig,
        context: RunContext,
        settings: Imitation,
        traces: Sequence[Trace] | Traces,
        *,
        objective: Objective = sft_loss,
        attach: Callable[[Sequence[Sample]], Coroutine[Any, Any, None]] | None = None,
    ) -> SFTStage:
        """A stage on traces that were read already, or that are read as they are needed; those in
        memory are shuffled and held out as `settings` say.

        Raises:
            UserError: no trace fits the context, they do not fit the environment, or there is no
                saying how many steps they make.
        """
        renderer = build_renderer(config, context.policy)
        environment = config.environment
        listed = environment.tool_list() if isinstance(environment, ToolEnvironmentConfig) else []
        tools = tool_schemas(listed, context.sandbox)
        limit = context.engine.context_limit
        train, held_out = hold_out(settings, traces)
        if isinstance(train, Sequence):
            train = TraceSource(train, shuffle=settings.shuffle, seed=config.seed)
        size = length_hint(train, -1)
        steps = steps_of(settings, None if size < 0 else size)
        known = train.preview()
        check_calls([*known, *held_out], config)
        _check_fit(known, renderer, tools, limit, whole=size >= 0)
        scored = _samples(held_out, renderer, tools, limit)
        if held_out and not scored:
            raise UserError(
                f"no held-out trace fits the context of {limit} tokens", "Shorten them."
            )
        during = EvalStage.prepare(f"{name}-eval", config, context) if evaluates(config) else None
        return cls(
            name=name,
            config=config,
            settings=settings,
            traces=train,
            renderer=renderer,
            steps=steps,
            tools=tools,
            objective=objective,
            attach=attach,
            validation=Validation(scored, settings.validation_every_steps) if scored else None,
            evaluation=during,
        )

    async def execute(self, context: RunContext) -> None:
        if self.announce is not None:
            self.announce(context)
        thread = Worker()
        try:
            await self._train(context, thread)
        finally:
            thread.close()

    async def _train(self, context: RunContext, thread: Worker) -> None:
        learner = build_learner(self.settings, context.policy, total_updates=self.steps)
        traces = Cursor(self.traces, place="sft.dataset", noun="trace")
        batches = self._batches(traces, context.engine.context_limit)
        state = self._resume(context, traces, learner)
        context.progress.stage(self.name, total=self.steps, kind="sft", done=state.step)
        if state.step == 0 or not state.evaluated:
            with context.saved_on_failure(self.config, state, Training(learner)):
                await self._measure(state.step, context, learner, thread)
        if not state.evaluated or state.step == self.steps:
            self._save(self._stand(state.step, context, traces, learner), context, learner)
        for step in range(state.step + 1, self.steps + 1):
            started = time.perf_counter()
            with context.saved_on_failure(self.config, state, Training(learner)):
                context.stop.check()
                samples = next(batches)
                if self.attach is not None:
                    await context.stop.watch(self.attach(samples))
            update = functools.partial(_update, learner, samples, self.objective)
            try:
                totals, metrics = await thread.run(update)
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
            before = replace(state, finished=False, evaluated=False)
            with context.saved_on_failure(self.config, before, Training(learner)):
                await self._measure(step, context, learner, thread)
            state = self._stand(step, context, traces, learner)
            await thread.run(functools.partial(self._save, state, context, learner))

    async def _measure(
        self, step: int, context: RunContext, learner: TorchLearner, thread: Worker
    ) -> None:
        """What is due after a step: the loss of held-out traces, and rollouts of the policy."""
        validation, evaluation = self.validation, self.evaluation
        if validation is not None and validation.is_due(step, self.steps):
            metrics = await thread.run(functools.partial(validation.score, learner))
            context.note(f"{self.name}-validation", step, metrics)
            loss = metrics["validation/loss"]
            context.progress.line(f"{self.name}, step {step}: validation loss {loss:.3f}")
        every = None if evaluation is None else evaluation.settings.every_steps
        if evaluation is not None and every is not None and step > 0 and step % every == 0:
            await context.stop.watch(
                evaluation.evaluate(context, evaluation.name, step=step, report=False)
            )

    def _save(self, state: RunState, context: RunContext, learner: TorchLearner) -> None:
        every = self.config.checkpoint.every_steps
        if state.finished or (every is not None and state.step % every == 0):
            context.save_checkpoint(self.config, state, Training(learner))

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
        if self.let_go is not None:
            await self.let_go()
        if self.evaluation is not None:
            await self.evaluation.close()

    def _batches(self, traces: Cursor[Trace], limit: int) -> Iterator[list[Sample]]:
        """
        Raises:
            UserError: a trace that is read only now is at fault, or none of an epoch fits.
        """
        batch: list[Sample] = []
        taken, latest = 0, traces.position()["epoch"]
        for epoch, trace in traces:
            check_calls([trace], self.config)
            samples = _samples([trace], self.renderer, self.tools, limit)
            if not samples:
                if epoch > latest + 1:
                    raise UserError(
                        f"no trace of epoch {epoch - 1} fits the context of {limit} tokens",
                        "Shorten the traces, or raise engine.context_limit if the model allows it.",
                    )
                continue
            latest = epoch
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
    try:
        renderer.enter(rollout, trace.tools or tools, close=False)
    except UserError as error:
        raise UserError(f"{trace.place or trace.id}: {error.cause}", error.next_step) from error
    return to_samples(rollout, "cross_entropy")


def _samples(
    traces: Iterable[Trace], renderer: Renderer, tools: Sequence[ToolSchema], limit: int
) -> list[Sample]:
    """Those of traces that fit the context."""
    samples = (s for trace in traces for s in trace_samples(trace, renderer, tools))
    return [sample for sample in samples if len(sample) <= limit]


def _check_fit(
    traces: Sequence[Trace],
    renderer: Renderer,
    tools: Sequence[ToolSchema],
    limit: int,
    *,
    whole: bool,
) -> None:
    """Warn of traces that are too long, which are left out; refuse when the shortest of the whole
    is."""
    by_size = sorted(traces, key=_characters)
    shortest = max(map(len, trace_samples(by_size[0], renderer, tools)), default=0)
    if whole and shortest > limit:
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


def read_traces(config: TrainingConfig, settings: TraceData) -> list[Trace] | TraceStream:
    """What a stage trains on: all of it, or a stream of which the first rows are checked.

    Raises:
        UserError: bad data, or traces that call tools where there are none.
    """
    reader = TraceReader(
        settings.dataset,
        messages=settings.messages_column,
        prompt=settings.prompt_column,
        completion=settings.completion_column,
        system_prompt=settings.system_prompt,
        params=settings.params,
    )
    if not settings.streaming:
        traces = list(reader.read())
        check_calls(traces, config)
        return traces
    reader.check_streams()
    buffer = (settings.shuffle_buffer or DEFAULT_BUFFER) if settings.shuffle else None
    stream = TraceStream(reader, shuffle_buffer=buffer, seed=config.seed)
    check_calls(stream.preview(), config)
    return stream


def steps_of(settings: Imitation, traces: int | None) -> int:
    """How many updates a stage makes of so many traces; None: nobody knows how many.

    Raises:
        UserError: a warm-up would take all of them, or they have no end.
    """
    if settings.steps is not None:
        return settings.steps
    if traces is None:
        raise UserError(
            "the traces are read as they are needed, so nobody knows when an epoch ends",
            "Set steps.",
        )
    steps = max(1, settings.epochs * traces // settings.batch_size)
    if settings.warmup_steps >= steps:
        raise UserError(
            f"warmup_steps is {settings.warmup_steps}, but {settings.epochs} x {traces} "
            f"traces in batches of {settings.batch_size} make {steps} steps: none would have the "
            "learning_rate given",
            "Lower warmup_steps, or train for more epochs.",
        )
    return steps


def check_calls(traces: Iterable[Trace], config: TrainingConfig) -> None:
    """Refuse traces that call tools where nothing says how a call is written.

    Raises:
        UserError: names the first such trace.
    """
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig) and environment.tools:
        return
    if isinstance(environment, ExternalConfig) and environment.tool_format is not None:
        return
    for trace in traces:
        if any(message.tool_calls for message in trace.messages):
            raise UserError(
                f"{trace.place or trace.id}: it calls tools, but the environment has none",
                "Set environment.type: smolagent, list its tools, and choose a tool_format; or the "
                "tool_format of environment.type: external.",
            )


def _update(
    learner: TorchLearner, samples: Sequence[Sample], objective: Objective
) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step; totals over the batch, and what the step reports."""
    totals = learner.forward_backward(samples, objective)
    return totals, learner.optim_step(samples)
