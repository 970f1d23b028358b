"""A tool that no training run of the recipe has seen."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from retrain.tools.base import ModelError

_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MAX_DEPTH = 20
_MAX_BITS = 256


class Calculator:
    """Computes with whole numbers: + - * // % and brackets.

    Args:
        words: say `result = 12` in place of `12`.
    """

    name = "calculator"

    def __init__(self, *, words: bool = False) -> None:
        self._form = "result = {}" if words else "{}"

    async def __call__(self, expression: str) -> str:
        """Compute with whole numbers: + - * // % and brackets.

        Args:
            expression: such as 12*(3+4)
        """
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ModelError("error: cannot read that") from None
        try:
            return self._form.format(_value(tree, 0))
        except ZeroDivisionError:
            raise ModelError("error: cannot divide by nothing") from None


def _value(node: ast.expr, depth: int) -> int:
    """
    Raises:
        ModelError: it is not such an expression, or too deep or too large a one.
    """
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            pass
        case ast.BinOp(left=left, op=op, right=right) if depth < _MAX_DEPTH:
            if type(op) not in _OPERATIONS:
                raise ModelError("error: unknown operation")
            values = _value(left, depth + 1), _value(right, depth + 1)
            value = _OPERATIONS[type(op)](*values)
        case _:
            raise ModelError("error: cannot compute that")
    if value.bit_length() > _MAX_BITS:
        raise ModelError("error: too large")
    return value
