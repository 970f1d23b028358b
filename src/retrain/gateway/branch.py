"""One line of a conversation: what was heard, and the ledger of what the policy saw of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retrain.gateway.ask import Reply
from retrain.rendering.ledger import common_prefix, prompt_token_ids
from retrain.types import Message, Prompt, Rollout, Segment, Span, ToolCall, Turn


@dataclass(eq=False)
class Answer:
    """One MODEL message that the branch's own caller was given, or was to be."""

    context: tuple[Message, ...]
    """What the conversation gained since the branch's last answer."""
    message: Message
    reply: Reply
    asked: tuple[Any, ...]
    """What its request asked for besides the messages."""
    delivered: bool = True

    @property
    def turn(self) -> Turn:
        assert self.message.turn is not None
        return self.message.turn


@dataclass(frozen=True)
class Heard:
    """A message of the conversation, as its caller counts them."""

    upto: int
    """Messages of the view, with this one."""
    answer: Answer | None = None
    """Set where the policy said it."""


@dataclass(frozen=True)
class Mark:
    """How far a branch had got."""

    heard: int
    messages: int
    segments: int
    tokens: int
    turns: int
    calls: dict[str, ToolCall]
    described: int | None


@dataclass(eq=False)
class Branch:
    """`view` is what the policy sees: a rollout of its own until all branches are put together."""

    view: Rollout
    origin: Branch | None = None
    """The one that it shares its beginning with, if there is one."""
    heard: list[Heard] = field(default_factory=list)
    calls: dict[str, ToolCall] = field(default_factory=dict)
    """By the id that the caller knows."""
    answers: list[Answer] = field(default_factory=list)
    """Own ones: those before a fork are the parent's."""
    described: int | None = None
    """Which message of the view says what tools there are."""

    def mark(self) -> Mark:
        last = self.view.segments[-1] if self.view.segments else None
        return Mark(
            len(self.heard),
            len(self.view.messages),
            len(self.view.segments),
            0 if last is None else len(last.token_ids),
            0 if last is None else len(last.turns),
            dict(self.calls),
            self.described,
        )

    def rewind(self, mark: Mark) -> None:
        """Forget what a request has added that came to nothing."""
        view = self.view
        del self.heard[mark.heard :], view.messages[mark.messages :], view.segments[mark.segments :]
        if view.segments:
            last = view.segments[-1]
            for column in (last.token_ids, last.source, last.logprobs, last.versions):
                del column[mark.tokens :]
            del last.turns[mark.turns :]
        self.calls, self.described = mark.calls, mark.described

    def forked(self, count: int) -> Branch | None:
        """A branch that goes on from the last answer among the first `count` messages, its tokens
        as they were sampled; None where there is no answer among them."""
        while count and self.heard[count - 1].answer is None:
            count -= 1
        if count == 0:
            return None
        upto = self.heard[count - 1].upto
        view = replace(
            self.view,
            messages=self.view.messages[:upto],
            segments=[_until(self.view, upto - 1)],
            env_rewards=[],
            metrics={},
        )
        told = self.described is not None and self.described < upto
        return Branch(
            view,
            self,
            self.heard[:count],
            dict(self.calls),
            described=self.described if told else None,
        )


def _until(view: Rollout, message: int) -> Segment:
    """The sequence up to the end of a MODEL message, as one segment without a parent."""
    for index in range(len(view.segments) - 1, -1, -1):
        segment = view.segments[index]
        ends = [span.end for span in segment.turns if span.message == message]
        if ends:
            return _prefix(view, index, segment.prefix_len + ends[-1])
    raise ValueError(f"message {message} is in no segment")


def _prefix(view: Rollout, index: int, length: int) -> Segment:
    pieces: list[tuple[Segment, int]] = []
    at: int | None = index
    while at is not None:
        segment = view.segments[at]
        pieces.append((segment, length - segment.prefix_len))
        at, length = segment.parent, min(length, segment.prefix_len)
    whole = Segment()
    for segment, reach in reversed(pieces):
        offset, own = len(whole.token_ids), max(0, reach)
        whole.append(
            segment.token_ids[:own],
            segment.source[:own],
            segment.logprobs[:own],
            segment.versions[:own],
        )
        for span in segment.turns:
            if span.end <= own:
                whole.turns.append(
                    Span(span.message, offset + span.start, offset + span.end, span.finish_reason)
                )
    return whole


def enter(branches: Sequence[Branch], rollout: Rollout) -> None:
    """Put every branch into a rollout, one after the other; where one begins, it forks off the
    segment of its origin that it shares most with. Answers that nobody got are left out."""
    held: dict[int, list[int]] = {}
    for branch in branches:
        own = held.setdefault(id(branch), [])
        for answer in branch.answers:
            if not answer.delivered:
                continue
            rollout.add_messages(*answer.context)
            turn = answer.turn
            if own:
                prompt = replace(turn.prompt, parent=own[-1])
            else:
                prompt = _placed(turn.prompt, branch, rollout, held)
            moved = replace(turn, prompt=prompt, rollout=rollout.id, place=None)
            rollout.add_messages(replace(answer.message, turn=moved))
            own.append(len(rollout.segments) - 1)


def _placed(
    prompt: Prompt, branch: Branch, rollout: Rollout, held: Mapping[int, list[int]]
) -> Prompt:
    """A branch's first prompt in the ledger of all.

    Args:
        held: the segments of each branch so far, by its id.
    """
    ids = prompt_token_ids(branch.view, prompt)
    sources = array("B", bytes(len(ids) - len(prompt.sources)))
    sources.extend(prompt.sources)
    likely = {0} if rollout.segments else set()
    origin = branch.origin
    while origin is not None:
        likely.update(held[id(origin)])
        origin = origin.origin
    parent, shared = None, 0
    for index in sorted(likely):
        length = common_prefix(rollout.full_token_ids(index), ids)
        if length > shared:
            parent, shared = index, length
    return Prompt(parent, shared, ids[shared:], list(sources[shared:]))
