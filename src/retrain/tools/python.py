"""The Python tool: code that the model wrote, run in a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from retrain.sandbox.base import ALIVE, Result, Sandbox, SandboxUnavailable, Session
from retrain.tools.base import ModelError
from retrain.tools.signature import read_signature

NO_OUTPUT = "(no output; use print or end with an expression)"
STATE_LOST = "Variables of earlier calls are lost."

DESCRIPTION = "Run Python code. Returns what it prints, and the value of a final expression. "
STATEFUL = "Variables last from call to call."
STATELESS = "Every call starts afresh."


class PythonTool:
    """Runs `code` as at Python's prompt: stdout, then the repr of a final bare expression.

    Code that fails is the model's fault: it reads what was printed before and the last line of
    the traceback. After a time-out, a lack of memory or a crash the next call gets a fresh
    session, and the model is told that its variables are gone.
    """

    in_order = True

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        name: str = "python",
        description: str | None = None,
        full_traceback: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            sandbox: where the code runs; its own limits apply, and where it is stateful, variables
                last over a rollout's calls. The caller closes it.
            name: what the model calls the tool.
            description: in place of the default one.
            full_traceback: show all of a traceback instead of its last line.
            timeout_s: of one call, waiting for the sandbox included; the runner's if None.
        """
        self.name = name
        self.description = description or DESCRIPTION + (
            STATEFUL if sandbox.stateful else STATELESS
        )
        self.timeout_s = timeout_s
        self.sandbox = sandbox
        self.parameters = _SIGNATURE.parameters
        self._full_traceback = full_traceback

    def session(self) -> PythonSession:
        return PythonSession(self.sandbox, self._full_traceback)


class PythonSession:
    """Calls run one after the other, in the order they were made."""

    def __init__(self, sandbox: Sandbox, full_traceback: bool) -> None:
        self._sandbox = sandbox
        self._full_traceback = full_traceback
        self._session: Session | None = None
        self._has_state = False
        """A call has left variables in the session."""
        self._lost: SandboxUnavailable | None = None
        """The sandbox failed when there were variables: no other session can stand in for it."""
        self._turn = asyncio.Lock()

    async def call(self, arguments: Mapping[str, Any]) -> str:
        args, keywords = _SIGNATURE.bind(arguments)
        async with self._turn:
            result = await self._run(*args, **keywords)
        text = self._show(result)
        if result.status == "ok":
            return text or NO_OUTPUT
        raise ModelError(text)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _run(self, code: str) -> Result:
        if self._lost is not None:
            raise self._lost
        keep = False
        try:
            if self._session is None:
                self._session = await self._sandbox.session()
            result = await self._session.run(code)
            keep = self._sandbox.stateful and result.status in ALIVE
            return result
        except SandboxUnavailable as failure:
            self._lost = failure if self._has_state else None
            raise
        finally:
            self._has_state = keep
            if not keep:
                await self.close()

    def _show(self, result: Result) -> str:
        error = result.error if self._full_traceback else last_line(result.error)
        parts = [result.stdout.rstrip("\n"), error]
        if self._sandbox.stateful and result.status not in ALIVE:
            parts.append(STATE_LOST)
        return "\n".join(part for part in parts if part)


def last_line(traceback: str) -> str:
    """The line that names the exception, without frames and without a message's further lines."""
    _, header, body = traceback.rpartition("Traceback (most recent call last):\n")
    lines = body.splitlines()
    if not header:
        return lines[-1] if lines else ""
    return next((line for line in lines if line and not line.startswith(" ")), "")


def _code(code: str) -> None:
    """
    Args:
        code: Python source
    """


_SIGNATURE = read_signature(_code, "tool 'python'")
