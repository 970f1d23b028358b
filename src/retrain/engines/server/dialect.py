"""What differs between servers: how they are started, asked, and given weights."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from retrain.engines.base import SamplingParams
from retrain.engines.server.http import Refused, Server, Unreachable
from retrain.types import FinishReason, InfrastructureError

PROBE_S = 10.0
"""For questions that a server answers at once."""

CONTROL_S = 120.0
"""For pausing and going on."""

POLICY = "policy"
"""The name that requests call the model by, where the server was started for the run."""

ADAPTER = "policy-lora"


Reason = FinishReason | Literal["aborted"]
"""Why a request ended; `aborted`: the server was told to stop it, and gives what there was."""


class Malformed(InfrastructureError):
    """The server answered, but not what the protocol says."""


class Interrupted(InfrastructureError):
    """The server was told to stop it, and there is nothing of use yet."""


@dataclass(frozen=True)
class Ask:
    """One continuation to sample, as a server is asked for it."""

    model: str
    token_ids: Sequence[int]
    params: SamplingParams
    """But for `max_new_tokens`: `max_tokens` counts."""
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """What one request gave; columns [T]."""

    token_ids: array[int]
    logprobs: array[float]
    reason: Reason


@dataclass(frozen=True)
class Facts:
    """What a server says of itself, and what it can do, found by asking."""

    server: str
    version: str
    model: str
    """The name to ask for."""
    context_limit: int | None
    dtype: str | None
    """None where the server does not say."""
    can: Mapping[str, bool]
    """Capabilities by name."""
    advice: Mapping[str, str] = field(default_factory=dict)
    """How to get those that are missing."""

    def missing(self, *names: str) -> list[str]:
        """Of the capabilities named, those that there are not, each with how to get it."""
        return [f"{name} ({self.advice[name]})" for name in names if not self.can[name]]


GENERATE = "token ids and log-probabilities"
INTERRUPT = "interrupting what is under way"
FULL = "full weights from a directory"
LORA = "LoRA adapters while it runs"
CAPABILITIES = (GENERATE, INTERRUPT, FULL, LORA)


@dataclass(frozen=True)
class Launch:
    """How a server is to be started."""

    model: Path | str
    port: int
    dtype: str
    context_limit: int
    lora_rank: int | None
    cpu: bool
    """The server's build is one for CPUs."""
    args: Sequence[str] = ()


class Dialect(Protocol):
    """One kind of server. Methods raise `Unreachable`, `Refused` or `Malformed`."""

    name: str
    module: str
    """What its Python environment must have."""

    def command(self, launch: Launch) -> list[str]:
        """The arguments after the interpreter."""
        ...

    def environment(self) -> dict[str, str]:
        """Variables that the server needs."""
        ...

    async def facts(self, server: Server) -> Facts: ...

    async def generate(self, server: Server, ask: Ask) -> Answer:
        """Sample; what overshoots a stop string is kept."""
        ...

    async def score(self, server: Server, model: str, token_ids: Sequence[int]) -> array[float]:
        """Log-probability of each token given those before it [T]; 0.0 for the first.

        Raises:
            Interrupted: the server was paused meanwhile.
        """
        ...

    async def pause(self, server: Server) -> None:
        """End what is under way with what it has; further requests wait."""
        ...

    async def load(self, server: Server, path: Path, version: int, timeout_s: float) -> None:
        """Take full weights from a directory; forget what was cached under others."""
        ...

    async def load_adapter(
        self, server: Server, path: Path, version: int, timeout_s: float
    ) -> None:
        """Take a LoRA adapter from a directory as ADAPTER, in place of the one before."""
        ...

    async def resume(self, server: Server) -> None: ...


async def healthy(server: Server, timeout_s: float = PROBE_S) -> bool:
    """Whether the server says that it is well."""
    try:
        await server.get("/health", timeout_s)
    except (Unreachable, Refused):
        return False
    return True


async def served_paths(server: Server) -> frozenset[str]:
    """The paths in the server's own description of itself.

    Raises:
        Unreachable, Refused, Malformed: it gives none.
    """
    described = await server.get("/openapi.json", PROBE_S)
    if not isinstance(described, dict) or not isinstance(described.get("paths"), dict):
        raise Malformed(f"{server.url}/openapi.json does not describe an API")
    return frozenset(described["paths"])


def columns(server: Server, token_ids: Any, logprobs: Any) -> tuple[array[int], array[float]]:
    """Tokens and their log-probabilities as the ledger keeps them.

    Raises:
        Malformed: one is missing, or they are not of one length.
    """
    try:
        ids, found = array("i", token_ids), array("f", logprobs)
    except (TypeError, OverflowError, ValueError):
        ids, found = array("i"), array("f", [0.0])
    if len(ids) != len(found):
        raise Malformed(
            f"{server.url} gave no token ids with a log-probability each; training needs both"
        )
    return ids, found
