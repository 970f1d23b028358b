"""Prompt sources: column mapping, selection, order, and every key that acts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from retrain.config.data import PromptSourceConfig
from retrain.data.sources import TaskSource, load_tasks
from retrain.types import Message, MessageType, Task, UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)
NUMBERS = [f"n{i}" for i in range(40)]


def load(seed: int = 0, **keys: Any) -> TaskSource:
    return load_tasks(ADAPTER.validate_python(keys), seed=seed)


def of(*prompts: Any, **keys: Any) -> TaskSource:
    return load(type="list", prompts=list(prompts), **{"shuffle": False, **keys})


def tasks(*prompts: Any, **keys: Any) -> list[Task]:
    return list(of(*prompts, **keys).epoch(0))


def texts(source: TaskSource, epoch: int = 0) -> list[str]:
    return [task.prompt[-1].content for task in source.epoch(epoch)]


def user(text: str) -> Message:
    return Message(text, MessageType.MESSAGE, role="user")


# --- rows to tasks ---


def test_a_row_becomes_a_task() -> None:
    (task,) = tasks({"q": "2+3?", "a": 5, "level": 1, "key": "k7"}, prompt_column="q",
                    answer_column="a", id_column="key")  # fmt: skip
    assert task == Task("k7", (user("2+3?"),), 5, {"level": 1})


def test_a_bare_string_is_a_prompt_without_an_answer() -> None:
    (task,) = tasks("2+3?")
    assert (task.prompt, task.answer, task.metadata) == ((user("2+3?"),), None, {})


def test_the_default_answer_column_is_optional_and_can_be_switched_off() -> None:
    assert tasks({"prompt": "x"})[0].answer is None
    (task,) = tasks({"prompt": "x", "answer": 1}, answer_column=None)
    assert (task.answer, task.metadata) == (None, {"answer": 1})


def test_metadata_columns_are_those_named() -> None:
    (task,) = tasks({"prompt": "x", "u": 1, "v": 2}, metadata_columns=["v", "prompt"])
    assert task.metadata == {"v": 2, "prompt": "x"}


def test_template_and_system_prompt() -> None:
    (task,) = tasks(
        {"q": "2+3", "unit": "m", "p": 0.126},
        prompt_column="q",
        prompt_template="What is {prompt} in {unit}? {{{p:.2f}}}",
        system_prompt="Be brief.",
    )
    system = Message("Be brief.", MessageType.SYSTEM)
    assert task.prompt == (system, user("What is 2+3 in m? {0.13}"))


def test_a_template_without_prompt_needs_no_prompt_column() -> None:
    (task,) = tasks({"u": 1, "v": 2}, prompt_template="{u}+{v}?")
    assert task.prompt == (user("1+2?"),)


def test_messages_as_the_prompt() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "2+3?"}]  # fmt: skip
    expected = (
        Message("Add.", MessageType.SYSTEM),
        user("hi"),
        Message("yes?", MessageType.MODEL),
        user("2+3?"),
    )
    for value in (chat, json.dumps(chat)):
        (task,) = tasks({"chat": value, "prompt": "x"}, messages_column="chat",
                        system_prompt="Add.")  # fmt: skip
        assert task.prompt == expected
        assert task.metadata == {"prompt": "x"}


def test_ids_depend_on_the_prompt_alone() -> None:
    first, second = tasks("a", "b")
    (again,) = tasks({"prompt": "b", "answer": 9})
    assert second.id == again.id != first.id
    assert tasks("b", system_prompt="s")[0].id != second.id
    assert first.id == "1bcf70d3ddcf82c4"


@pytest.mark.parametrize(
    ("row", "keys", "fault"),
    [
        ({"q": "x"}, {}, r"prompts\[1\]: no column 'prompt'; there is: q"),
        ({"prompt": "x"}, {"answer_column": "gold"}, "no column 'gold'; there is: prompt"),
        ({"prompt": "x"}, {"metadata_columns": ["m"]}, "no column 'm'"),
        ({"prompt": "x"}, {"id_column": "i"}, "no column 'i'"),
        ({"prompt": "x", "i": None}, {"id_column": "i"}, "the id .* is empty"),
        ({"prompt": "x"}, {"prompt_template": "{prompt}{u}"}, "no column 'u'; there is: prompt"),
        ({"prompt": "x"}, {"prompt_template": "{prompt:d}"}, "prompt_template does not fit"),
        ({"prompt": "x", "u": " "}, {"prompt_template": "{u}"}, "the prompt is empty"),
        ({"prompt": " "}, {}, r"prompts\[1\]: the prompt .* is empty"),
        ("", {}, "is empty"),
        ({"prompt": None}, {}, "is empty"),
        ({"prompt": 3}, {}, "is int, not text"),
        ({"prompt": [{"role": "user", "content": "x"}]}, {}, "messages_column: prompt"),
        ({"prompt": "\ud800"}, {}, "surrogate"),
        ({"c": []}, {"messages_column": "c"}, "is empty"),
        ({"c": None}, {"messages_column": "c"}, "holds nothing"),
        ({"c": [{"role": "assistant", "content": "x"}]}, {"messages_column": "c"}, "ends with"),
        ({"c": [{"role": "user", "content": ""}]}, {"messages_column": "c"}, "is empty"),
        ({"c": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
         {"messages_column": "c", "system_prompt": "t"}, "have a system message already"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row: Any, keys: dict[str, Any], fault: str) -> None:
    good = {
        "prompt": "ok", "gold": 1, "m": 1, "i": 1, "u": "1",
        "c": [{"role": "user", "content": "ok"}],
    }  # fmt: skip
    if keys.get("prompt_template") == "{prompt:d}":
        good = row
    with pytest.raises(UserError, match=fault):
        tasks(good, row, **keys)


# --- which rows stay ---


def test_duplicates_are_dropped_and_counted() -> None:
    source = of({"prompt": "a", "answer": 1}, "b", {"prompt": "a", "answer": 2})
    assert [(task.prompt[0].content, task.answer) for task in source.epoch(0)] == [
        ("a", 1), ("b", None)]  # fmt: skip
    assert source.summary().startswith("3 rows read, 2 kept; 1 with a prompt seen before")


def test_kept_duplicates_have_different_ids() -> None:
    first, second = tasks("a", "a", deduplicate=False)
    assert first.prompt == second.prompt and first.id != second.id


def test_an_id_names_one_task() -> None:
    with pytest.raises(UserError, match="two tasks have the id 'k'"):
        of({"prompt": "a", "k": "k"}, {"prompt": "b", "k": "k"}, id_column="k")


def test_skip_and_limit_count_what_is_left() -> None:
    source = of("a", "a", "b", "c", "d", skip=1, limit=2)
    assert texts(source) == ["b", "c"]
    assert "1 skipped" in source.summary()


def test_a_holdout_splits_by_content() -> None:
    def part(name: str, **keys: Any) -> set[str]:
        return set(texts(of(*NUMBERS, holdout={"part": name, **keys})))

    train, test = part("train"), part("test")
    assert train | test == set(NUMBERS) and not train & test
    assert 4 <= len(test) <= 16
    assert part("test", seed=1) != test
    assert part("test", fraction=0.1) < test < part("test", fraction=0.9)
    fewer = of(*NUMBERS[::-3], " n0 ", holdout={"part": "test"}, system_prompt="s")
    assert {text.strip() for text in texts(fewer)} == test & {*NUMBERS[::-3], "n0"}
    wrapped = of(*NUMBERS, holdout={"part": "test"}, prompt_template="<{prompt}>")
    assert {text[1:-1] for text in texts(wrapped)} == test


def test_no_task_left_is_an_error() -> None:
    with pytest.raises(UserError, match="no task: 2 rows read, 0 kept; 2 skipped"):
        of("a", "b", skip=5)


# --- order ---


def test_epochs_are_shuffled_by_seed_and_number() -> None:
    source = of(*NUMBERS, shuffle=True)
    first, second = texts(source, 0), texts(source, 1)
    assert sorted(first) == sorted(second) == sorted(NUMBERS)
    assert first not in (second, NUMBERS) and second != NUMBERS
    assert texts(source, 0) == first == texts(of(*NUMBERS, shuffle=True), 0)
    assert texts(load(1, type="list", prompts=NUMBERS)) != first
    assert texts(of(*NUMBERS), 3) == NUMBERS
    assert len(source) == 40


def test_a_stream_shuffles_within_its_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\n".join(NUMBERS))
    source = load(type="file", path=str(path), streaming=True, shuffle_buffer=4)
    first, second = texts(source, 0), texts(source, 1)
    assert sorted(first) == sorted(second) == sorted(NUMBERS)
    assert first not in (second, NUMBERS)
    assert texts(source, 0) == first
    assert all(int(text[1:]) <= place + 4 for place, text in enumerate(first))
    with pytest.raises(TypeError):
        len(source)


def test_a_stream_reads_no_further_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('"a"\n"b"\n{broken\n')
    keys: dict[str, Any] = {"type": "file", "path": str(path), "shuffle": False}
    source = load(**keys, streaming=True)
    assert [t.prompt[0].content for t in islice(source.epoch(0), 2)] == ["a", "b"]
    assert "user: a" in source.summary()
    with pytest.raises(UserError, match="line 3: malformed JSON"):
        list(source.epoch(0))
    with pytest.raises(UserError, match="line 3: malformed JSON"):
        load(**keys)
    assert texts(load(**keys, limit=2)) == ["a", "b"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.parquet"])
def test_streaming_gives_the_tasks_that_loading_gives(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"prompt": NUMBERS}), path)
    else:
        lines = [json.dumps(n) for n in NUMBERS] if name == "x.jsonl" else NUMBERS
        path.write_text("\n".join(["prompt", *lines] if name == "x.csv" else lines))
    keys: dict[str, Any] = {
        "type": "file",
        "path": str(path),
        "shuffle": False,
        "holdout": {"part": "train"},
    }
    loaded = list(load(**keys).epoch(0))
    assert loaded == list(load(**keys, streaming=True).epoch(2)) and len(loaded) > 20


def test_json_and_empty_files_cannot_stream(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('["a"]')
    assert texts(load(type="file", path=str(tmp_path / "x.json"))) == ["a"]
    with pytest.raises(UserError, match="can only be read as a whole"):
        load(type="file", path=str(tmp_path / "x.json"), streaming=True)
    (tmp_path / "x.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no task: 0 rows read"):
        load(type="file", path=str(tmp_path / "x.txt"))
    with pytest.raises(UserError, match="no task: 0 rows read"):
        list(load(type="file", path=str(tmp_path / "x.txt"), streaming=True).epoch(0))


def test_the_summary_shows_the_first_task() -> None:
    source = of({"prompt": "2+3?", "answer": 5, "level": 1}, system_prompt="Add.", id_column=None)
    lines = source.summary().splitlines()
    assert lines[0] == "1 rows read, 1 kept"
    assert lines[2:] == ["  system: Add.", "  user: 2+3?", "  answer: 5", "  metadata: level"]


# --- python ---


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("prompt_functions")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_a_function_gives_rows_or_tasks(module: ModuleType) -> None:
    def rows(count: int) -> Iterator[Any]:
        for i in range(count):
            yield {"prompt": f"p{i}", "answer": i}
        yield Task("own", (user("t"),), answer="x")

    module.__dict__["rows"] = rows
    source = load(type="python", function="prompt_functions:rows", params={"count": 2},
                  shuffle=False, system_prompt="s")  # fmt: skip
    assert [task.answer for task in source.epoch(0)] == [0, 1, "x"]
    own = list(source.epoch(0))[2]
    assert own.id == "own" and own.prompt == (Message("s", MessageType.SYSTEM), user("t"))


def test_a_stream_may_have_no_end(module: ModuleType) -> None:
    def forever() -> Iterator[str]:
        i = 0
        while True:
            yield f"p{i}"
            i += 1

    module.__dict__["forever"] = forever
    source = load(type="python", function="prompt_functions:forever", streaming=True)
    epoch = source.epoch(0)
    assert len({next(epoch).id for _ in range(50)}) == 50
    keys: dict[str, Any] = {"type": "python", "function": "prompt_functions:forever", "limit": 3}
    assert sorted(texts(load(**keys))) == ["p0", "p1", "p2"]


def test_a_function_that_gives_no_rows_is_refused(module: ModuleType) -> None:
    module.__dict__.update(text=lambda: "a", one=lambda: 1, thing=3)
    module.__dict__["numbers"] = lambda: [1]
    module.__dict__["tasks"] = lambda: [Task("own", (user("t"),))]
    for name, fault in (("text", "returned str"), ("one", "returned int"),
                        ("thing", "not callable"), ("numbers", "found int"),
                        ("absent", "absent")):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            load(type="python", function=f"prompt_functions:{name}")
    with pytest.raises(UserError, match="a Task already, so prompt_template has no effect"):
        load(type="python", function="prompt_functions:tasks", prompt_template="{prompt}!")


# --- datasets ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_and_directories_of_data(tmp_path: Path, streaming: bool) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, 2]})
    table.save_to_disk(tmp_path / "one")
    splits = {"train": table.select([0]), "test": table.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table.to_json(tmp_path / "folder" / "train.jsonl")

    def answers(path: str, **keys: Any) -> list[Any]:
        source = load(type="hf_dataset", path=str(tmp_path / path), streaming=streaming,
                      shuffle=False, **keys)  # fmt: skip
        return [task.answer for task in source.epoch(0)]

    assert answers("one") == answers("folder") == [1, 2]
    assert answers("splits", split="test") == [2]
    for path, keys, fault in (
        ("splits", {"split": "dev"}, "no split 'dev'; there is: train, test"),
        ("one", {"split": "test"}, "no split 'test'; there is: train"),
        ("one", {"name": "main"}, "name .* has no effect"),
        ("folder", {"split": "dev"}, "cannot load the dataset"),
        ("absent", {}, "cannot load the dataset"),
    ):
        with pytest.raises(UserError, match=fault):
            answers(path, **keys)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files"):
        answers("empty")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'retrain\[data\]'"):
        load(type="hf_dataset", path="org/name")
    with pytest.raises(UserError, match=r"pip install 'retrain\[reasoning-gym\]'"):
        load(type="reasoning_gym", dataset="basic_arithmetic")


# --- the config itself ---


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"type": "lists", "prompts": ["a"]}, "'list'"),
        ({"prompts": []}, "at least 1 item"),
        ({"promts": ["a"]}, "promts"),
        ({"limit": 0}, "greater than 0"),
        ({"skip": -1}, "greater than or equal to 0"),
        ({"prompt_template": "no column"}, "names no column"),
        ({"prompt_template": "{"}, "'{'"),
        ({"prompt_template": "{}"}, "not a column name"),
        ({"prompt_template": "{prompt.__class__}"}, "not a column name"),
        ({"system_prompt": " "}, "is blank"),
        ({"messages_column": "m", "prompt_template": "{m}"}, "prompt_template has no effect"),
        ({"messages_column": "m", "prompt_column": "q"}, "prompt_column has no effect"),
        ({"holdout": {"part": "dev"}}, "'train' or 'test'"),
        ({"holdout": {"part": "test", "fraction": 1.0}}, "less than 1"),
        ({"streaming": True}, "streaming"),
        ({"type": "file", "path": "x", "shuffle_buffer": 5}, "shuffle_buffer acts only"),
        ({"type": "file", "path": "x", "format": "xml"}, "'parquet'"),
        ({"type": "reasoning_gym", "dataset": "x", "params": {"size": 3}}, "key of its own"),
    ],
)
def test_keys_that_cannot_act_are_refused(keys: dict[str, Any], fault: str) -> None:
    source = keys if "type" in keys else {"type": "list", "prompts": ["a"], **keys}
    with pytest.raises(ValidationError, match=fault):
        ADAPTER.validate_python(source)
