"""What is remembered of a rollout from one loss to the next: its samples and their old columns."""

from __future__ import annotations

import copy
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from retrain.rendering import Renderer, ToolSchema
from retrain.rollout import to_samples
from retrain.types import Message, Rollout, Sample, Segment, Source, UserError


@dataclass(frozen=True)
class Remembered:
    """A rollout's segments as they train, and its samples.

    The samples keep what must not change between the epochs of one iteration: the learner's
    log-probabilities and values at the first loss, and the reference's log-probabilities.
    """

    reference: weakref.ref[Rollout]
    messages: list[Message]
    tokens: int
    """In the rollout's own ledger."""
    segments: list[Segment]
    samples: list[Sample]


class RolloutMemory:
    """Remembers rollouts for as long as they exist and do not change.

    A rollout that an engine sampled from trains its sampled tokens. One without a sampled token
    is rendered, on a copy, and the words of its MODEL messages train; the engine's
    log-probabilities of those are NaN.

    Args:
        context_limit: most tokens that the model takes; None where it names no limit.
    """

    def __init__(
        self, renderer: Renderer, tools: Sequence[ToolSchema], context_limit: int | None
    ) -> None:
        self._renderer = renderer
        self._tools = tools
        self._context_limit = context_limit
        self._entries: dict[int, Remembered] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def forget(self) -> None:
        self._entries.clear()

    def look_up(self, rollout: Rollout) -> Remembered:
        """What is remembered of a rollout; made on first sight and after it has changed.

        Raises:
            UserError: it has no MODEL message, or is longer than the context.
        """
        known = self._entries.get(id(rollout))
        if known is not None and known.reference() is rollout and _is_unchanged(known, rollout):
            return known
        return self._remember(rollout)

    def _remember(self, rollout: Rollout) -> Remembered:
        if not rollout.model_messages:
            raise UserError(
                f"rollout {rollout.id} has no MODEL message, so nothing of it can train",
                "Add what rollout_generate_response returned: rollout.add_messages(message).",
            )
        segments, samples = self._train_columns(rollout)
        longest = max((len(sample) for sample in samples), default=0)
        if self._context_limit is not None and longest > self._context_limit:
            raise UserError(
                f"rollout {rollout.id} has {longest} tokens; the model takes {self._context_limit}",
                "Shorten it, or leave it out.",
            )
        key, entries = id(rollout), self._entries

        def drop(gone: weakref.ref[Rollout]) -> None:
            entry = entries.get(key)
            if entry is not None and entry.reference is gone:
                del entries[key]

        self._entries[key] = Remembered(
            weakref.ref(rollout, drop), list(rollout.messages), _tokens(rollout), segments, samples
        )
        return self._entries[key]

    def _train_columns(self, rollout: Rollout) -> tuple[list[Segment], list[Sample]]:
        if any(Source.SAMPLED in segment.source for segment in rollout.segments):
            return list(rollout.segments), to_samples(rollout)
        view = replace(
            rollout,
            messages=list(rollout.messages),
            segments=copy.deepcopy(rollout.segments),
        )
        self._renderer.enter(view, self._tools, close=False)
        samples = to_samples(view, "cross_entropy")
        for sample in samples:
            sample.objective = "policy"
            sample.behavior_logprobs = array("f", [float("nan")]) * len(sample)
        return view.segments, samples


def _is_unchanged(known: Remembered, rollout: Rollout) -> bool:
    return known.tokens == _tokens(rollout) and known.messages == rollout.messages


def _tokens(rollout: Rollout) -> int:
    return sum(len(segment.token_ids) for segment in rollout.segments)
