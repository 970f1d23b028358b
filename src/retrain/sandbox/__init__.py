"""Where code that the model wrote runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from retrain.sandbox.auto import AutoSandbox
from retrain.sandbox.base import (
    Capabilities,
    Result,
    Sandbox,
    SandboxUnavailable,
    Session,
    Status,
)
from retrain.sandbox.http.sandbox import HttpSandbox
from retrain.sandbox.jail.sandbox import JailSandbox
from retrain.sandbox.monty import MontySandbox
from retrain.types import UserError

__all__ = [
    "AutoSandbox",
    "Capabilities",
    "HttpSandbox",
    "JailSandbox",
    "MontySandbox",
    "Result",
    "Sandbox",
    "SandboxUnavailable",
    "Session",
    "Status",
    "make_sandbox",
]

BUILT_IN: dict[str, Callable[..., Sandbox]] = {
    "jail": JailSandbox,
    "monty": MontySandbox,
    "http": HttpSandbox,
}


def make_sandbox(type: str = "auto", **params: Any) -> Sandbox:
    """Build a sandbox by name; nothing starts yet.

    `auto` is the jail where it works, else Monty if that can do what `params` ask for.

    Raises:
        UserError: no such sandbox, or something that it cannot do.
    """
    # An empty list of packages asks for nothing, but keeps the jail from loading its own.
    asked = {name: value for name, value in params.items() if name != "packages" or value}
    if type == "auto":
        _refuse_unknown("auto", params, JailSandbox)
        candidates: dict[str, Sandbox] = {"jail": JailSandbox(**params)}
        if set(asked) <= set(inspect.signature(MontySandbox).parameters):
            candidates["monty"] = MontySandbox(**asked)
        return AutoSandbox(candidates)
    if type not in BUILT_IN:
        known = ", ".join(["auto", *BUILT_IN])
        raise UserError(f"there is no sandbox type '{type}'", f"use one of: {known}")
    if type != "jail":
        params = asked
    _refuse_unknown(type, params, BUILT_IN[type])
    if type == "http" and "url" not in params:
        raise UserError("sandbox type 'http' needs sandbox.url", "give the server's address")
    return BUILT_IN[type](**params)


def _refuse_unknown(type: str, params: dict[str, Any], made_by: Callable[..., Sandbox]) -> None:
    accepted = inspect.signature(made_by).parameters
    for name in params:
        if name in accepted:
            continue
        able = [
            other for other in BUILT_IN if name in inspect.signature(BUILT_IN[other]).parameters
        ]
        if able:
            raise UserError(
                f"sandbox type '{type}' has no '{name}'",
                f"leave sandbox.{name} out, or use sandbox type: {' or '.join(able)}",
            )
        raise UserError(
            f"sandbox type '{type}' has no parameter '{name}'", f"it takes: {', '.join(accepted)}"
        )
