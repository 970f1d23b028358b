"""What a tool is, and what one call of it comes to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from retrain.types import ToolCall

CallStatus = Literal["ok", "model_error", "tool_error", "timeout"]
"""Whose fault a call was. `model_error`: unknown tool, arguments that do not fit the schema, text
that could not be parsed, or code that raised. `tool_error`: the tool raised. `timeout`: its time
ran out. The model is shown every one of them."""


class ToolError(Exception):
    """The tool failed; the message is shown to the model."""


class ModelError(Exception):
    """The model used the tool wrongly (its code raised, say); the message is shown to it."""


@dataclass(frozen=True)
class ToolOutput:
    """A result that comes with figures."""

    text: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of this call, such as the tokens that it used and what they cost; a rollout's metrics hold
    their sums under the same names."""


@dataclass(frozen=True)
class ToolResult:
    call: ToolCall
    text: str
    """What the model will read."""
    status: CallStatus = "ok"
    wall_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As the tool gave them."""


class ToolSession(Protocol):
    """One rollout's use of a tool; state lasts over its calls."""

    async def call(self, arguments: Mapping[str, Any]) -> str | ToolOutput:
        """Run the tool.

        Raises:
            ModelError, ToolError: shown to the model.
            InfrastructureError: retried, then the rollout is masked.
        """
        ...

    async def close(self) -> None: ...


class Tool(Protocol):
    """What a model can call.

    One that holds something for the whole run (a client, a process) may have an `async close()`,
    called once, at the end.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object with named properties."""

    def session(self) -> ToolSession: ...


async def close_tools(tools: Iterable[Tool]) -> None:
    """Close those that hold something; called once, at the end of the run."""
    for tool in tools:
        close = getattr(tool, "close", None)
        if inspect.iscoroutinefunction(close):
            await close()


def tool_schema(tool: Tool) -> dict[str, Any]:
    """The tool as chat templates and OpenAI-compatible APIs describe it."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        },
    }
