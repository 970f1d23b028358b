"""Python literals as the trusted process reads, writes and compares them.

Values leave a sandbox as text that untrusted code may have written. `ast.literal_eval` on such a
text can cost much memory, or the process (deep nesting), so it is read here: in one pass, with a
limit on its length and depth.
"""

from __future__ import annotations

import ast
import cmath
import math
import re
from typing import Any

MAX_CHARS = 50_000
"""Longest text of a value. Sets and dicts of so many characters stay fast even when every hash
collides (0.1 s)."""

MAX_DEPTH = 100
"""Deepest nesting of a value."""

_ESCAPE = r"\\(?:[\\'\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
_STRING = rf"b?'(?:[^'\\\n]|{_ESCAPE})*'" + rf'|b?"(?:[^"\\\n]|{_ESCAPE})*"'
_DIGITS = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_COMPLEX = rf"\(-?{_DIGITS}[+-]{_DIGITS}j\)|-?{_DIGITS}j"
_NAN = "(1e999-1e999)"
_CONSTANTS = {"None": None, "True": True, "False": False, _NAN: math.nan}
_WORDS = rf"None|True|False|set\(\)|frozenset\(|{re.escape(_NAN)}"
_TOKEN = re.compile(
    rf"\s*(?:(?P<word>{_WORDS})|(?P<string>{_STRING})|(?P<complex>{_COMPLEX})"
    rf"|(?P<number>-?{_DIGITS})|(?P<mark>[\[\](){{}}:,]))",
    re.ASCII,
)


class NotLiteral(ValueError):
    """A text or a value that is no plain Python literal, or is too long or too deep."""


def read_literal(text: str) -> Any:
    """The value of a literal as `write_literal` writes it.

    Raises:
        NotLiteral: it is something else, too long or too deep.
    """
    if len(text) > MAX_CHARS:
        raise NotLiteral(f"{len(text)} characters, more than {MAX_CHARS}")
    try:
        return _Reader(text).whole()
    except (ValueError, TypeError, SyntaxError, OverflowError) as error:
        raise NotLiteral(str(error)) from error


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        """(kind, token), the last one first."""
        end = 0
        for match in _TOKEN.finditer(text):
            if match.start() != end:
                break
            end = match.end()
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind]))
        if text[end:].strip():
            raise NotLiteral(f"cannot be read from character {end}")
        self._tokens.reverse()

    def whole(self) -> Any:
        value = self._value(MAX_DEPTH)
        if self._tokens:
            raise NotLiteral("more than one value")
        return value

    def _value(self, depth: int) -> Any:
        if depth < 0:
            raise NotLiteral(f"nested deeper than {MAX_DEPTH}")
        kind, token = self._next()
        if kind == "string":
            return ast.literal_eval(token)
        if kind == "complex":
            return complex(token)
        if kind == "number":
            return int(token) if token.removeprefix("-").isdigit() else float(token)
        match token:
            case "[":
                return self._items("]", depth)
            case "(":
                return tuple(self._items(")", depth))
            case "{":
                return self._set_or_dict(depth)
            case "set()":
                return set()
            case "frozenset(":
                (items,) = self._items(")", depth) or [()]
                return frozenset(items)
        if token not in _CONSTANTS:
            raise NotLiteral(f"{token!r} where a value should be")
        return _CONSTANTS[token]

    def _items(self, close: str, depth: int) -> list[Any]:
        items = []
        while self._peek() != close:
            items.append(self._value(depth - 1))
            self._separator(close)
        self._next()
        return items

    def _set_or_dict(self, depth: int) -> Any:
        keys, values = [], []
        while self._peek() != "}":
            keys.append(self._value(depth - 1))
            if self._peek() == ":":
                self._next()
                values.append(self._value(depth - 1))
            self._separator("}")
        self._next()
        if not keys or values:
            return dict(zip(keys, values, strict=True))
        return set(keys)

    def _separator(self, close: str) -> None:
        if self._peek() != close and self._next() != ("mark", ","):
            raise NotLiteral("a comma is missing")

    def _peek(self) -> str:
        return self._tokens[-1][1] if self._tokens else ""

    def _next(self) -> tuple[str, str]:
        if not self._tokens:
            raise NotLiteral("it ends too early")
        return self._tokens.pop()


def write_literal(value: Any) -> str:
    """Source of a value, which evaluates to it wherever Python's built-ins are.

    Raises:
        NotLiteral: it is no plain literal, or too long or too deep.
    """
    text = _write(value, MAX_DEPTH)
    if len(text) > MAX_CHARS:
        raise NotLiteral(f"{len(text)} characters, more than {MAX_CHARS}")
    return text


def _write(value: Any, depth: int) -> str:
    if depth < 0:
        raise NotLiteral(f"nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return repr(value)
    if kind is complex and cmath.isfinite(value):
        return repr(value)
    if kind is float:
        return _NAN if math.isnan(value) else repr(value).replace("inf", "1e999")
    if kind is dict:
        items = (f"{_write(k, depth - 1)}: {_write(v, depth - 1)}" for k, v in value.items())
        return f"{{{', '.join(items)}}}"
    if kind not in (list, tuple, set, frozenset):
        raise NotLiteral(f"{kind.__name__} is not a type of Python literals")
    inner = [_write(item, depth - 1) for item in value]
    if kind is list:
        return f"[{', '.join(inner)}]"
    if kind is tuple:
        return f"({''.join(f'{item}, ' for item in inner)})"
    listed = f"{{{', '.join(sorted(inner))}}}" if inner else ""
    return listed or "set()" if kind is set else f"frozenset({listed})"


def same_value(value: Any, expected: Any) -> bool:
    """Equality of literals: numbers to 1e-9 (relative or absolute) when one is a float, tuples as
    lists (YAML and JSON have none), NaN equal to NaN, and bool apart from int."""
    if isinstance(expected, list | tuple):
        same_length = isinstance(value, list | tuple) and len(value) == len(expected)
        return same_length and all(map(same_value, value, expected))
    if isinstance(expected, dict):
        if not isinstance(value, dict) or len(value) != len(expected):
            return False
        theirs = {_apart(key): item for key, item in value.items()}
        keys = [_apart(key) for key in expected]
        return all(key in theirs for key in keys) and all(
            same_value(theirs[key], item) for key, item in zip(keys, expected.values(), strict=True)
        )
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return _same_number(value, expected)
    return bool(value == expected)


def _apart(key: Any) -> tuple[bool, Any]:
    """A key of its own for True, which as a dict key equals 1."""
    return isinstance(key, bool), key


def _same_number(value: float, expected: float) -> bool:
    if isinstance(value, int) and isinstance(expected, int):
        return value == expected
    try:
        if math.isnan(expected):
            return math.isnan(value)
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    except OverflowError:  # an integer beyond the range of floats
        return False
