"""The loss of traces that do not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrain.config.imitation import Imitation, TraceData
from retrain.data import Trace, Traces, load_traces
from retrain.data.selection import in_test_part
from retrain.data.traces import prompt_key
from retrain.learner import TorchLearner
from retrain.types import Sample, UserError


@dataclass(frozen=True)
class Validation:
    """
    Args:
        every_steps: None scores before the first step and after the last one only.
    """

    samples: Sequence[Sample]
    every_steps: int | None

    def is_due(self, step: int, steps: int) -> bool:
        """Whether it is after step `step` of `steps`."""
        every = self.every_steps
        return step in (0, steps) or (every is not None and step % every == 0)

    def score(self, learner: TorchLearner) -> dict[str, float]:
        """`validation/loss`: the mean negative log-likelihood of the model's tokens, in nats."""
        learner.attach_old_logprobs(self.samples)
        total = sum(sum(sample.old_logprobs or ()) for sample in self.samples)
        tokens = sum(sum(sample.loss_mask) for sample in self.samples)
        return {"validation/loss": -total / tokens}


def hold_out(
    settings: Imitation, traces: Sequence[Trace] | Traces
) -> tuple[Sequence[Trace] | Traces, list[Trace]]:
    """The traces that train, and those that are scored.

    Raises:
        UserError: bad data, a share of a stream, or a part without a trace.
    """
    if settings.validation is not None:
        return traces, _load(settings.validation, settings)
    if settings.holdout is None:
        return traces, []
    if not isinstance(traces, Sequence):
        raise UserError(
            "holdout: the traces are read as they are needed, so no share of them is known",
            "Name traces of their own under validation.",
        )
    parts: tuple[list[Trace], list[Trace]] = ([], [])
    for trace in traces:
        parts[in_test_part(prompt_key(trace), fraction=settings.holdout, seed=0)].append(trace)
    train, held_out = parts
    if not train or not held_out:
        missing = "score" if train else "train on"
        raise UserError(
            f"holdout {settings.holdout:g} of {len(traces)} traces leaves none to {missing}",
            "Traces of one prompt stay together; name traces of their own under validation.",
        )
    return train, held_out


def _load(path: str, settings: Imitation) -> list[Trace]:
    if not isinstance(settings, TraceData):
        return load_traces(path)
    return load_traces(
        path,
        messages=settings.messages_column,
        prompt=settings.prompt_column,
        completion=settings.completion_column,
        system_prompt=settings.system_prompt,
    )
