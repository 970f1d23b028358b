"""Columns inside columns, constants of a source, and parts of splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from retrain.config.data import PromptSourceConfig
from retrain.data import load_tasks
from retrain.types import Task, UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)
ROW = {
    "prompt": [{"role": "user", "content": "2 + 3?"}],
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 7, "dotted.name": 1},
    "turns": [{"text": "Add them."}],
}


def tasks(**keys: Any) -> list[Task]:
    return list(load_tasks(ADAPTER.validate_python({"shuffle": False, **keys}), seed=0).epoch(0))


def test_columns_inside_columns_are_mapped() -> None:
    (task,) = tasks(
        type="list",
        prompts=[ROW],
        messages_column="prompt",
        answer_column="reward_model.ground_truth",
        id_column="extra_info.index",
        metadata_columns=["reward_model.style", "turns.0.text"],
    )
    assert (task.id, task.answer) == ("7", "5")
    assert task.metadata == {"reward_model.style": "rule", "turns.0.text": "Add them."}
    (task,) = tasks(type="list", prompts=[ROW], prompt_column="turns.0.text")
    assert task.prompt[0].content == "Add them."


def test_a_column_of_that_very_name_comes_first() -> None:
    row = {"prompt": "x", "a.b": 1, "a": {"b": 2}}
    (task,) = tasks(type="list", prompts=[row], answer_column="a.b")
    assert task.answer == 1


def test_a_name_that_is_not_inside_is_told_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"no column 'reward_model.truth'; in reward_model there "
                                        "is: style, ground_truth"):  # fmt: skip
        tasks(type="list", prompts=[ROW], messages_column="prompt",
              answer_column="reward_model.truth")  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_nested_columns_of_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.jsonl":
        path.write_text(json.dumps(ROW))
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([ROW]), path)
    (task,) = tasks(type="file", path=str(path), messages_column="prompt",
                    answer_column="reward_model.ground_truth")  # fmt: skip
    assert (task.prompt[0].content, task.answer) == ("2 + 3?", "5")


def test_metadata_constants_are_added_to_each_task() -> None:
    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}]
    first, second = tasks(type="list", prompts=rows, metadata={"tools": ["python"], "kind": "sum"})
    assert first.metadata == {"level": 1, "tools": ["python"], "kind": "sum"}
    assert second.metadata == {"level": 2, "tools": ["python"], "kind": "sum"}
    with pytest.raises(UserError, match=r"prompts\[0\]: has the metadata 'level', which"):
        tasks(type="list", prompts=rows, metadata={"level": 3})
    (task, _) = tasks(type="list", prompts=rows, metadata={"level": 3}, metadata_columns=[])
    assert task.metadata == {"level": 3}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(10)]
    table = datasets.Dataset.from_list(rows)
    splits = {"train": table.select(range(8)), "test": table.select([8, 9])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    for name, part in splits.items():
        part.to_json(tmp_path / "folder" / f"{name}.jsonl")
    return tmp_path


PARTS = {
    "train": list(range(8)),
    "train[:3]": [0, 1, 2],
    "train[2:4]": [2, 3],
    "train[5:]": [5, 6, 7],
    "train[6:100]": [6, 7],
}
SHARES = {"train[75%:]": [6, 7], "train[-2:]": [6, 7], "train[:1]+test": [0, 8, 9]}


@pytest.mark.parametrize(("split", "expected"), [*PARTS.items(), *SHARES.items()])
@pytest.mark.parametrize("path", ["splits", "folder"])
def test_parts_of_a_split(saved: Path, path: str, split: str, expected: list[int]) -> None:
    keys = {"type": "hf_dataset", "path": str(saved / path), "split": split}
    assert [task.answer for task in tasks(**keys)] == expected
    if path == "splits" or split in PARTS:
        assert [task.answer for task in tasks(**keys, streaming=True)] == expected
    else:
        with pytest.raises(UserError, match="is not one of rows"):
            tasks(**keys, streaming=True)


@pytest.mark.parametrize("split", ["dev", "dev[:2]", "train[:x]", "train["])
def test_parts_that_there_are_not(saved: Path, split: str) -> None:
    with pytest.raises(UserError, match=r"no split '.*'; there is: train, test"):
        tasks(type="hf_dataset", path=str(saved / "splits"), split=split)
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"dev|train"):
            tasks(type="hf_dataset", path=str(saved / "folder"), split=split, streaming=streaming)
    with pytest.raises(UserError, match="has no row"):
        tasks(type="hf_dataset", path=str(saved / "folder"), split="train[3:2]", streaming=True)
