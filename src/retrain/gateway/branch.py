"""One line of a conversation: what was heard, and the ledger of what the policy saw of it."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from retrain.gateway.ask import Reply
from retrain.gateway.history import Key
from retrain.rendering.ledger import common_prefix, prompt_token_ids
from retrain.types import Message, Prompt, Rollout, Segment, Span, ToolCall, Turn


@dataclass
class Answer:
    """One MODEL message that the branch's own caller was given, or was to be."""

    context: tuple[Message, ...]
    """What the conversation gained since the branch's last answer."""
    message: Message
    reply: Reply
    delivered: bool = True

    @property
    def turn(self) -> Turn:
        assert self.message.turn is not None
        return self.message.turn


@dataclass(frozen=True)
class Heard:
    """A message of the conversation as its caller tells it."""

    keys: Collection[Key]
    """Any of these is it."""
    upto: int
    """Messages of the view, with this one."""
    answer: Answer | None = None
    """Set where the policy said it."""


@dataclass
class Branch:
    """`view` is what the policy sees: a rollout of its own until all branches are put together."""

    view: Rollout
    heard: list[Heard] = field(default_factory=list)
    calls: dict[str, ToolCall] = field(default_factory=dict)
    """By the id that the caller knows."""
    answers: list[Answer] = field(default_factory=list)
    """Own ones: those before a fork are the parent's."""
    described: bool = False
    """The system message says what tools there are."""

    def shared(self, keys: Sequence[Key]) -> int:
        """How many messages `keys` begins with that are this branch's."""
        count = 0
        for key, heard in zip(keys, self.heard, strict=False):
            if key not in heard.keys:
                break
            count += 1
        return count

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
        return Branch(view, self.heard[:count], dict(self.calls), described=self.described)


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
    segment that it shares most with. Answers that nobody got are left out."""
    for branch in branches:
        placed: int | None = None
        for answer in branch.answers:
            if not answer.delivered:
                continue
            rollout.add_messages(*answer.context)
            turn = answer.turn
            if placed is None:
                prompt = _placed(turn.prompt, branch.view, rollout)
            else:
                prompt = replace(turn.prompt, parent=placed)
            moved = replace(turn, prompt=prompt, rollout=rollout.id, place=None)
            rollout.add_messages(replace(answer.message, turn=moved))
            placed = len(rollout.segments) - 1


def _placed(prompt: Prompt, view: Rollout, rollout: Rollout) -> Prompt:
    """A branch's first prompt in the ledger of all."""
    ids = prompt_token_ids(view, prompt)
    sources = array("B", bytes(len(ids) - len(prompt.sources)))
    sources.extend(prompt.sources)
    parent, shared = None, 0
    for index in range(len(rollout.segments)):
        length = common_prefix(rollout.full_token_ids(index), ids)
        if length > shared:
            parent, shared = index, length
    return Prompt(parent, shared, ids[shared:], list(sources[shared:]))
