"""Filters: what stays, what is refused, and messages that name filter, row and column."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from retrain.config import load_config
from retrain.config.data import PromptSourceConfig
from retrain.data import TaskSource, load_tasks, selection
from retrain.data.files import Row
from retrain.data.filters import column_filter
from retrain.types import Message, MessageType, Task, UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)
ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3?", "level": "Level 1", "score": 0.1, "n": {"deep": [7, 8]}},
    {"prompt": "2 + 30?", "level": "Level 2", "score": 0.2, "n": {"deep": [7, 9]}},
    {"prompt": "What is 2 + 300?", "level": "Level 3", "score": 0.8, "n": {"deep": [6, 8]}},
    {"prompt": "What is 2 + 3000?", "level": None, "score": None, "n": {"deep": [6, 9]}},
]


def load(*filters: dict[str, Any], rows: list[Any] = ROWS, **keys: Any) -> TaskSource:
    source = {"type": "list", "prompts": rows, "shuffle": False, **keys, "filters": list(filters)}
    return load_tasks(ADAPTER.validate_python(source), seed=0)


def kept(*filters: dict[str, Any], rows: list[Any] = ROWS) -> list[int]:
    """Numbers of the rows that stay."""
    prompts = [row["prompt"] for row in rows]
    source = load(*filters, rows=rows)
    return [prompts.index(task.prompt[-1].content) for task in source.epoch(0)]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"column": "level", "one_of": ["Level 1", "Level 3"]}, [0, 2]),
        ({"column": "level", "one_of": ["Level 1", None]}, [0, 3]),
        ({"column": "level", "none_of": ["Level 1"]}, [1, 2, 3]),
        ({"column": "level", "none_of": [None]}, [0, 1, 2]),
        ({"column": "score", "min": 0.2}, [1, 2]),
        ({"column": "score", "max": 0.2}, [0, 1]),
        ({"column": "score", "min": 0.2, "max": 0.7}, [1]),
        ({"column": "score", "min": 0.0, "none_of": [0.8]}, [0, 1]),
        ({"column": "prompt", "min_chars": 7}, [1, 2, 3]),
        ({"column": "prompt", "max_chars": 7}, [0, 1]),
        ({"column": "prompt", "matches": r"^What|30\?"}, [1, 2, 3]),
        ({"column": "n.deep.1", "one_of": [8]}, [0, 2]),
    ],
)
def test_a_condition_on_a_column(condition: dict[str, Any], expected: list[int]) -> None:
    assert kept(condition) == expected


def test_filters_are_all_met_and_counted_in_their_order() -> None:
    source = load({"column": "score", "min": 0.2}, {"column": "prompt", "max_chars": 7})
    assert [task.prompt[0].content for task in source.epoch(0)] == ["2 + 30?"]
    assert source.summary().splitlines()[0] == (
        "4 rows read, 1 kept; 2 left out by filters.0 (score: min 0.2); "
        "1 left out by filters.1 (prompt: max_chars 7)"
    )


def test_rows_are_filtered_before_they_are_mapped_held_out_and_cut() -> None:
    """A row that could not be mapped may be filtered out, and skip counts what is left."""
    rows = [{"prompt": ""}, "aa", "a", "bb", "aa", "cc", "dd"]
    source = load({"column": "prompt", "min_chars": 2}, rows=rows, skip=1, limit=2)
    assert [task.prompt[0].content for task in source.epoch(0)] == ["bb", "cc"]
    alone = load(rows=rows[1:], holdout={"part": "test", "fraction": 0.5})
    both = load({"column": "prompt", "min_chars": 2}, rows=rows,
                holdout={"part": "test", "fraction": 0.5})  # fmt: skip
    assert list(both.epoch(0)) == [t for t in alone.epoch(0) if len(t.prompt[0].content) == 2]


def test_text_and_numbers_are_one_value_where_they_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,level,hard\na,1,true\nb,2,false\nc,3,true\n")

    def prompts(**condition: Any) -> str:
        keys = {"type": "file", "path": str(path), "shuffle": False, "filters": [condition]}
        source = load_tasks(ADAPTER.validate_python(keys), seed=0)
        return "".join(task.prompt[0].content for task in source.epoch(0))

    assert prompts(column="level", one_of=[1, "3"]) == "ac"
    assert prompts(column="level", none_of=[1]) == "bc"
    assert prompts(column="level", min=2) == "bc"
    assert prompts(column="hard", one_of=[True]) == "ac"
    mixed = [{"prompt": "a", "v": True}, {"prompt": "b", "v": 1.0}, {"prompt": "c", "v": "1"}]
    assert kept({"column": "v", "one_of": [1]}, rows=mixed) == [1, 2]


@pytest.mark.parametrize(
    ("value", "option", "same"),
    [
        ("True", True, True), ("false", False, True), (True, "true", True), ("1", True, False),
        ("1.0", 1, True), ("0.50", 0.5, True), (1, "1.0", True), ("1", 1.0, True),
        ("1e3", 1000, True), (2.5, "2.50", True), ("2", 1, False), ("one", 1, False),
        ("9007199254740993", 9007199254740992, False), ("nan", 1.0, False), ("sNaN", 1, False),
        ("1.0", "1", False), (True, 1, False), ("1", None, False),
    ],
)  # fmt: skip
def test_text_is_the_number_or_truth_value_that_it_reads_as(
    value: Any, option: Any, same: bool
) -> None:
    row = Row({"v": value}, "row 1")
    assert column_filter("v", place="filters.0", one_of=[option])(row) is same
    assert column_filter("v", place="filters.0", none_of=[option])(row) is not same


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ({"column": "leve", "one_of": [1]},
         r"prompts\[0\]: no column 'leve'; there is: prompt, level, score, n"),
        ({"column": "n.deeper", "one_of": [1]},
         r"prompts\[0\]: no column 'n.deeper'; in n there is: deep"),
        ({"column": "n.deep.2", "one_of": [1]}, "in n.deep there is: none"),
        ({"column": "level", "min": 1}, r"prompts\[0\]: filters.0: column 'level' holds 'Level 1', "
         "which is no number"),
        ({"column": "n", "min": 1}, "holds dict, not a number"),
        ({"column": "score", "matches": "x"}, "column 'score' holds float, not text"),
        ({"column": "level", "one_of": ["Level 7", "x"]},
         r"filters.0 \(level: one_of \['Level 7', 'x'\]\) keeps none of the 4 rows"),
        ({"function": "no_such_module:f"}, "no_such_module"),
    ],
)  # fmt: skip
def test_a_filter_that_does_not_fit_is_named(condition: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load(condition)


def test_a_column_that_one_row_lacks_is_an_error() -> None:
    rows = [{"prompt": "a", "v": 1}, {"prompt": "b"}]
    with pytest.raises(UserError, match=r"prompts\[1\]: no column 'v'; there is: prompt"):
        load({"column": "v", "min": 0}, rows=rows)


def test_what_a_fruitless_filter_says() -> None:
    first = {"column": "score", "min": 0.5}
    with pytest.raises(UserError) as caught:
        load(first, {"column": "level", "one_of": ["Level 1"]})
    assert "filters.1 (level: one_of ['Level 1']) keeps none of the 1 rows" in caught.value.cause
    assert caught.value.next_step == "Values there: 'Level 3'."


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("filter_functions")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_a_function_decides(module: ModuleType) -> None:
    def short(row: dict[str, Any], limit: int) -> bool:
        return len(row["prompt"]) < limit

    module.__dict__.update(short=short, unsure=lambda row: "maybe")
    assert kept({"function": "filter_functions:short", "params": {"limit": 8}}) == [0, 1]
    with pytest.raises(UserError, match=r"short does not take a row and params \{'limi': 8\}"):
        load({"function": "filter_functions:short", "params": {"limi": 8}})
    with pytest.raises(UserError, match=r"prompts\[0\]: filters.0: .* returned 'maybe', not"):
        load({"function": "filter_functions:unsure"})


def test_what_a_function_raises_is_told_with_the_row(module: ModuleType) -> None:
    def own(row: dict[str, Any]) -> bool:
        raise UserError("mine", "do this")

    module.__dict__.update(high=lambda row: row["score"] > 0.1, own=own)
    fault = r"prompts\[3\]: filters\.0: filter_functions:high raised TypeError: '>' not"
    with pytest.raises(UserError, match=fault) as caught:
        load({"function": "filter_functions:high"})
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(UserError, match=r"^mine"):
        load({"function": "filter_functions:own"})


def test_a_function_may_return_the_truth_value_of_an_array(module: ModuleType) -> None:
    module.__dict__["first"] = lambda row: np.array([7])[0] == row["n"]["deep"][0]
    assert kept({"function": "filter_functions:first"}) == [0, 1]


def test_tasks_of_a_function_are_filtered_by_what_they_hold(module: ModuleType) -> None:
    def task(i: int) -> Task:
        said = (Message("s", MessageType.SYSTEM), Message(f"p{i}", MessageType.MESSAGE))
        return Task(f"t{i}", said, i * 10, {"level": i % 2})

    module.__dict__["rows"] = lambda: [task(i) for i in range(4)]
    keys: dict[str, Any] = {"type": "python", "function": "filter_functions:rows"}

    def ids(**condition: Any) -> set[str]:
        source = ADAPTER.validate_python({**keys, "filters": [condition]})
        return {task.id for task in load_tasks(source, seed=0).epoch(0)}

    assert ids(column="level", one_of=[1]) == {"t1", "t3"}
    assert ids(column="answer", min=20) == {"t2", "t3"}
    assert ids(column="prompt", matches="[03]") == {"t0", "t3"}
    assert ids(column="id", one_of=["t1"]) == {"t1"}
    with pytest.raises(UserError, match="task 1: no column 'lvl'; there is: level, prompt"):
        ids(column="lvl", min=0)


def test_a_source_without_end_is_given_up(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forever() -> Iterator[str]:
        while True:
            yield "a"

    module.__dict__["forever"] = forever
    monkeypatch.setattr(selection, "_FRUITLESS_ROWS", 50)
    source = load_tasks(ADAPTER.validate_python({
        "type": "python", "function": "filter_functions:forever", "streaming": True,
        "filters": [{"column": "prompt", "matches": "b"}]}), seed=0)  # fmt: skip
    with pytest.raises(UserError, match=r"filters.0 \(prompt: .*\) keeps none of the 50 rows"):
        next(source.epoch(0))


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({}, "either column, with conditions, or function"),
        ({"column": "a", "function": "m:f"}, "either column, with conditions, or function"),
        ({"column": "a"}, "asks nothing of column a; one of: one_of, none_of, min"),
        ({"function": "m:f", "min": 1}, "min: has no effect with function"),
        ({"column": "a", "min": 1, "params": {"x": 1}}, "params has no effect"),
        ({"column": "a", "min": 2, "max": 1}, "no value is at least 2 and at most 1"),
        ({"column": "a", "min_chars": 2, "max_chars": 1}, "no value is at least 2"),
        ({"column": "a", "matches": "("}, "is no regular expression"),
        ({"column": "a", "one_of": []}, "at least 1 item"),
        ({"column": "a", "min": float("nan")}, "finite"),
    ],
)
def test_filters_that_cannot_act_are_refused(entry: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ADAPTER.validate_python({"type": "list", "prompts": ["a"], "filters": [entry]})


def test_a_misspelt_key_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match=r"unknown key prompt_source.filters.0.maxchars; did you m"):
        load_config({
            "model": {"name_or_path": "some/model"},
            "prompt_source": {"type": "list", "prompts": ["a"],
                              "filters": [{"column": "prompt", "maxchars": 3}]},
            "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
        })  # fmt: skip


values = st.none() | st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(["1", "-2", "0.5"])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(values, min_size=1, max_size=12), st.integers(-3, 3), st.booleans())
def test_bounds_keep_what_lies_between_them(seen: list[Any], bound: int, low: bool) -> None:
    rows = [{"prompt": f"p{i}", "v": value} for i, value in enumerate(seen)]
    expected = [
        i for i, v in enumerate(seen)
        if v is not None and (float(v) >= bound if low else float(v) <= bound)
    ]  # fmt: skip
    condition = {"column": "v", "min" if low else "max": bound}
    if expected:
        assert kept(condition, rows=rows) == expected
    else:
        with pytest.raises(UserError, match="keeps none"):
            kept(condition, rows=rows)
