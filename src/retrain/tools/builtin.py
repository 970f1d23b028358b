"""Tools by name: what a config's `tools` may say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from retrain.importing import import_object, suggest
from retrain.sandbox import make_sandbox
from retrain.sandbox.base import Sandbox
from retrain.tools.base import Tool
from retrain.tools.function import as_tool
from retrain.tools.http import HttpTool
from retrain.tools.llm_pool import DESCRIPTION, LLMPool, LLMPoolTool
from retrain.tools.mcp import mcp
from retrain.tools.python import PythonTool
from retrain.tools.retrieval import RetrievalTool
from retrain.tools.simulated import simulated
from retrain.types import UserError


def python(
    sandbox: Sandbox | None = None,
    *,
    name: str = "python",
    description: str | None = None,
    full_traceback: bool = False,
    timeout_s: float | None = None,
) -> PythonTool:
    """A `PythonTool`, in the "auto" sandbox unless given one."""
    return PythonTool(
        make_sandbox("auto") if sandbox is None else sandbox,
        name=name,
        description=description,
        full_traceback=full_traceback,
        timeout_s=timeout_s,
    )


def llm_pool(
    models: Sequence[Mapping[str, Any]],
    *,
    tool_name: str = "llm_pool",
    description: str = DESCRIPTION,
    on_failure: Literal["mask", "tell"] = "mask",
) -> LLMPoolTool:
    """An `LLMPoolTool` over a pool of these models, see `LLMPool`."""
    pool = LLMPool(models, where=f"tool '{tool_name}'")
    return LLMPoolTool(pool, name=tool_name, description=description, on_failure=on_failure)


BUILT_IN: dict[str, Callable[..., Tool | Sequence[Tool]]] = {
    "http": HttpTool,
    "llm_pool": llm_pool,
    "mcp": mcp,
    "python": python,
    "retrieval": RetrievalTool,
    "simulated": simulated,
}
"""By name, what makes them of a config's `params`: one tool, or as many as a server has."""


def resolve_tools(name_or_path: str, params: Mapping[str, Any] | None = None) -> list[Tool]:
    """The tools of a built-in name, of `pkg.module:name`, or of `path/to/file.py:name`.

    `params` are keyword arguments of the built-in, or of a tool class.

    Raises:
        UserError: no such tool, or parameters that it does not take.
    """
    params = params or {}
    if ":" in name_or_path:
        return [as_tool(import_object(name_or_path, "tool"), params)]
    if name_or_path not in BUILT_IN:
        raise UserError(
            f"there is no built-in tool '{name_or_path}'",
            f"{suggest(name_or_path, BUILT_IN, 'built-in tools')}; "
            "or give an import path, pkg.module:name",
        )
    make = BUILT_IN[name_or_path]
    _check_params(name_or_path, inspect.signature(make), params)
    made = make(**params)
    return list(made) if isinstance(made, Sequence) else [made]


def _check_params(name: str, signature: inspect.Signature, params: Mapping[str, Any]) -> None:
    accepted = list(signature.parameters)
    for key in params:
        if key not in accepted:
            raise UserError(
                f"tool '{name}' has no parameter '{key}'", suggest(key, accepted, "it takes")
            )
    missing = [
        key
        for key, parameter in signature.parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in params
    ]
    if missing:
        raise UserError(
            f"tool '{name}' needs {', '.join(missing)}", f"It takes: {', '.join(accepted)}."
        )
