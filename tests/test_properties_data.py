"""Any data source, cut anywhere: a restored cursor goes on as the uninterrupted one does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from retrain.config.data import PromptSourceConfig
from retrain.data import Cursor, TaskSource, Trace, TraceSource, load_tasks
from retrain.types import Message, MessageType, Task, UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)
ROWS = [{"prompt": f"p{i % 20}", "answer": i} for i in range(24)]
"""The last four repeat prompts."""


def load(seed: int = 0, **keys: Any) -> TaskSource:
    return load_tasks(ADAPTER.validate_python(keys), seed=seed)


def cursor(seed: int = 0, **keys: Any) -> Cursor[Task]:
    return Cursor(load(seed, **keys), place="prompt_source")


def through_json(data: Cursor[Any]) -> dict[str, Any]:
    position: dict[str, Any] = json.loads(json.dumps(data.position()))
    return position


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    lines = [json.dumps(row) for row in ROWS]
    (root / "x.jsonl").write_text("\n".join(lines))
    (root / "x.json").write_text(f"[{','.join(lines)}]")
    cells = ["prompt,answer", *(f"{row['prompt']},{row['answer']}" for row in ROWS)]
    (root / "x.csv").write_text("\n".join(cells))
    (root / "x.txt").write_text("\n".join(str(row["prompt"]) for row in ROWS))
    (root / "parts").mkdir()
    (root / "parts" / "1.jsonl").write_text("\n".join(lines[:9]))
    (root / "parts" / "2.jsonl").write_text("\n".join(lines[9:]))
    return root


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.fixture(autouse=True, scope="module")
def functions() -> Iterator[None]:
    made = ModuleType("cursor_functions")

    def rows(changed: int = -1, removed: int = -1) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(ROWS):
            if i != removed:
                yield {**row, "answer": "changed"} if i == changed else row

    def forever() -> Iterator[str]:
        return (f"p{i}" for i in count())

    def own() -> list[Task]:
        return [Task(f"own{i}", (Message(f"p{i}", MessageType.MESSAGE),), i) for i in range(12)]

    made.__dict__.update(rows=rows, forever=forever, own=own)
    sys.modules[made.__name__] = made
    yield
    del sys.modules[made.__name__]


@st.composite
def selections(draw: st.DrawFn, *, stream: bool = False) -> dict[str, Any]:
    """Keys that say which rows stay and in which order; some row always stays."""
    keys: dict[str, Any] = {
        "shuffle": draw(st.booleans()),
        "deduplicate": draw(st.booleans()),
        "skip": draw(st.integers(0, 3)),
        "limit": draw(st.none() | st.integers(1, 30)),
    }
    if draw(st.booleans()):
        keys["holdout"] = {"part": draw(st.sampled_from(["train", "test"])), "fraction": 0.5}
    if stream:
        keys["streaming"] = True
        if keys["shuffle"]:
            keys["shuffle_buffer"] = draw(st.none() | st.integers(1, 30))
    return keys


def check_resume(seed: int, cut: int, keys: dict[str, Any]) -> None:
    """The uninterrupted cursor and the restored one give equal items, over epochs."""
    whole = cursor(seed, **keys)
    list(islice(whole, cut))
    position = through_json(whole)
    expected = list(islice(whole, 40))
    fresh = cursor(seed, **keys)
    fresh.restore(position)
    assert fresh.position() == position
    assert list(islice(fresh, 40)) == expected
    assert fresh.position() == whole.position()


few = settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
seeds, cuts = st.integers(0, 5), st.integers(0, 60)


@few
@given(seeds, cuts, selections())
def test_a_list_resumes(seed: int, cut: int, keys: dict[str, Any]) -> None:
    check_resume(seed, cut, {"type": "list", "prompts": ROWS, **keys})


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt", "x.json", "parts"])
def test_a_file_resumes(folder: Path, name: str) -> None:
    @few
    @given(seeds, cuts, selections(stream=name != "x.json") | selections())
    def resumes(seed: int, cut: int, keys: dict[str, Any]) -> None:
        check_resume(seed, cut, {"type": "file", "path": str(folder / name), **keys})

    resumes()


def test_a_saved_dataset_resumes(saved: Path) -> None:
    @few
    @given(seeds, cuts, selections(stream=True) | selections())
    def resumes(seed: int, cut: int, keys: dict[str, Any]) -> None:
        check_resume(seed, cut, {"type": "hf_dataset", "path": str(saved), **keys})

    resumes()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_of_data_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    keys = {"type": "hf_dataset", "path": str(folder / "parts"), "streaming": streaming}
    for cut in (0, 7, 33):
        check_resume(1, cut, keys)


def test_generated_tasks_resume() -> None:
    pytest.importorskip("reasoning_gym")

    @few
    @given(seeds, cuts, selections())
    def resumes(seed: int, cut: int, keys: dict[str, Any]) -> None:
        check_resume(
            seed, cut, {"type": "reasoning_gym", "dataset": "basic_arithmetic", "size": 24, **keys}
        )

    resumes()


@few
@given(seeds, cuts, selections(stream=True) | selections(), st.sampled_from(["rows", "own"]))
def test_a_function_resumes(seed: int, cut: int, keys: dict[str, Any], name: str) -> None:
    check_resume(seed, cut, {"type": "python", "function": f"cursor_functions:{name}", **keys})


@few
@given(seeds, cuts, selections(stream=True))
def test_a_function_without_end_resumes(seed: int, cut: int, keys: dict[str, Any]) -> None:
    check_resume(seed, cut, {"type": "python", "function": "cursor_functions:forever", **keys})


TRACES = [Trace(f"t{i}", (Message(f"said {i}", MessageType.MODEL),)) for i in range(17)]


@few
@given(seeds, cuts, st.booleans())
def test_traces_resume(seed: int, cut: int, shuffle: bool) -> None:
    source = TraceSource(TRACES, shuffle=shuffle, seed=seed)
    whole = Cursor(source, place="sft.dataset", noun="trace")
    list(islice(whole, cut))
    again = Cursor(source, place="sft.dataset", noun="trace")
    again.restore(through_json(whole))
    assert list(islice(again, 40)) == list(islice(whole, 40))


@few
@given(st.data(), st.integers(1, 60), st.booleans(), st.booleans())
def test_a_changed_or_removed_row_is_refused(
    data: st.DataObject, cut: int, shuffle: bool, streaming: bool
) -> None:
    keys: dict[str, Any] = {
        "type": "python",
        "function": "cursor_functions:rows",
        "shuffle": shuffle,
        "streaming": streaming,
        "deduplicate": False,
    }
    whole = cursor(**keys)
    epoch, last = list(islice(whole, cut))[-1]
    in_epoch = int(whole.position()["taken"])
    seen = [task.answer for task in islice(load(**keys).epoch(epoch), in_epoch)]
    assert seen[-1] == last.answer
    row = data.draw(st.sampled_from(seen))
    changed = cursor(**keys, params={"changed": row})
    with pytest.raises(UserError, match=f"among tasks 1 to {in_epoch} of epoch {epoch}"):
        changed.restore(through_json(whole))
    removed = cursor(**keys, params={"removed": row})
    with pytest.raises(UserError, match="prompt_source: the data is not what"):
        removed.restore(through_json(whole))
