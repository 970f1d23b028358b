"""SFT traces from files and datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from retrain.data.traces import load_traces
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
