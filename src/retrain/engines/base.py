"""What an engine is: token ids in; token ids, log-probabilities and policy versions out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from retrain.types import FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature == 0` is greedy decoding.

    `top_p` and `top_k` truncate the distribution, which the learner cannot reproduce, so they
    serve evaluation only.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Stop strings. Generation ends with the token that completes one; that token is kept."""
    stop_token_ids: tuple[int, ...] = ()
    """End-of-turn tokens. The one sampled is kept as the last token."""


@dataclass(frozen=True)
class Bounds:
    """What one turn is asked for besides the run's own settings; it can only end earlier."""

    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """One continuation to sample.

    Requests of one `session` (a rollout) usually extend each other: the engine may keep its
    cache between them until `end_session`. The result depends on `seed`, never on arrival order.
    """

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    session: str | None = None
    group: str | None = None
    """Requests of one group begin alike: engines with several servers keep them together."""


@dataclass(frozen=True)
class Completion:
    """Columns have one entry per sampled token [T]."""

    token_ids: array[int]
    logprobs: array[float]
    versions: array[int]
    finish_reason: FinishReason


class Engine(Protocol):
    """A model, as something to sample from."""

    @property
    def context_limit(self) -> int:
        """Most tokens a sequence may have, prompt and completion together."""
        ...

    async def generate(self, request: GenerateRequest) -> Completion:
        """Sample one continuation.

        A prompt that leaves no room for one token returns no tokens and `finish_reason
        "context"`.

        Raises:
            InfrastructureError: the engine failed; the request may be sent again.
        """
        ...

    async def score(self, token_ids: list[int], temperature: float = 1.0) -> array[float]:
        """Log-probability of each token given those before it [T]; 0.0 for the first."""
        ...

    async def end_session(self, session: str) -> None:
        """Forget what is cached for a session."""
        ...

    async def close(self) -> None: ...


class PolicyEngine(Engine, Protocol):
    """An engine whose weights follow those that a learner trains."""

    @property
    def version(self) -> int:
        """Of the policy, as it is sampled from now."""
        ...

    @property
    def most_sessions(self) -> int | None:
        """How many sessions may be under way without waiting for each other; None for any."""
        ...

    @property
    def restarts(self) -> int:
        """How often the engine failed and began again."""
        ...

    @property
    def measured(self) -> Mapping[str, float]:
        """What is to be reported of the last update of the weights, by name."""
        ...

    async def prepare(self) -> bool:
        """Find out, before the first request, whether the engine can do what is asked of it;
        whether it is deterministic.

        Raises:
            UserError: it cannot.
        """
        ...

    async def start(self, directory: Path) -> str | None:
        """The run begins; what the engine leaves behind goes into `directory`. What to tell the
        user of what the first `update_weights` will take long for, if it will."""
        ...

    async def update_weights(self, version: int) -> None:
        """Sample from the learner's weights as they are now, those of `version`; the learner must
        not change them meanwhile. What is under way goes on under the new weights: each token
        carries the version that it was sampled under.
        """
        ...
