"""Tools by name: what a config's `tools` may say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from retrain.importing import import_object, suggest
from retrain.sandbox import make_sandbox
from retrain.sandbox.base import Sandbox
from retrain.tools.base import Tool
from retrain.tools.function import as_tool
from retrain.tools.python import PythonTool
from retrain.types import UserError


def python(sandbox: Sandbox | None = None, **params: Any) -> PythonTool:
    """A `PythonTool`, in the "auto" sandbox unless given one."""
    return PythonTool(make_sandbox("auto") if sandbox is None else sandbox, **params)


BUILT_IN: dict[str, Callable[..., Tool]] = {"python": python}


def resolve_tool(name_or_path: str, params: Mapping[str, Any] | None = None) -> Tool:
    """The tool of a built-in name, of `pkg.module:name`, or of `path/to/file.py:name`.

    `params` are keyword arguments of the built-in tool or of a tool class.

    Raises:
        UserError: no such tool, or parameters that it does not take.
    """
    params = params or {}
    if ":" in name_or_path:
        return as_tool(import_object(name_or_path, "tool"), params)
    if name_or_path not in BUILT_IN:
        raise UserError(
            f"there is no built-in tool '{name_or_path}'",
            f"{suggest(name_or_path, BUILT_IN, 'built-in tools')}; "
            "or give an import path, pkg.module:name",
        )
    accepted = {"sandbox", *inspect.signature(PythonTool).parameters}
    for key in params:
        if key not in accepted:
            raise UserError(
                f"tool '{name_or_path}' has no parameter '{key}'",
                suggest(key, accepted, "it takes"),
            )
    return BUILT_IN[name_or_path](**params)
