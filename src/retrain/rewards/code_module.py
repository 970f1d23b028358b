"""A model's program as a module, whose functions tests call."""

from __future__ import annotations

import ast

from retrain.sandbox.base import Sandbox


def as_module(code: str, sandbox: Sandbox, before: str = "") -> str:
    """The code as if it were imported: what it does only as a program, it does not do.

    `before` runs first, but after imports from `__future__`, which must stay at the top. A Python
    that is not full may not let its module be renamed, so there it is a program still.
    """
    name = "__name__ = 'solution'" if sandbox.capabilities.full_python else ""
    lines = code.split("\n")
    split = _after_future_imports(code)
    return "\n".join([*lines[:split], name, before, *lines[split:]])


def _after_future_imports(code: str) -> int:
    """How many lines of code must stay first: up to its last import from `__future__`."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0
    ends = [
        node.end_lineno or 0
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    return max(ends, default=0)
