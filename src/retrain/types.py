"""The data that every part of retrain shares, and nothing else.

A `Rollout` keeps two truths side by side: `messages`, what was said, and `segments` (the
ledger), which tokens the policy saw and which of them it sampled. Training reads the ledger
only. Long per-token columns are `array.array`s: 4 bytes a number, appendable, and readable by
NumPy and torch without a copy.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal

FinishReason = Literal["stop_token", "stop_string", "length", "context"]
"""Why an engine stopped: an end-of-turn token, a stop string, the request's token budget, or the
model's context limit."""

Objective = Literal["policy", "cross_entropy", "distill"]

NO_VERSION = -1
"""The policy version of a token that no engine sampled."""


class MessageType(StrEnum):
    SYSTEM = "system"
    MESSAGE = "message"
    """Any party that is not the policy: a user, another agent, an environment."""
    MODEL = "model"
    """The policy. The only type that trains."""
    TOOL = "tool"


class Source(IntEnum):
    """Where a token of the ledger comes from."""

    CONTEXT = 0
    """Written by the renderer: prompts, tool output, end-of-turn glue."""
    TARGET = 1
    """Rendered text of a MODEL message that no engine sampled: an SFT trace."""
    SAMPLED = 2
    """Returned by an engine, with its log-probability and policy version."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made. `error` is set when its text could not be parsed."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What the policy is about to see, as the ledger will record it.

    The prompt extends segment `parent` after its first `prefix_len` tokens with `token_ids`
    (`sources` says which of them are CONTEXT and which TARGET). `parent is None` starts from
    nothing. `spans` are (message index, start, end) of MODEL messages entered as targets,
    counted from the start of `token_ids`.
    """

    parent: int | None
    prefix_len: int
    token_ids: list[int]
    sources: list[int]
    spans: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Turn:
    """What an engine returned for one MODEL message, and the prompt that it was asked with.

    `token_ids`, `logprobs` and `versions` have one entry per sampled token [T], a sampled
    end-of-turn token included. `logprobs` are those of the distribution sampled from, that is
    after temperature.
    """

    prompt: Prompt
    token_ids: array[int]
    logprobs: array[float]
    versions: array[int]
    finish_reason: FinishReason
    rollout: str | None = None
    """Id of the rollout that it answers; None does not say."""
    place: int | None = None
    """How many messages the rollout had; None does not say."""


@dataclass(frozen=True)
class Message:
    """One utterance. `Message("2 + 3?", MessageType.MESSAGE)` is enough.

    `content` is what the party said; for a sampled MODEL message it is the decoded text without
    the end-of-turn token. `turn` is set by an engine: adding the message to a rollout then
    enters it in the ledger.
    """

    content: str
    type: MessageType
    role: str | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    turn: Turn | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Span:
    """MODEL message `message` occupies tokens [start, end) of the segment, its own tokens only."""

    message: int
    start: int
    end: int
    finish_reason: FinishReason | None
    """None for a message that no engine sampled."""


