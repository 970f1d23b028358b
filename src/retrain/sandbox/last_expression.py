"""The value of a final bare expression, as at Python's prompt."""

from __future__ import annotations

import ast
import threading
import warnings

_PARSING = threading.Lock()
"""`warnings.catch_warnings` is not safe in several threads."""


def assign_last_expression(code: str) -> str | None:
    """The code with its final bare expression assigned to `_`; None if it does not end in one.

    What surrounds the expression stays as it is and lines keep their numbers, so whatever is to
    be done with `_` can follow on a line of its own. None too for code that this Python cannot
    parse: that is for the sandbox to report.
    """
    try:
        with _PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    last = body[-1] if body else None
    if not isinstance(last, ast.Expr) or last.end_lineno is None or last.end_col_offset is None:
        return None
    lines = code.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: last.lineno - 1])) + last.col_offset
    end = sum(map(len, lines[: last.end_lineno - 1])) + last.end_col_offset
    source = b"".join(lines)
    return (b"%b_ = (%b)%b" % (source[:start], source[start:end], source[end:])).decode()
