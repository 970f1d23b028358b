"""Tools of the package smolagents: https://huggingface.co/docs/smolagents."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Mapping
from typing import Any

from retrain.tools.base import ModelError, ToolError, ToolOutput, ToolSession
from retrain.tools.threads import in_daemon_thread
from retrain.types import InfrastructureError, UserError

PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
"""Of smolagents' types those that JSON has. `any` admits all; an `image` or `audio` is none."""

_TYPED = (ModelError, ToolError, InfrastructureError, UserError, asyncio.CancelledError)
"""What a tool raises in order to say whose fault it is."""

SHOWN_CHARS = 60
"""Of an argument that does not fit."""


class SmolagentsTool:
    """A `smolagents.Tool`, used as it is: one instance for all rollouts, each call in a thread.

    `setup` runs at the first call. What `forward` raises is the tool's error, unless it is one of
    ours, which says itself whose fault it is; arguments that are missing, unknown or of another
    type than `inputs` says are the model's.
    """

    def __init__(self, tool: Any) -> None:
        """
        Raises:
            UserError: it takes an image or audio, which no model can write.
        """
        self.name: str = tool.name
        self.description: str = tool.description
        self.parameters = _schema(tool)
        self._tool = tool
        self._without_default = _nullable_without_default(tool)
        self._setting_up = threading.Lock()

    def session(self) -> ToolSession:
        return _Session(self)

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ModelError: they do not fit.
        """
        properties = self.parameters["properties"]
        reasons = [
            f"argument '{name}' is missing"
            for name in self.parameters["required"]
            if name not in arguments
        ]
        bound = dict.fromkeys(self._without_default)
        for name, value in arguments.items():
            if name not in properties:
                takes = ", ".join(properties) or "none"
                reasons.append(f"unknown argument '{name}' (arguments: {takes})")
                continue
            bound[name] = _converted(value, properties[name])
            if not _fits(bound[name], properties[name]):
                shown = repr(value)
                shown = shown if len(shown) <= SHOWN_CHARS else f"{shown[: SHOWN_CHARS - 3]}..."
                reasons.append(f"argument '{name}' must be {_kind(properties[name])}, got {shown}")
        if reasons:
            raise ModelError("; ".join(reasons))
        return bound

    def run(self, arguments: Mapping[str, Any]) -> object:
        """What the tool returns; blocks."""
        with self._setting_up:
            if not getattr(self._tool, "is_initialized", False):
                self._tool.setup()
                self._tool.is_initialized = True
        return self._tool(**arguments)


class _Session:
    """Nothing lasts from call to call but what the tool itself keeps."""

    def __init__(self, tool: SmolagentsTool) -> None:
        self._tool = tool

    async def call(self, arguments: Mapping[str, Any]) -> str | ToolOutput:
        from retrain.tools.function import show

        bound = self._tool.bind(arguments)
        try:
            result = await in_daemon_thread(lambda: self._tool.run(bound))
            return show(await result if inspect.isawaitable(result) else result)
        except _TYPED:
            raise
        except Exception as error:
            raise ToolError(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        return None


def from_smolagents(obj: object) -> bool:
    """Whether it is a `smolagents.Tool`, or a class of them; nothing is imported to find out."""
    kind = obj if inspect.isclass(obj) else type(obj)
    return any(
        base.__module__.partition(".")[0] == "smolagents" and base.__name__ == "Tool"
        for base in kind.__mro__
    )


def wrap_smolagents(obj: Any, params: Mapping[str, Any]) -> SmolagentsTool:
    """
    Raises:
        UserError: the class cannot be made with `params`, or an instance is given some.
    """
    if not inspect.isclass(obj):
        if params:
            raise UserError(
                f"tool '{obj.name}' takes no parameters ({', '.join(params)} given)",
                "parameters go to the constructor of a tool class",
            )
        return SmolagentsTool(obj)
    try:
        made = obj(**params)
    except UserError:
        raise
    except Exception as error:  # smolagents refuses what it finds amiss with exceptions of any kind
        raise UserError(
            f"tool class {obj.__name__} cannot be made: {type(error).__name__}: {error}",
            f"Its parameters: {inspect.signature(obj.__init__)}.",
        ) from error
    return SmolagentsTool(made)


def _schema(tool: Any) -> dict[str, Any]:
    """`inputs` as a JSON schema: what is nullable may be null, or left out."""
    properties, required = {}, []
    for name, given in tool.inputs.items():
        kinds = [given["type"]] if isinstance(given["type"], str) else list(given["type"])
        if unwritable := [kind for kind in kinds if kind not in (*PYTHON_TYPES, "any")]:
            raise UserError(
                f"tool '{tool.name}': its input '{name}' is of type {unwritable[0]}, "
                "which a model cannot write",
                "Wrap it in a tool that takes a path or an address.",
            )
        rest = {key: value for key, value in given.items() if key not in ("type", "nullable")}
        if given.get("nullable"):
            kinds.append("null")
        else:
            required.append(name)
        kinds = list(dict.fromkeys(kinds))
        typed = {} if "any" in kinds else {"type": kinds[0] if len(kinds) == 1 else kinds}
        properties[name] = {**typed, **rest}
    return {"type": "object", "properties": properties, "required": required}


def _nullable_without_default(tool: Any) -> list[str]:
    """The inputs that may be left out, but that `forward` must be given."""
    parameters = inspect.signature(tool.forward).parameters
    return [
        name
        for name, given in tool.inputs.items()
        if given.get("nullable")
        and name in parameters
        and parameters[name].default is inspect.Parameter.empty
    ]


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", list(PYTHON_TYPES))
    return [kinds] if isinstance(kinds, str) else kinds


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    return " or ".join(_kinds(schema))


def _fits(value: object, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema and value not in schema["enum"] and value is not None:
        return False
    kinds = _kinds(schema)
    if isinstance(value, bool):
        return "boolean" in kinds
    return any(isinstance(value, PYTHON_TYPES[kind]) for kind in kinds)


def _converted(value: object, schema: Mapping[str, Any]) -> object:
    """A string where none is wanted, read as JSON: between tags all is text."""
    if not isinstance(value, str) or _fits(value, schema):
        return value
    try:
        read: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if _fits(read, schema) else value
