"""One rollout's tool calls: run together, each failure typed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from retrain.sandbox.output import cut_middle
from retrain.tools.base import CallStatus, ModelError, Tool, ToolError, ToolResult, ToolSession
from retrain.tools.function import as_tool
from retrain.types import InfrastructureError, ToolCall, UserError


class ToolRunner:
    """Holds one session per tool for one rollout; sessions open at a tool's first call.

    What the model reads of a call that failed:

    - unknown tool, text that could not be parsed, arguments that do not fit, or `ModelError`:
      the reason (`model_error`);
    - `ToolError`: its message; any other exception: `ExceptionName: message` (`tool_error`);
    - no result in time: how long it had (`timeout`).

    Used as an async context manager it closes its sessions.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        *,
        timeout_s: float = 30.0,
        max_output_chars: int = 4000,
        retries: int = 2,
        backoff_s: float = 0.5,
    ) -> None:
        """
        Args:
            tools: tools, or functions and classes that `as_tool` makes tools of.
            timeout_s: of one attempt at a call, unless the tool has a `timeout_s` of its own.
            max_output_chars: most characters kept of a result, half from each end.
            retries: further attempts after an `InfrastructureError`.
            backoff_s: wait before the first retry; it doubles each time.

        Raises:
            UserError: two tools of one name.
        """
        self.tools: dict[str, Tool] = {}
        for item in map(as_tool, tools):
            if item.name in self.tools:
                raise UserError(f"two tools are named '{item.name}'", "rename one: @tool(name=...)")
            self.tools[item.name] = item
        self.timeout_s = timeout_s
        self.max_output_chars = max_output_chars
        self.retries = retries
        self.backoff_s = backoff_s
        self.counts: Counter[CallStatus] = Counter()
        """Calls per status so far."""
        self._sessions: dict[str, ToolSession] = {}

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run calls concurrently; results in the order of the calls.

        Raises:
            InfrastructureError: one failed on every attempt; the others have ended by then.
        """
        outcomes = await asyncio.gather(*map(self._run_one, calls), return_exceptions=True)
        results = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        self.counts.update(result.status for result in results)
        return results

    async def aclose(self) -> None:
        """Close every session; the first failure is raised once all have been tried."""
        sessions, self._sessions = self._sessions, {}
        closing = [session.close() for session in sessions.values()]
        outcomes = await asyncio.gather(*closing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def __aenter__(self) -> ToolRunner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _run_one(self, call: ToolCall) -> ToolResult:
        start = time.perf_counter()
        text, status = await self._with_retries(call)
        # A lone surrogate (JSON escapes can make one) has no tokens.
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = cut_middle(text, self.max_output_chars)
        return ToolResult(call, text, status, time.perf_counter() - start)

    async def _with_retries(self, call: ToolCall) -> tuple[str, CallStatus]:
        if call.error is not None:
            return call.error, "model_error"
        if call.name not in self.tools:
            known = ", ".join(self.tools) or "none"
            return f"There is no tool '{call.name}'. Tools: {known}.", "model_error"
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(call)
            except InfrastructureError:
                if attempt == self.retries:
                    raise
                await asyncio.sleep(self.backoff_s * 2**attempt)
        raise AssertionError("unreachable")

    async def _attempt(self, call: ToolCall) -> tuple[str, CallStatus]:
        """One attempt. A call that does not heed its cancellation is left behind."""
        own: float | None = getattr(self.tools[call.name], "timeout_s", None)
        timeout_s = self.timeout_s if own is None else own
        task = asyncio.ensure_future(self._guarded(call))
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if task.done() and not task.cancelled():
                return task.result()
            if task.cancelled():
                return "CancelledError: the tool cancelled itself", "tool_error"
            return f"{call.name} gave no result within {timeout_s:g} s.", "timeout"
        finally:
            task.cancel()

    async def _guarded(self, call: ToolCall) -> tuple[str, CallStatus]:
        try:
            return await self._session(call.name).call(call.arguments), "ok"
        except ModelError as error:
            return str(error), "model_error"
        except ToolError as error:
            return str(error), "tool_error"
        except (InfrastructureError, UserError):
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}", "tool_error"

    def _session(self, name: str) -> ToolSession:
        if name not in self._sessions:
            self._sessions[name] = self.tools[name].session()
        return self._sessions[name]
