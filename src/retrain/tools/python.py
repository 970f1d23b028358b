"""The Python tool: code that the model wrote, run in a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from retrain.sandbox.base import Result, Sandbox, Session
from retrain.tools.base import ModelError
from retrain.tools.signature import read_signature

NO_OUTPUT = "(no output; use print or end with an expression)"
STATE_LOST = "Variables of earlier calls are lost."

DESCRIPTION = "Run Python code. Returns what it prints, and the value of a final expression. "
STATEFUL = "Variables last from call to call."
STATELESS = "Every call starts afresh."

_ALIVE = ("ok", "error")
"""After any other status the session is closed."""


class PythonTool:
    """Runs `code` as at Python's prompt: stdout, then the repr of a final bare expression.

    Code that fails is the model's fault: it reads what was printed before and the last line of
    the traceback. After a time-out, a lack of memory or a crash the next call gets a fresh
    session, and the model is told that its variables are gone.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        name: str = "python",
        description: str | None = None,
        stateful: bool = True,
        full_traceback: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            sandbox: where the code runs; its own limits apply. The caller closes it.
            name: what the model calls the tool.
            description: in place of the default one.
            stateful: keep variables over a rollout's calls, in one sandbox session.
            full_traceback: show all of a traceback instead of its last line.
            timeout_s: of one call, waiting for the sandbox included; the runner's if None.
        """
        self.name = name
        self.description = description or DESCRIPTION + (STATEFUL if stateful else STATELESS)
        self.timeout_s = timeout_s
        self.sandbox = sandbox
        self.parameters = _SIGNATURE.parameters
        self._stateful = stateful
        self._full_traceback = full_traceback

    def session(self) -> PythonSession:
        return PythonSession(self.sandbox, self._stateful, self._full_traceback)


class PythonSession:
    """Calls run one after the other, in the order they were made."""

    def __init__(self, sandbox: Sandbox, stateful: bool, full_traceback: bool) -> None:
        self._sandbox = sandbox
        self._stateful = stateful
        self._full_traceback = full_traceback
        self._session: Session | None = None
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
        if self._session is None:
            self._session = await self._sandbox.session()
        keep = False
        try:
            result = await self._session.run(code)
            keep = self._stateful and result.status in _ALIVE
            return result
        finally:
            if not keep:
                await self.close()

    def _show(self, result: Result) -> str:
        error = result.error if self._full_traceback else last_line(result.error)
        parts = [result.stdout.rstrip("\n"), error]
        if self._stateful and result.status not in _ALIVE:
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
