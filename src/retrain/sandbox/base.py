"""What a sandbox is: somewhere to run code that the model wrote.

An executor (`jail`, `monty`, `http`) says what it can do in its `Capabilities`; a config that
asks for more is refused. Each passes the contract tests of what it declares.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from retrain.types import FailureKind, InfrastructureError, UserError

Status = Literal["ok", "error", "exit", "timeout", "memory", "output", "killed"]
"""How a call ended:

- `ok`: without an error; `error`: with an exception, which `Result.error` shows;
- `exit`: the code asked to end (`SystemExit`, `os._exit`);
- `timeout`: it ran longer than `timeout_s`; `memory`: it asked for more than `memory_mb`;
- `output`: it printed more than the executor is willing to keep, and was stopped;
- `killed`: it crashed, was killed, or the session was over before the call.
"""

ALIVE: tuple[Status, ...] = ("ok", "error")
"""After any other status the session is over: each later call is `killed` and says why."""

OVER_AFTER: dict[Status, str] = {
    "exit": "the code ended it",
    "timeout": "its time ran out",
    "memory": "its memory ran out",
    "output": "it printed too much",
    "killed": "its process was killed",
}
"""Why, for each of the others."""


@dataclass(frozen=True)
class Result:
    """Claims made by untrusted code: compare answers outside, in the trusted process."""

    status: Status
    stdout: str = ""
    """What the call printed, standard error included, and the repr of a final bare expression;
    at most `max_output_chars`, head and tail, and a line that counts what is left out."""
    error: str = ""
    """What went wrong, for the model to read: a traceback or one line; empty when status is ok."""
    wall_s: float = 0.0
    truncated: bool = False
    """Characters of `stdout` were left out."""


def over(reason: str) -> Result:
    """What a call of a session that is over comes to."""
    return Result("killed", error=f"This session is over: {reason}.")


def out_of_time(timeout_s: float) -> str:
    """What the model reads after a time-out."""
    return f"TimeoutError: the code ran longer than {timeout_s:g} s"


TURN_S = 20.0
"""How long a call may wait for its turn: less than a tool may take, so that the model is not
blamed for it."""

OUT_OF_MEMORY = "MemoryError: the code used more memory than it may"


def check_limits(
    *, timeout_s: float, memory_mb: int, max_output_chars: int, max_concurrency: int
) -> None:
    """
    Raises:
        UserError: one is not above zero.
    """
    for name, value in (
        ("timeout_s", timeout_s),
        ("memory_mb", memory_mb),
        ("max_output_chars", max_output_chars),
        ("max_concurrency", max_concurrency),
    ):
        if value <= 0:
            raise UserError(f"sandbox.{name} is {value}", "give a number above zero")


@dataclass(frozen=True)
class Capabilities:
    """What an executor offers, as it is set up."""

    stateful: bool
    """Variables can last over a session's calls."""
    full_python: bool
    """The whole language and standard library, apart from what isolation forbids."""
    packages: tuple[str, ...]
    """Third-party packages that code can import."""
    files: bool
    """Code can read the files that the config names."""
    writable: bool
    """Code can write files, which go with the session."""
    isolation: str
    """What stands between the code and this machine, in one line."""


@asynccontextmanager
async def turn(gate: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the places that a gate has.

    Raises:
        SandboxUnavailable: none became free in TURN_S.
    """
    try:
        async with asyncio.timeout(TURN_S if gate.locked() else None):
            await gate.acquire()
    except TimeoutError:
        raise SandboxUnavailable(
            f"no turn for a call in {TURN_S:g} s; raise sandbox.max_concurrency"
        ) from None
    try:
        yield
    finally:
        gate.release()


class Session(Protocol):
    """State that lasts over one rollout's calls; never shared, never reused."""

    async def run(self, code: str) -> Result:
        """Run code, one call at a time. Faults of the code come back as a `Result`.

        A call that is cancelled ends the session.

        Raises:
            SandboxUnavailable: the sandbox itself failed; the session is over.
        """
        ...

    async def close(self) -> None:
        """End the session and all that it holds; closing twice is allowed."""
        ...


class Sandbox(Protocol):
    """Makes sessions. Building one starts nothing; the first session does, or `start`."""

    stateful: bool
    """Whether a session is to be kept over a rollout's calls."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def start(self) -> None:
        """Start now, and test that what is promised works; a second call does nothing.

        Raises:
            UserError: it cannot work here, with the reason and a way out.
            SandboxUnavailable: it failed this time.
        """
        ...

    async def session(self) -> Session:
        """A fresh session.

        Raises:
            UserError, SandboxUnavailable: as `start`.
        """
        ...

    async def close(self) -> None:
        """End every session and give back processes, files and descriptors."""
        ...


class SandboxUnavailable(InfrastructureError):
    """The sandbox itself failed: it could not start, or had no room for another session."""

    kind: FailureKind | None = "sandbox"
