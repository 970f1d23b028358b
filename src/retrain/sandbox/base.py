"""What a sandbox is: somewhere to run code that the model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from retrain.types import InfrastructureError

Status = Literal["ok", "error", "exit", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True)
class Result:
    """Claims made by untrusted code: compare answers outside, in the trusted process."""

    status: Status
    stdout: str = ""
    error: str = ""
    """What went wrong, for the model to read; empty when status is ok."""
    wall_s: float = 0.0
    truncated: bool = False


class Session(Protocol):
    """State that lasts over one rollout's calls; never shared, never reused."""

    async def run(self, code: str) -> Result:
        """Run code. Faults of the code come back as a `Result`.

        Raises:
            SandboxUnavailable: the sandbox itself failed.
        """
        ...

    async def close(self) -> None: ...


class Sandbox(Protocol):
    async def session(self) -> Session: ...

    async def close(self) -> None: ...


class SandboxUnavailable(InfrastructureError):
    """The sandbox itself failed: it could not start, or had no room for another session."""
