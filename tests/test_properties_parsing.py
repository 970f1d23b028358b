"""What reads text that a model wrote: it never raises, and reads back what was written well."""

from __future__ import annotations

import asyncio
import math
import textwrap
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrain.rendering import FencedFormat, NativeFormat, TagFormat, ToolFormat, make_template
from retrain.rewards import REWARDS
from retrain.rewards.extract import (
    extract,
    last_between_tags,
    last_boxed,
    last_fenced,
    last_number,
    squad_em_score,
    squad_f1_score,
    whole_number,
)
from retrain.rewards.literals import NotLiteral, read_literal, write_literal
from retrain.rewards.numeric import same_latex
from retrain.tools import ToolRunner, tool, tool_schema
from retrain.types import Message, MessageType, Rollout, TagConfig, Task, ToolCall
from scripted import tokenizer

profile = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

MARKS = [
    "<code>", "</code>", "```python\n", "```\n", "\n```", "```", "<tool_call>", "</tool_call>",
    '{"name": "run", "arguments": {"code": "1"}}', '"name"', '"arguments"', "{", "}", "[", "]", '"',
    "\\", ":", ",", "\\boxed{", "\\frac{1}{2}", "\\dfrac12", "1,234", "-3", ".5", "2e9", "3/0",
    "1e999999999", "9" * 500, "50%", "\\text{", "$", "−", "٣", "²", "Ⅷ", "½", "NaN", "Infinity",
    "<answer>", "</answer>", "<think>", "</think>", "\ud800", "\x00", "\n", "\t", " ", "e\u0301",
    "'", "b'", "\\x", "0x", "1e", "j", "set(", "frozenset(", "(1e999-1e999)", "None", "#",
]  # fmt: skip
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=6), max_size=8).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@tool
def run(code: str, seconds: float = 1.0) -> str:
    """Run code."""
    return f"{code} {seconds}"


@tool
def add(a: int, b: list[int], c: dict[str, float] | None = None, d: bool = False) -> str:
    """Add numbers."""
    return f"{a} {b} {c} {d}"


@tool
async def now() -> str:
    """Tell the time."""
    return "now"


TOOLS: dict[str, list[Any]] = {"run": [run], "all": [run, add, now], "now": [now], "none": []}
SCHEMAS = {name: [tool_schema(t) for t in tools] for name, tools in TOOLS.items()}


def native(name: str) -> NativeFormat:
    return NativeFormat(make_template(tokenizer(name)))


FORMATS: dict[str, ToolFormat] = {
    "tags": TagFormat(),
    "odd tags": TagFormat(TagConfig("<<", "<<>", "[", "]")),
    "fenced": FencedFormat(),
    "chatml": native("chatml"),
    "llama3": native("llama3"),
}


# --- tool calls ---


@pytest.mark.parametrize("name", FORMATS)
def test_any_text_gives_calls_that_can_be_answered(name: str) -> None:
    form = FORMATS[name]

    @settings(profile, max_examples=60)
    @given(texts, st.sampled_from(sorted(SCHEMAS)))
    def answered(text: str, tools: str) -> None:
        calls = form.parse(text, SCHEMAS[tools])
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            assert isinstance(call.name, str) and isinstance(call.arguments, dict)
            assert call.error is None or call.error.strip()

    answered()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tools", ["run", "all"])
def test_any_call_is_read_back_from_what_is_written_of_it(name: str, tools: str) -> None:
    """A sole argument that stands for the body may lose the white space around it."""
    form, schemas = FORMATS[name], SCHEMAS[tools]
    arguments = st.fixed_dictionaries({"code": texts}) | st.dictionaries(
        texts, json_values, max_size=3
    )

    @settings(profile, max_examples=40)
    @given(
        arguments, st.sampled_from(["run"] if tools == "run" else ["run", "add"]), st.integers(1, 3)
    )
    def read_back(given_arguments: dict[str, Any], called: str, count: int) -> None:
        call = ToolCall(called, given_arguments)
        before = "" if name == "llama3" else "So: "
        written = "\n".join([before + form.render_call(call, schemas)] * count)
        found = form.parse(written, schemas)
        assert [c.error for c in found] == [None] * count
        assert {c.name for c in found} == {called}
        for one in found:
            assert stripped(one.arguments) == stripped(given_arguments)

    read_back()


def test_code_that_holds_what_ends_a_call_is_written_as_json() -> None:
    schemas = SCHEMAS["run"]

    def written(form: ToolFormat, code: str) -> str:
        return form.render_call(ToolCall("run", {"code": code}), schemas)

    assert written(FORMATS["tags"], "print('</co>')") == "<code>print('</co>')</code>"
    assert written(FORMATS["tags"], "'</code>'") == (
        '<code>{"name": "run", "arguments": {"code": "\'\\u003c/code>\'"}}</code>'
    )
    assert written(FORMATS["fenced"], "'```'") == "```python\n'```'\n```\n"
    assert written(FORMATS["fenced"], "a\n```\nb") == (
        '```python\n{"name": "run", "arguments": {"code": "a\\n```\\nb"}}\n```\n'
    )