@dataclass
class Segment:
    """One contiguous sequence as the policy saw it.

    A fork shares the first `prefix_len` tokens of its parent's full sequence; the columns hold
    own tokens only, so storage stays linear in the conversation. Columns have length T.
    """

    parent: int | None = None
    prefix_len: int = 0
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    source: array[int] = field(default_factory=lambda: array("B"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    versions: array[int] = field(default_factory=lambda: array("i"))
    turns: list[Span] = field(default_factory=list)

    def __len__(self) -> int:
        """Length of the full sequence, the shared prefix included."""
        return self.prefix_len + len(self.token_ids)

    def append(
        self,
        token_ids: Iterable[int],
        sources: Iterable[int],
        logprobs: Iterable[float] | None = None,
        versions: Iterable[int] | None = None,
    ) -> None:
        before = len(self.token_ids)
        self.token_ids.extend(token_ids)
        added = len(self.token_ids) - before
        self.source.extend(sources)
        self.logprobs.extend(array("f", bytes(4 * added)) if logprobs is None else logprobs)
        self.versions.extend(array("i", [NO_VERSION]) * added if versions is None else versions)
        if not len(self.source) == len(self.logprobs) == len(self.versions) == len(self.token_ids):
            raise ValueError("the columns of a segment must have one length")


@dataclass(frozen=True)
class RewardPart:
    """One number of a reward, and where it came from."""

    name: str
    """The reward's key in the config; "environment" for the intrinsic reward."""
    kind: Literal["environment", "step", "rollout", "group", "verifier"]
    turn: int | None
    """The turn (index into step_rewards) it was given to; None for a whole-rollout entry."""
    raw: float
    """What the function returned; the penalty when a verifier failed."""
    weight: float
    value: float
    """What entered the reward: weight * raw (a verifier's penalty enters unweighted)."""
    verifier: str | None = None
    """The verifier that failed, if one did."""
    error: str | None = None
    """The exception that `on_error: penalty` turned into this part."""


@dataclass
class Task:
    """One thing to attempt: what the policy is shown, and what the rewards may look at."""

    id: str
    prompt: tuple[Message, ...]
    answer: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)


StopReason = Literal[
    "answered", "max_steps", "length", "context", "environment", "user_done", "error"
]
"""`answered`: a MODEL turn that ended by itself without a tool call. `max_steps`: the step budget
ran out while the model still called tools. `length`, `context`: a turn was cut by its token budget
or the context limit. `environment`: a subclass said done. `user_done`: the simulated user left.
`error`: infrastructure failed; the rollout is masked."""


FailureKind = Literal["engine", "tool", "sandbox", "environment", "reward", "deadline"]
"""Where infrastructure failed; `deadline`: the whole rollout took too long."""


@dataclass(frozen=True)
class Failure:
    """What ended one attempt at a rollout."""

    kind: FailureKind
    attempt: int
    """From 1."""
    cause: str


@dataclass
class Rollout:
    """One agent's attempt at one task. `Rollout()` is enough to start."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    group_id: str | None = None
    agent: str = "policy"
    trainable: bool = True
    episode: str | None = None
    """What the rollouts of several agents have in common that were made together; None where one
    was made alone."""
    task: Task | None = None
    messages: list[Message] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    env_rewards: list[float] = field(default_factory=list)
    """Intrinsic reward of the environment, one per MODEL message [S]."""
    step_rewards: list[float] = field(default_factory=list)
    """Reward per MODEL message [S], everything included; sums to `reward`."""
    reward: float = 0.0
    reward_parts: list[RewardPart] = field(default_factory=list)
    stop_reason: StopReason | None = None
    error: str | None = None
    """Set when infrastructure failed: the rollout is masked, never scored zero."""
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    """Attempts that infrastructure ended, in order. Each was retried, but the last one where
    `error` is set: that one masked the rollout."""

    def mask(self, kind: FailureKind, cause: str) -> None:
        """Leave it out of everything that is learned or reported of rewards."""
        self.error = cause
        self.failures.append(Failure(kind, len(self.failures) + 1, cause))

    def add_messages(self, *messages: Message) -> None:
        """Append messages; those that carry a `turn` enter the ledger too.

        Raises:
            ValueError: a turn that answers another rollout or another state of this one, or
                whose prompt does not fit the ledger.
        """
        for message in messages:
            if message.turn is not None:
                self._enter(message.turn, len(self.messages))
            self.messages.append(message)

    def enter_prompt(self, prompt: Prompt) -> Segment:
        """Append a prompt's tokens, as an extension or as an explicit fork."""
        parent = prompt.parent
        if parent is not None and not 0 <= parent < len(self.segments):
            raise ValueError(f"prompt extends segment {parent}; there are {len(self.segments)}")
        length = 0 if parent is None else len(self.segments[parent])
        if prompt.prefix_len > length:
            raise ValueError(f"prompt shares {prompt.prefix_len} tokens of a segment of {length}")
        extends = (
            parent is not None and parent == len(self.segments) - 1 and prompt.prefix_len == length
        )
        if not extends:
            self.segments.append(Segment(parent, prompt.prefix_len))
        segment = self.segments[-1]
        offset = len(segment.token_ids)
        segment.append(prompt.token_ids, prompt.sources)
        for message, start, end in prompt.spans:
            segment.turns.append(Span(message, offset + start, offset + end, None))
        return segment

    def _enter(self, turn: Turn, message_index: int) -> None:
        if turn.rollout not in (None, self.id):
            raise ValueError(f"the message answers rollout {turn.rollout}; this is {self.id}")
        if turn.place not in (None, message_index):
            raise ValueError(
                f"the message answers a conversation of {turn.place} messages; there are "
                f"{message_index} now: it was added before, or others were added since"
            )
        segment = self.enter_prompt(turn.prompt)
        start = len(segment.token_ids)
        sources = array("B", [Source.SAMPLED]) * len(turn.token_ids)
        segment.append(turn.token_ids, sources, turn.logprobs, turn.versions)
        span = Span(message_index, start, len(segment.token_ids), turn.finish_reason)
        segment.turns.append(span)

    def full_token_ids(self, segment: int = -1) -> array[int]:
        """Token ids of a segment with the prefix it shares with its ancestors, [T]."""
        own = self.segments[segment]
        pieces = [own.token_ids]
        length = own.prefix_len
        while own.parent is not None:
            own = self.segments[own.parent]
            pieces.append(own.token_ids[: max(0, length - own.prefix_len)])
            length = min(length, own.prefix_len)
        full = array("i")
        for piece in reversed(pieces):
            full.extend(piece)
        return full

    @property
    def model_messages(self) -> list[int]:
        """Indices of the MODEL messages: one per turn, in order [S]."""
        return [i for i, m in enumerate(self.messages) if m.type is MessageType.MODEL]

    @property
    def num_forks(self) -> int:
        return sum(1 for segment in self.segments if segment.parent is not None)

    @property
    def completion(self) -> str:
        """Everything the model said, turns joined by newlines."""
        return "\n".join(self.messages[i].content for i in self.model_messages)


@dataclass
class Sample:
    """One sequence for the learner. Every column has length T; column t speaks of token t."""

    token_ids: array[int]
    loss_mask: array[int]
    """1 where the token trains, else 0."""
    rollout_id: str
    group_id: str | None
    objective: Objective = "policy"
    behavior_logprobs: array[float] | None = None
    """The engine's log-probabilities, of the distribution sampled from."""
    old_logprobs: array[float] | None = None
    """The learner's at the start of the update, for the ratio."""
    ref_logprobs: array[float] | None = None
    """The reference model's."""
    advantages: array[float] | None = None
    values: array[float] | None = None
    """The critic's at the start of the update: of the state before each token."""
    returns: array[float] | None = None
    """What the critic learns."""
    teacher_logprobs: array[float] | None = None
    """A teacher's of the tokens themselves [T]; NaN where none speaks."""
    teacher_top_ids: array[int] | None = None
    """A teacher's likeliest tokens at each place, the likeliest first [T * teacher_top_k]; -1
    fills up where it has none."""
    teacher_top_logprobs: array[float] | None = None
    """Of `teacher_top_ids`, in its whole distribution [T * teacher_top_k]; NaN where it has
    none."""
    teacher_top_k: int = 0
    teacher_temperature: float = 1.0
    """Of `teacher_top_logprobs`; the policy is compared at the same."""
    turns: array[int] | None = None
    """Which of the rollout's turns a token belongs to, -1 where it trains in none."""
    versions: array[int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TagConfig:
    """Tags around a tool call and around its result; any strings, special tokens or not."""

    tool_start: str = "<code>"
    tool_end: str = "</code>"
    response_start: str = "<interpreter>"
    response_end: str = "</interpreter>"

    def __post_init__(self) -> None:
        for name in ("tool_start", "tool_end", "response_start", "response_end"):
            if not getattr(self, name).strip():
                raise ValueError(f"TagConfig.{name} must not be empty")
        if self.tool_start == self.tool_end:
            raise ValueError("TagConfig.tool_start and tool_end must differ")


class UserError(Exception):
    """A mistake in the user's config, data or code: one line for the cause, one for the next step.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, cause: str, next_step: str = "") -> None:
        super().__init__(cause if not next_step else f"{cause}\n  {next_step}")
        self.cause = cause
        self.next_step = next_step


class InfrastructureError(Exception):
    """Something outside the model's and the user's reach failed; worth a retry."""

    kind: FailureKind | None = None
    """What failed, for the counts; None leaves it to where it passes on its way out: a tool, the
    engine, a reward, or else the environment."""
