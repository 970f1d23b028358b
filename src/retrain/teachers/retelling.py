"""A rollout told in the tokens of a teacher that has another tokenizer than the student."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from retrain.rendering import Renderer
from retrain.rendering.ledger import same_words
from retrain.rendering.templates import ToolSchema
from retrain.teachers.base import Teacher
from retrain.teachers.spans import Cut, align, shared_out
from retrain.teachers.tokenizers import TokenBytes
from retrain.types import NO_VERSION, FinishReason, Rollout, Turn


@dataclass(frozen=True)
class Sampled:
    """What the student sampled for one message; columns [T]."""

    token_ids: array[int]
    logprobs: array[float]
    finish_reason: FinishReason
    ended: bool
    """Whether the last token ends the turn."""


@dataclass(frozen=True)
class Heard:
    """What a teacher says of one message, in the student's tokens [T]; NaN where nothing."""

    logprobs: array[float]
    spans: int


class Retelling:
    """A teacher's log-probabilities of what the student said, span by span; see `spans`.

    The conversation is written by the teacher's own chat template, with the same tool format. Each
    message that the student sampled stands there word for word, in the tokens that the teacher's
    tokenizer makes of it, as if the teacher had sampled it. The student's end-of-turn token is the
    teacher's own one, a span of its own.

    Of a message, the tokens from the first byte on that the teacher's tokens do not reproduce (it
    is no UTF-8, or the tokenizer normalises it) get nothing, and so do messages whose context, as
    the student saw it, is not the conversation before them.

    Args:
        student: renders what the student sees.
    """

    def __init__(self, teacher: Teacher, renderer: Renderer, student: Renderer, name: str) -> None:
        self._teacher = teacher
        self._renderer = renderer
        # One of its own: it is used in a thread.
        self._student = Renderer(student.codec, student.template, student.tool_format)
        self._bytes = TokenBytes(renderer.codec.tokenizer, name)
        self._student_bytes = TokenBytes(student.codec.tokenizer, "the student")
        self._rendering = asyncio.Lock()

    async def hear(
        self,
        rollout: Rollout,
        messages: Collection[int],
        tools: Sequence[ToolSchema],
        temperature: float,
    ) -> dict[int, Heard]:
        """By message, of those given; a message is left out where there is nothing to say.

        Raises:
            InfrastructureError: the teacher failed.
            UserError: the teacher's template refuses the conversation.
        """
        async with self._rendering:
            told, sampled = await asyncio.to_thread(self._tell, rollout, messages, tools)
        heard: dict[int, Heard] = {}
        for index, segment in enumerate(told.segments):
            spans = [span for span in segment.turns if span.message in sampled]
            if not spans:
                continue
            ids = told.full_token_ids(index)[: self._teacher.context_limit]
            start = segment.prefix_len + spans[0].start
            scored = await self._teacher.score(ids, temperature, start=max(start, 1))
            for span in spans:
                own = slice(segment.prefix_len + span.start, segment.prefix_len + span.end)
                heard[span.message] = self._compare(sampled[span.message], ids[own], scored[own])
        return heard

    def _tell(
        self, rollout: Rollout, messages: Collection[int], tools: Sequence[ToolSchema]
    ) -> tuple[Rollout, dict[int, Sampled]]:
        """The rollout in the teacher's tokens, and which of its messages are to be compared."""
        sampled = sampled_messages(rollout, self._student.codec.stop_token_ids)
        told = Rollout()
        for index, message in enumerate(rollout.messages):
            turn = None
            if index in sampled:
                turn = self._turn(told, sampled[index], tools)
            told.add_messages(replace(message, turn=turn))
        misplaced = self._misplaced(rollout, tools)
        wanted = {i: s for i, s in sampled.items() if i in messages and i not in misplaced}
        return told, wanted

    def _turn(self, told: Rollout, said: Sampled, tools: Sequence[ToolSchema]) -> Turn:
        """A message of the student's as the teacher would have sampled it."""
        words = said.token_ids[:-1] if said.ended else said.token_ids
        text = b"".join(self._student_bytes.of(words)).decode(errors="replace")
        ids = array("i", self._renderer.codec.encode_after(text))
        if said.ended:
            ids.extend(self._renderer.end_token)
        return Turn(
            self._renderer.prompt(told, tools),
            ids,
            array("f", bytes(4 * len(ids))),
            array("i", [NO_VERSION]) * len(ids),
            said.finish_reason,
        )

    def _misplaced(self, rollout: Rollout, tools: Sequence[ToolSchema]) -> set[int]:
        """Messages of segments that did not begin with the conversation before them."""
        found: set[int] = set()
        codec = self._student.codec
        for index, segment in enumerate(rollout.segments):
            if not segment.turns:
                continue
            first = segment.turns[0]
            shown = rollout.full_token_ids(index)[: segment.prefix_len + first.start]
            before = Rollout(messages=rollout.messages[: first.message])
            rendered = self._student.prompt(before, tools).token_ids
            if not same_words(codec.decode(shown), codec.decode(rendered)):
                found |= {span.message for span in segment.turns}
        return found

    def _compare(self, said: Sampled, ids: Sequence[int], scored: Sequence[float]) -> Heard:
        """
        Args:
            ids: of the message in the teacher's tokens, as far as its context goes [M].
            scored: their log-probabilities [M].
        """
        count = len(said.token_ids) - int(said.ended)
        own = self._student_bytes.of(said.token_ids[:count])
        end = self._renderer.end_token
        ends = said.ended and bool(end) and list(ids[-1:]) == end
        others = self._bytes.of(ids[: len(ids) - int(ends)])
        cuts = align(own, others)
        if ends and b"".join(own) == b"".join(others):
            cuts.append(Cut(count, count + 1, len(others), len(others) + 1))
        return Heard(shared_out(cuts, said.logprobs, scored), len(cuts))


def sampled_messages(rollout: Rollout, stop_token_ids: Collection[int]) -> Mapping[int, Sampled]:
    """What an engine sampled, by message."""
    found: dict[int, Sampled] = {}
    for segment in rollout.segments:
        for span in segment.turns:
            if span.finish_reason is None:
                continue
            ids = segment.token_ids[span.start : span.end]
            ended = bool(ids) and ids[-1] in stop_token_ids
            logprobs = segment.logprobs[span.start : span.end]
            found[span.message] = Sampled(ids, logprobs, span.finish_reason, ended)
    return found
