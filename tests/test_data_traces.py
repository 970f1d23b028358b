"""SFT traces from files and datasets."""

from __future__ import annotations

import json
import sys
import tracemalloc
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import pytest

from retrain.data import Cursor, Trace, TraceReader, TraceStream, load_traces
from retrain.data.traces import prompt_key
from retrain.types import Message, MessageType, ToolCall, UserError

SAID = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
MESSAGES = (
    Message("2+3?", MessageType.MESSAGE, role="user"),
    Message("5", MessageType.MODEL),
)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_container_gives_the_same_messages(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": SAID}]
    (tmp_path / "t.json").write_text(json.dumps(rows), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", *rows)
    for path in (jsonl(tmp_path / "t.jsonl", *rows), "t.json", "t.parquet", "saved", "folder"):
        (trace,) = load_traces(tmp_path / path)
        assert trace.messages == MESSAGES, path


def test_prompt_and_completion_are_text_or_messages(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl",
        {"prompt": "2+3?", "completion": "5"},
        {"prompt": SAID[:1], "completion": SAID[1:]},
    )
    assert [trace.messages for trace in load_traces(path)] == [MESSAGES, MESSAGES]


def test_columns_can_be_named_and_rows_limited(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"q": "2+3?", "a": "5"}, {"bad": 1})
    (trace,) = load_traces(path, prompt="q", completion="a", limit=1)
    assert trace.messages == MESSAGES


def test_a_system_prompt_goes_before_those_without_one(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Own."}
    path = jsonl(tmp_path / "t.jsonl", {"messages": SAID}, {"messages": [own, *SAID]})
    first, second = load_traces(path, system_prompt="Add.")
    assert first.messages == (Message("Add.", MessageType.SYSTEM), *MESSAGES)
    assert second.messages == (Message("Own.", MessageType.SYSTEM), *MESSAGES)


def test_tool_traces_from_arrow_have_no_foreign_arguments(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def said(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [SAID[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}

    rows = [said("add", {"x": 2}), said("search", {"query": "five"})]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    calls = [trace.messages[1].tool_calls for trace in load_traces(tmp_path / "t.parquet")]
    assert calls == [
        (ToolCall("add", {"x": 2}, id="1"),),
        (ToolCall("search", {"query": "five"}, id="1"),),
    ]


def test_tool_schemas_travel_with_the_trace(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "calc", "parameters": {}}}
    path = jsonl(
        tmp_path / "t.jsonl",
        {"messages": SAID, "tools": [schema]},
        {"messages": SAID, "tools": json.dumps([schema])},
        {"messages": SAID},
    )
    assert [trace.tools for trace in load_traces(path)] == [(schema,), (schema,), ()]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": SAID[:1]}, "line 2: no assistant message"),
        ({"messages": []}, "line 2: no assistant message"),
        ({"text": "x"}, "line 2: a trace needs the column 'messages'.*there is: text"),
        ({"prompt": "x", "completion": " "}, "line 2: the column 'completion' is empty"),
        ({"messages": [*SAID, {"role": "bot", "content": ""}]}, "line 2, message 3: unknown role"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "line 2, message 1: .*nothing"),
        ({"messages": "[{"}, "line 2: column 'messages' is neither"),
        ({"messages": 3}, "line 2: column 'messages' holds int"),
        ({"messages": SAID, "tools": "f"}, "line 2: the column 'tools' is not JSON"),
        ({"messages": SAID, "tools": ["f"]}, "line 2: the column 'tools' is not a list of obj"),
    ],
)
def test_a_bad_trace_is_named_by_its_line(tmp_path: Path, row: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load_traces(jsonl(tmp_path / "t.jsonl", {"messages": SAID}, row))


def test_no_traces_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no trace"):
        load_traces(jsonl(tmp_path / "t.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        load_traces(tmp_path / "absent.jsonl")


def test_a_name_with_a_dot_is_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'retrain\[data\]'"):
        load_traces("org/traces-v1.5")
    with pytest.raises(UserError, match="no such file"):
        load_traces("org/traces.jsonl")


# Streams


def numbered(path: Path, n: int) -> Path:
    return jsonl(path, *({"prompt": f"{i}?", "completion": str(i)} for i in range(n)))


def asked(traces: Any) -> list[int]:
    return [int(trace.messages[0].content.removesuffix("?")) for trace in traces]


def test_a_stream_is_the_file_again_in_every_epoch(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.jsonl", 30)
    plain = TraceStream(TraceReader(path), shuffle_buffer=None, seed=0)
    assert list(plain.epoch(0)) == list(plain.epoch(1)) == load_traces(path)
    assert length_hint(plain, -1) == -1
    with pytest.raises(TypeError, match="no length"):
        len(plain)
    assert plain.preview() == load_traces(path, limit=16)
    mixed = TraceStream(TraceReader(path), shuffle_buffer=10, seed=0)
    first, second = asked(mixed.epoch(0)), asked(mixed.epoch(1))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second != list(range(30)) and first == asked(mixed.epoch(0))
    assert max(i - place for place, i in enumerate(first)) <= 10, "no more than it holds"
    assert asked(TraceStream(TraceReader(path), shuffle_buffer=10, seed=1).epoch(0)) != first


def test_every_container_but_json_streams(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": SAID}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    jsonl(tmp_path / "t.jsonl", *rows)
    (tmp_path / "t.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("t.jsonl", "t.parquet", "saved"):
        reader = TraceReader(tmp_path / name)
        reader.check_streams()
        assert [trace.messages for trace in reader.read()] == [MESSAGES]
    TraceReader("pkg.module:name").check_streams()
    with pytest.raises(UserError, match=r"t\.json is JSON, which can only be read as a whole"):
        TraceReader(tmp_path / "t.json").check_streams()


def test_a_position_in_a_stream_is_found_again(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.jsonl", 20)

    def cursor() -> Cursor[Trace]:
        stream = TraceStream(TraceReader(path), shuffle_buffer=5, seed=3)
        return Cursor(stream, place="sft.dataset", noun="trace")

    data = cursor()
    list(islice(data, 27))
    position = data.position()
    assert (position["epoch"], position["taken"]) == (1, 7) and "size" not in position
    again = cursor()
    again.restore(position)
    assert list(islice(again, 30)) == list(islice(data, 30))
    numbered(path, 4)
    with pytest.raises(UserError, match=r"sft\.dataset: the data is not what the run was trained"):
        cursor().restore(position)


def test_a_streams_bad_row_is_named_when_it_comes(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.jsonl", 30)
    with path.open("a") as file:
        file.write('{"messages": []}\n')
    stream = TraceStream(TraceReader(path), shuffle_buffer=None, seed=0)
    traces = stream.epoch(0)
    assert asked(islice(traces, 30)) == list(range(30))
    with pytest.raises(UserError, match=r"t\.jsonl, line 31: no assistant message"):
        next(traces)


def test_a_stream_holds_no_more_than_its_buffer(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        path = tmp_path / f"{n}.jsonl"
        jsonl(path, *({"prompt": f"{i}?", "completion": "x" * 1000} for i in range(n)))
        stream = TraceStream(TraceReader(path), shuffle_buffer=50, seed=0)
        tracemalloc.start()
        assert sum(1 for _ in stream.epoch(0)) == n
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(4000) < 1.3 * peak(400) < 1_000_000


def test_traces_of_one_prompt_have_one_key(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl",
        {"prompt": "2+3?", "completion": "5"},
        {"prompt": "2+3?", "completion": "five"},
        {"messages": [*SAID, {"role": "user", "content": "sure?"}, SAID[1]]},
        {"prompt": "3+3?", "completion": "6"},
        {"messages": [{"role": "assistant", "content": "Ask."}]},
    )
    keys = [prompt_key(trace) for trace in load_traces(path)]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 3
