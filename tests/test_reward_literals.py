"""Values that untrusted code printed, read without its doing any harm."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.rewards.literals import (
    MAX_CHARS,
    MAX_DEPTH,
    NotLiteral,
    read_literal,
    same_value,
    write_literal,
)

keys = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary())
scalars = st.one_of(keys, st.floats(allow_nan=False), st.complex_numbers(allow_infinity=False))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.sets(keys),
        st.frozensets(keys),
    ),
    max_leaves=20,
)


@given(values)
def test_what_is_written_is_read(value: Any) -> None:
    if "nan" in repr(value):
        return
    text = write_literal(value)
    assert repr(read_literal(text)) == repr(value) or read_literal(text) == value
    assert same_value(read_literal(text), value)
    assert eval(text) == value


def test_numbers_beyond_any_bound() -> None:
    assert read_literal(write_literal([math.inf, -math.inf])) == [math.inf, -math.inf]
    assert math.isnan(read_literal(write_literal(math.nan)))
    assert math.isnan(eval(write_literal(math.nan)))


def test_python_writes_the_same_language() -> None:
    for value in ([1, -2.5e-7, "it's", b"\xff"], {"a": (1, 2), 3: set()}, {1}, -1.5 + 2j, True):
        assert read_literal(repr(value)) == value
    assert read_literal("(1,)") == (1,) and read_literal("()") == ()
    assert read_literal("frozenset({1, 2})") == frozenset({1, 2})
    assert read_literal(" [ 1 ,\n2, ] ") == [1, 2]


@given(st.text(alphabet="[](){}:,'\"\\ub0x1e+-9j. \nNone", max_size=40))
def test_any_other_text_is_refused_in_order(text: str) -> None:
    try:
        value = read_literal(text)
    except NotLiteral:
        return
    write_literal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1 2",
        "[1",
        "]",
        "{1: 2, 3}",
        "{[]: 1}",
        "{{}}",
        "frozenset(1)",
        "[, 1]",
        "print",
        "1 + 1",
        "f''",
        "'a' 'b'",
        "'\\N{DIGIT ONE}'",
        "__import__('os')",
        "<object at 0x1>",
        "[...]",
        "9" * 5000,
        "lambda: " * 5000,
        "not " * 9000,
        "-" * 40_000 + "1",
        "1+" * 20_000 + "1",
        "(" * 40_000,
        "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
        "'" + "a" * MAX_CHARS + "'",
        "'" + "\\" * 40_001,
    ],
)
def test_hostile_text_is_refused_at_once(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(NotLiteral):
        read_literal(text)
    assert time.perf_counter() - started < 0.5


def test_colliding_hashes_cost_little() -> None:
    numbers = ", ".join(str(n * (2**61 - 1)) for n in range(1, 2100))
    started = time.perf_counter()
    assert len(read_literal("{" + numbers + "}")) == 2099
    assert time.perf_counter() - started < 2.0


def test_only_plain_values_are_written() -> None:
    class Five(int):
        pass

    loop: list[Any] = []
    loop.append(loop)
    for value in (object(), Five(5), [range(3)], {"a": print}, loop, "x" * MAX_CHARS):
        with pytest.raises(NotLiteral):
            write_literal(value)
