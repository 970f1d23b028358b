"""Where code that the model wrote runs."""

from __future__ import annotations

import inspect
from typing import Any

from retrain.sandbox.base import Result, Sandbox, SandboxUnavailable, Session, Status
from retrain.sandbox.monty import MontySandbox
from retrain.types import UserError

__all__ = [
    "MontySandbox",
    "Result",
    "Sandbox",
    "SandboxUnavailable",
    "Session",
    "Status",
    "make_sandbox",
]

_BUILT_IN = {"auto": MontySandbox, "monty": MontySandbox}
_PLANNED = ("jail", "http")


def make_sandbox(type: str = "auto", **params: Any) -> Sandbox:
    """Build a sandbox by name. "auto" is "monty", the one that needs nothing but a package.

    Raises:
        UserError: no such sandbox, or a parameter that it does not take.
    """
    if type in _PLANNED:
        raise UserError(f"sandbox type '{type}' is not built yet", "use sandbox type: monty")
    if type not in _BUILT_IN:
        known = ", ".join(sorted(_BUILT_IN))
        raise UserError(f"there is no sandbox type '{type}'", f"use one of: {known}")
    accepted = inspect.signature(_BUILT_IN[type]).parameters
    for name in params:
        if name not in accepted:
            raise UserError(
                f"sandbox type '{type}' has no parameter '{name}'",
                f"it takes: {', '.join(accepted)}",
            )
    return _BUILT_IN[type](**params)
