"""Numbers, boxes and fences found in untrusted text."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.rewards.extract import last_boxed, last_fenced, last_number

NUMBERS = [
    ("it is 1,234", Fraction(1234)),
    ("1,234,567.50", Fraction("1234567.5")),
    ("x = -3", Fraction(-3)),
    ("x = −3", Fraction(-3)),
    ("5-3", Fraction(3)),
    ("(2)-3", Fraction(3)),
    ("+7.", Fraction(7)),
    (".5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)),
    ("-3 / 4", Fraction(-3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"-\dfrac{3}{4}", Fraction(-3, 4)),
    (r"$\frac12$", Fraction(1, 2)),
    ("50%", Fraction(50)),
    ("2.5e-3", Fraction(1, 400)),
    (r"1{,}000 \text{ km}", Fraction(1000)),
    ("42km", Fraction(42)),
    ("1, 2, 3", Fraction(3)),
    ("#### 18", Fraction(18)),
    ("x2", None),
    ("1/0", None),
    ("none", None),
    ("1e999999999", None),
    ("9" * 5000, None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text("ab .$\n", max_size=9))
def test_any_decimal_written_in_a_sentence_is_read_back_exactly(number, noise):
    for written in (f"{number:f}", f"{number:,f}"):
        assert last_number(f"so 12 {noise} is {written} {noise.replace('.', '')}") == Fraction(
            number
        )


@given(st.text("0123456789.,-+/eE%\\frac{} \n", max_size=60))
def test_numbers_never_raise(text):
    last_number(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed {3}", "3"),
        (r"\\\boxed{4}", "4"),
        (r"\\boxed{4}", "4"),
        ("} boxed{4}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


braced = st.recursive(
    st.text("ab1+ ", max_size=4),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}"), max_size=3).map("x".join),
    max_leaves=8,
)


@given(braced, braced, st.text("a}\\ ", max_size=5))
def test_any_balanced_content_is_unboxed(first, last, tail):
    text = f"\\boxed{{{first}}} so \\boxed{{{last}}} {tail}"
    assert last_boxed(text) == last


@pytest.mark.parametrize("hostile", ["\\boxed{" * 50_000, "\\" * 100_000, "{" * 100_000])
def test_unboxing_is_linear(hostile):
    start = time.monotonic()
    assert last_boxed(hostile) is None
    assert time.monotonic() - start < 2


def test_last_fenced_takes_the_last_complete_block():
    text = "```python\na\n```\n```\nb\nc\n```\n```python\nunfinished"
    assert last_fenced(text) == "b\nc"
    assert last_fenced("```text\na\n```", "json") is None