def stripped(arguments: Any) -> Any:
    if set(arguments) == {"code"} and isinstance(arguments["code"], str):
        return textwrap.dedent(arguments["code"]).strip()
    return dict(arguments)


@settings(profile, max_examples=60)
@given(
    st.sampled_from(["run", "add", "now", "absent", ""]),
    st.dictionaries(
        st.sampled_from(["code", "seconds", "a", "b", "c", "d", "self", "", "*"]), json_values
    )
    | st.dictionaries(texts, json_values, max_size=2),
)
def test_any_arguments_get_an_answer(name: str, arguments: dict[str, Any]) -> None:
    runner = ToolRunner(TOOLS["all"])
    (result,) = asyncio.run(runner.run([ToolCall(name, arguments)]))
    assert result.status in ("ok", "model_error")
    assert result.text.encode() and len(result.text) <= runner.max_output_chars
    if result.status == "ok":
        assert name in ("run", "add", "now")


@settings(profile, max_examples=60)
@given(st.integers(), st.lists(st.integers(), max_size=3), st.booleans())
def test_arguments_that_fit_arrive(a: int, b: list[int], d: bool) -> None:
    runner = ToolRunner([add])
    (result,) = asyncio.run(runner.run([ToolCall("add", {"a": a, "b": b, "d": d})]))
    assert (result.status, result.text) == ("ok", f"{a} {b} None {d}")


# --- rewards ---


@settings(profile, max_examples=100)
@given(texts, texts)
def test_no_text_breaks_an_extractor(text: str, other: str) -> None:
    for number in (last_number(text), whole_number(text)):
        assert number is None or math.isfinite(number.numerator)
    boxed = last_boxed(text)
    assert boxed is None or boxed in text
    assert last_fenced(text, "python") is None or "```" in text
    inner = last_between_tags(text, "answer")
    assert inner is None or f"<answer>{inner}</answer>" in text
    for tag in (None, "answer"):
        for pattern in (None, r"-?\d+", r"<think>(.*?)</think>|x"):
            found = extract(text, tag, pattern, boxed=True)
            assert found is None or isinstance(found, str)
    assert same_latex(text, other) == same_latex(other, text)
    assert squad_em_score(text, [other]) in (0.0, 1.0)
    assert 0.0 <= squad_f1_score(text, [other]) <= 1.0


plain = st.text(st.characters(exclude_characters="{}\\", codec="utf-8"), max_size=8)


@settings(profile, max_examples=100)
@given(plain, plain, plain)
def test_what_is_marked_is_found_in_any_text_around(before: str, inner: str, after: str) -> None:
    assert last_boxed(f"{before}\\boxed{{{inner}}}{after}") == inner
    if "<" not in before + inner + after:
        assert last_between_tags(f"{before}<answer>{inner}</answer>{after}", "answer") == inner
        assert (
            extract(f"<answer>{before}\\boxed{{{inner}}}</answer>{after}", "answer", None, True)
            == inner
        )
    if "`" not in before + inner + after:
        assert last_fenced(f"{before}\n```\n{inner}\n```\n{after}") == inner


PARAMS: dict[str, dict[str, Any]] = {
    "contains": {"text": "4"},
    "penalize_text_containing": {"text": "4"},
    "regex": {"pattern": r"\d+"},
    "length": {"max_chars": 40},
    "format": {"tags": ["think", "answer"], "whole": True},
    "json_schema": {"schema": {"type": "object", "required": ["name"]}},
    "numeric_match": {"boxed": True, "rel_tol": 0.1},
}


ELSEWHERE = {"code_passes_tests", "math_equivalence", "llm_judge", "pairwise_judge", "rubric"}
"""Rewards that ask somebody else."""


@pytest.mark.parametrize("name", sorted(set(REWARDS) - ELSEWHERE))
def test_no_answer_breaks_a_reward(name: str) -> None:
    if name == "json_schema":
        pytest.importorskip("jsonschema")

    @settings(profile, max_examples=60)
    @given(st.lists(texts, max_size=3), st.integers() | st.floats(-1e9, 1e9) | st.decimals(-9, 9))
    def judged(said: list[str], answer: Any) -> None:
        rollout = Rollout(task=Task("t", (), answer))
        rollout.add_messages(*(Message(text, MessageType.MODEL) for text in said))
        value = REWARDS[name](rollout, **PARAMS.get(name, {}))
        assert math.isfinite(value)

    judged()


# --- literals ---


@settings(profile, max_examples=150)
@given(texts | st.text(max_size=30) | json_values.map(repr))
def test_any_text_is_a_literal_or_is_not(text: str) -> None:
    try:
        value = read_literal(text)
    except NotLiteral as error:
        assert str(error)
        return
    written = write_literal(value)
    assert repr(read_literal(written)) == repr(value) or isinstance(value, set | frozenset)


@settings(profile, max_examples=60)
@given(json_values)
def test_json_values_survive_as_literals(value: Any) -> None:
    assert read_literal(write_literal(value)) == value
