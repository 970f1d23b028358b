"""One rollout's tool calls: run together, each failure typed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from retrain.sandbox.output import cut_middle
from retrain.tools.base import (
    CallStatus,
    ModelError,
    Tool,
    ToolError,
    ToolOutput,
    ToolResult,
    ToolSession,
)
from retrain.tools.deadline import CancelledItself, Late, within
from retrain.tools.function import as_tool
from retrain.types import InfrastructureError, ToolCall, UserError

LONGEST_WAIT_S = 30.0
"""Before a retry."""


class ToolRunner:
    """Holds one session per tool for one rollout; sessions open at a tool's first call.

    What the model reads of a call that failed:

    - unknown tool, text that could not be parsed, arguments that do not fit, or `ModelError`:
      the reason (`model_error`);
    - `ToolError`: its message; any other exception: `ExceptionName: message` (`tool_error`);
    - no result in time: how long it had (`timeout`).

    Calls run at the same time, but for those of a tool with an attribute `in_order` that is true:
    each of these waits for the one before, and its time-out starts when its turn has come. Tools
    that have the same object there wait for each other.

    A tool with a method `session_beside` is given the rollout's other open sessions in place of a
    call of `session`. A session with a method `async ready()` has all the time that this takes;
    the time-out of a call starts after it.

    A call beyond a budget is the model's fault, and is not run; calls count in the order in which
    the model wrote them, whatever became of them.

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
        max_calls: int | None = None,
        max_calls_of: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            tools: tools, or functions and classes that `as_tool` makes tools of.
            timeout_s: of one attempt at a call, unless the tool has a `timeout_s` of its own.
            max_output_chars: most characters kept of a result, half from each end.
            retries: further attempts after an `InfrastructureError`, unless the tool has `retries`
                of its own.
            backoff_s: wait before the first retry; it doubles each time, up to half a minute.
            max_calls: most calls of all tools together.
            max_calls_of: most calls of a tool, by its name.

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
        self.max_calls = max_calls
        self.max_calls_of = dict(max_calls_of or {})
        self.counts: Counter[CallStatus] = Counter()
        """Calls per status so far."""
        self._made: Counter[str] = Counter()
        """Calls per tool so far."""
        self._sessions: dict[str, ToolSession] = {}
        self._turns = _turns(self.tools.values())

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run calls concurrently; results in the order of the calls.

        Raises:
            InfrastructureError: one failed on every attempt; the others have ended by then.
        """
        calls = [self._within_budget(call) for call in calls]
        if len(calls) == 1:
            results = [await self._run_one(calls[0])]
        else:
            results = await self._run_together(calls)
        self.counts.update(result.status for result in results)
        return results

    async def _run_together(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        outcomes = await asyncio.gather(*map(self._run_one, calls), return_exceptions=True)
        results = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    async def aclose(self) -> None:
        """Close every session; the first failure is raised once all have been tried."""
        sessions, self._sessions = list(self._sessions.values()), {}
        if len(sessions) == 1:
            await sessions[0].close()
            return
        closing = [session.close() for session in sessions]
        outcomes = await asyncio.gather(*closing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def __aenter__(self) -> ToolRunner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _within_budget(self, call: ToolCall) -> ToolCall:
        """Count it; a call too many comes back with that as its error."""
        if call.error is not None or call.name not in self.tools:
            return call
        used_up = ""
        if self.max_calls is not None and self._made.total() >= self.max_calls:
            used_up = f"No tool calls are left: there were {self.max_calls} in all."
        elif self._made[call.name] >= self.max_calls_of.get(call.name, math.inf):
            used_up = f"No calls of {call.name} are left: there were {self._made[call.name]}."
        if used_up:
            return replace(call, error=used_up)
        self._made[call.name] += 1
        return call

    async def _run_one(self, call: ToolCall) -> ToolResult:
        if call.name not in self._turns:
            return await self._result(call)
        async with self._turns[call.name]:
            return await self._result(call)

    async def _result(self, call: ToolCall) -> ToolResult:
        start = time.perf_counter()
        output, status = await self._with_retries(call)
        if isinstance(output, str):
            output = ToolOutput(output)
        # A lone surrogate (JSON escapes can make one) has no tokens.
        text = cut_middle(output.text, self.max_output_chars)
        text = text.encode("utf-8", "replace").decode("utf-8")
        return ToolResult(call, text, status, time.perf_counter() - start, output.metrics)

    async def _with_retries(self, call: ToolCall) -> tuple[str | ToolOutput, CallStatus]:
        if call.error is not None:
            return call.error, "model_error"
        if call.name not in self.tools:
            known = ", ".join(self.tools) or "none"
            return f"There is no tool '{call.name}'. Tools: {known}.", "model_error"
        own: int | None = getattr(self.tools[call.name], "retries", None)
        retries = self.retries if own is None else own
        for attempt in range(retries + 1):
            try:
                return await self._attempt(call)
            except InfrastructureError as error:
                if attempt == retries:
                    error.kind = error.kind or "tool"
                    raise
                await asyncio.sleep(min(self.backoff_s * 2 ** min(attempt, 16), LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    async def _attempt(self, call: ToolCall) -> tuple[str | ToolOutput, CallStatus]:
        """One attempt. A call that does not heed its cancellation is left behind."""
        output, status = await self._guarded(self._ready(call.name))
        if status != "ok":
            return output, status
        own: float | None = getattr(self.tools[call.name], "timeout_s", None)
        timeout_s = self.timeout_s if own is None else own
        try:
            return await within(self._guarded(self._called(call)), timeout_s)
        except Late:
            return f"{call.name} gave no result within {timeout_s:g} s.", "timeout"
        except CancelledItself:
            return "CancelledError: the tool cancelled itself", "tool_error"

    async def _ready(self, name: str) -> str:
        ready = getattr(self._session(name), "ready", None)
        if ready is not None:
            await ready()
        return ""

    async def _called(self, call: ToolCall) -> str | ToolOutput:
        return await self._session(call.name).call(call.arguments)

    async def _guarded(
        self, work: Awaitable[str | ToolOutput]
    ) -> tuple[str | ToolOutput, CallStatus]:
        try:
            return await work, "ok"
        except ModelError as error:
            return _message(error), "model_error"
        except ToolError as error:
            return _message(error), "tool_error"
        except (InfrastructureError, UserError, GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as error:  # SystemExit too, which would end the event loop
            return f"{type(error).__name__}: {_message(error)}", "tool_error"

    def _session(self, name: str) -> ToolSession:
        if name not in self._sessions:
            tool = self.tools[name]
            beside = getattr(tool, "session_beside", None)
            others = tuple(self._sessions.values())
            self._sessions[name] = tool.session() if beside is None else beside(others)
        return self._sessions[name]


def _turns(tools: Iterable[Tool]) -> dict[str, asyncio.Lock]:
    """By tool, what its calls wait for."""
    locks: dict[object, asyncio.Lock] = {}
    turns = {}
    for item in tools:
        order: object = getattr(item, "in_order", False)
        if order:
            key = item.name if order is True else order
            turns[item.name] = locks.setdefault(key, asyncio.Lock())
    return turns


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as worse:
        return f"(its message cannot be shown: {type(worse).__name__})"
