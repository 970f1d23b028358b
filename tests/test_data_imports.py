"""Logs of messages, pairs and the gateway as conversations; calls of one put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrain.data.imports import Fault, Logged, read_logs
from retrain.gateway.ask import Ask, Choice, Reply
from retrain.gateway.records import RecordedSession, Records
from retrain.types import Message, MessageType, ToolCall, UserError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, identity: str = "c1") -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, rows: list[Any], **options: Any) -> list[Logged]:
    found = read_logs([written(path, rows)], **options)
    assert all(isinstance(item, Logged) for item in found), found
    return [item for item in found if isinstance(item, Logged)]


def outline(logged: Logged) -> str:
    """`u:` a party's, `a:` not trained, `A:` trained, `t:` a tool's."""
    letters = {MessageType.SYSTEM: "s", MessageType.TOOL: "t", MessageType.MODEL: "A"}
    return " ".join(
        f"{letters.get(m.type, 'a' if m.role == 'assistant' else 'u')}:"
        + (m.content or ",".join(c.name for c in m.tool_calls))
        for m in logged.trace.messages
    )


def test_whole_conversations_train_but_for_weight_0(tmp_path: Path) -> None:
    tools = [{"name": "price", "parameters": {"type": "object", "properties": {}}}]
    row = {
        "id": "x",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"text": "brief"}]},
            user("1?"),
            said("one", weight=0),
            user("Pen?"),
            said("", function_call={"name": "price", "arguments": '{"of": "pen", "in": null}'}),
            {"role": "function", "name": "price", "content": "7"},
            said("7"),
        ],
        "functions": tools,
        "score": True,
        "answer": "7",
    }
    [logged] = read(tmp_path / "log.jsonl", [row])
    assert outline(logged) == "s:Be brief u:1? a:one u:Pen? A:price t:7 A:7"
    [called] = logged.trace.messages[4].tool_calls
    assert (called.name, called.arguments) == ("price", {"of": "pen", "in": None})
    assert logged.trace.tools[0]["function"]["name"] == "price"
    assert (logged.reward, logged.metadata["answer"]) == (1.0, "7")
    assert logged.trace.place == f"{tmp_path}/log.jsonl:1"


def test_pairs_in_the_shapes_of_three_apis(tmp_path: Path) -> None:
    chat = {
        "request": {"model": "m", "messages": [user("Pen?")], "tools": [{"type": "function",
                    "function": {"name": "price", "parameters": {}}}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls":
                     [call("price", '{"of": "pen"}')]}, "finish_reason": "tool_calls"}]},
    }  # fmt: skip
    anthropic = {
        "request": {
            "model": "c",
            "system": [{"type": "text", "text": "Be brief"}],
            "messages": [
                user("Cup?"),
                {"role": "assistant", "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "price", "input": {"of": "cup"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1",
                     "content": [{"type": "text", "text": "8"}]},
                    {"type": "text", "text": "Go on."}]},
            ],
            "tools": [{"name": "price", "description": "d", "input_schema": {"type": "object"}}],
        },
        "response": {"role": "assistant", "stop_reason": "max_tokens", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "8"}]},
    }  # fmt: skip
    responses = {
        "request": {"body": {"instructions": "Be brief", "input": [
            user("Mug?"),
            {"type": "function_call", "call_id": "f1", "name": "price", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "f1", "output": "9"}]}},
        "response": {"body": {"status": "completed", "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "id": "m", "role": "assistant",
             "content": [{"type": "output_text", "text": "9"}]},
            {"type": "function_call", "call_id": "f2", "name": "stop", "arguments": "{}"}]}},
    }  # fmt: skip
    first, second, third = read(tmp_path / "log.jsonl", [chat, anthropic, responses])
    assert outline(first) == "u:Pen? A:price"
    assert first.trace.messages[1].tool_calls == (ToolCall("price", {"of": "pen"}, "c1"),)
    assert (first.metadata["model"], first.truncated) == ("m", False)
    assert outline(second) == "s:Be brief u:Cup? a:Let me see. t:8 u:Go on. A:8"
    assert second.trace.messages[2].tool_calls[0].arguments == {"of": "cup"}
    assert second.trace.messages[3].tool_call_id == "t1"
    assert (second.trace.messages[5].reasoning, second.truncated) == ("hm", True)
    schema = second.trace.tools[0]["function"]
    assert (schema["description"], schema["parameters"]) == ("d", {"type": "object"})
    assert outline(third) == "s:Be brief u:Mug? a:price t:9 A:9"
    reply = third.trace.messages[-1]
    assert (reply.reasoning, reply.tool_calls) == ("hm", (ToolCall("stop", {}, "f2"),))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("1?")], "response": "one"},
        {"messages": [user("1?")], "completion": said("one")},
        {"messages": [user("1?")], "choices": [{"message": said("one")}]},
        {"prompt": "1?", "completion": "one"},
        {"prompt": [user("1?")], "completion": [said("one")]},
        {"request": {"messages": [user("1?")]}, "response": {"message": said("one")}},
        {"request": json.dumps({"messages": [user("1?")]}), "response": json.dumps(said("one"))},
        {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "one"}]},
        [user("1?"), said("one")],
    ],
)
def test_ways_to_write_one_exchange(row: Any, tmp_path: Path) -> None:
    [logged] = read(tmp_path / "log.jsonl", [row])
    assert outline(logged) == "u:1? A:one"


def test_calls_of_one_conversation_are_put_together(tmp_path: Path) -> None:
    """What only an input said does not train; the reply reads as it was returned, not as later
    inputs repeat it."""
    shots = [user("1?"), said("one")]
    first = [*shots, user("Pen?")]
    reply = {**said("Look:  "), "reasoning": "hm", "tool_calls": [call("price", '{"a":1,"b":2}')]}
    again = {**said("Look:"), "tool_calls": [call("price", '{"b": 2, "a": 1}', "other")]}
    second = [*first, again, {"role": "tool", "content": "7", "tool_call_id": "other"}]
    rows = [
        {"messages": first, "response": reply, "session_id": "s", "reward": 0.5},
        {"messages": second, "response": said("7"), "session_id": "s"},
    ]
    [logged] = read(tmp_path / "log.jsonl", rows)
    assert outline(logged) == "u:1? a:one u:Pen? A:Look:   t:7 A:7"
    assert logged.trace.messages[3].reasoning == "hm"
    assert (logged.calls, logged.reward) == (2, 0.5)
    apart = [rows[0], {**rows[1], "session_id": "other"}]
    assert [outline(found) for found in read(tmp_path / "log.jsonl", apart)] == [
        "u:1? a:one u:Pen? A:Look:  ",
        "u:1? a:one u:Pen? a:Look: t:7 A:7",
    ]


def test_forks_are_conversations_of_their_own(tmp_path: Path) -> None:
    start = [user("1?"), said("one"), user("2?")]
    rows = [
        {"messages": start[:1], "response": "one"},
        {"messages": start, "response": "two"},
        {"messages": start, "response": "zwei"},
        {"messages": [*start[:2], user("3?")], "response": "three"},
        {"messages": start, "response": "two"},
    ]
    found = read(tmp_path / "log.jsonl", rows)
    assert [outline(logged) for logged in found] == [
        "u:1? A:one u:2? A:two",
        "u:1? A:one u:2? A:zwei",
        "u:1? A:one u:3? A:three",
    ]
    assert [logged.calls for logged in found] == [3, 1, 1]


def exchange(conversation: str, messages: list[Any], reply: Any, **more: Any) -> dict[str, Any]:
    record = {
        "type": "exchange",
        "id": "e",
        "session": "s",
        "conversation": conversation,
        "parent": None,
        "at": 1.0,
        "model": "teacher",
        "messages": messages,
        "reply": reply,
        "finish_reason": "stop",
        "usage": {},
    }
    return {**record, **more}


def test_the_gateways_records(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "price", "parameters": {}}}]
    asked = {**said(""), "content": None, "tool_calls": [call("price", '{"of": "pen"}')]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    rows = [
        exchange("a", [user("0?"), said("null"), user("Pen?")], asked, tools=tools),
        exchange("x", [user("Other?")], said("yes"), session="t", finish_reason="length"),
        exchange("a", [result], said("7")),
        exchange("b", [user("0?"), said("null"), user("Pen?"), asked, user("Stop")], said("ok"),
                 parent="a"),
        {"type": "session", "session": "s", "reward": 0.0, "metadata": {"answer": 7, "k": 1}},
        {"type": "session", "session": "s", "reward": 1.0, "metadata": {"k": 2}},
    ]  # fmt: skip
    path = tmp_path / "records.jsonl"
    with Path(written(path, rows)).open("a") as file:
        file.write('{"type": "exchange", "sess')
    (tmp_path / "metrics.jsonl").write_text('{"stage": "x"}\n')
    fault, *found = read_logs([str(tmp_path)])
    assert fault == Fault("malformed", f"{path}:7", "the last line is torn")
    assert [outline(logged) for logged in found] == [
        "u:0? a:null u:Pen? A:price t:7 A:7",
        "u:0? a:null u:Pen? A:price u:Stop A:ok",
        "u:Other? A:yes",
    ]
    main, fork, other = found
    assert main.trace.tools == tuple(tools)
    assert [logged.reward for logged in found] == [1.0, 1.0, None]
    assert main.metadata == {"session": "s", "model": "teacher", "answer": 7, "k": 2}
    assert (main.truncated, other.truncated) == (False, True)
    assert main.keys[:4] == fork.keys[:4] and main.keys[4] != fork.keys[4]


async def test_what_the_gateway_itself_writes(tmp_path: Path) -> None:
    """Two episodes of one session name, after a restart, with a fork in the first."""

    class Scripted:
        def __init__(self, *says: str) -> None:
            self.says = list(says)

        async def answer(self, ask: Ask) -> Reply:
            return Reply((Choice(said(self.says.pop(0)), "stop"),), "teacher")

        def undelivered(self, reply: Reply) -> None:
            pass

        def note(self, reward: float | None, metadata: Any) -> None:
            pass

    path = tmp_path / "records.jsonl"
    system = {"role": "system", "content": "S"}
    for says in (("one", "two", "zwei"), ("eins",)):
        records = Records(path)
        session = RecordedSession(Scripted(*says), records, "default")
        messages = [system, user("1?")]
        await session.answer(Ask(tuple(messages)))
        if says[0] == "one":
            await session.answer(Ask((*messages, said("one"), user("2?"))))
            await session.answer(Ask((*messages, said("one"), user("3?"))))
        session.note(1.0, {"answer": "x"})
        records.close()
    found = [item for item in read_logs([str(tmp_path)]) if isinstance(item, Logged)]
    assert [outline(logged) for logged in found] == [
        "s:S u:1? A:one u:2? A:two",
        "s:S u:1? A:one u:3? A:zwei",
        "s:S u:1? A:eins",
    ]
    assert {(logged.reward, logged.metadata["answer"]) for logged in found} == {(1.0, "x")}


def test_an_exchange_that_cannot_be_read_takes_what_follows_with_it(tmp_path: Path) -> None:
    rows = [
        exchange("a", [user("1?")], said("one")),
        exchange("a", [{"role": "alien", "content": "?"}], said("two")),
        exchange("a", [user("3?")], said("three")),
    ]
    *faults, kept = read_logs([written(tmp_path / "log.jsonl", rows)])
    assert [fault.kind for fault in faults] == ["malformed", "malformed"]
    assert isinstance(kept, Logged) and outline(kept) == "u:1? A:one"


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ("not a record", "malformed", "no known format: str"),
        ({"text": "x"}, "malformed", "no known format: an object with text"),
        ({"messages": [{"role": "alien", "content": ""}]}, "malformed", "unknown role 'alien'"),
        ({"messages": [user("1?")]}, "no_model_message", "no message that a model said"),
        ({"messages": [user("1?"), said(" ")]}, "malformed", "says nothing"),
        ({"messages": [user("1?"), said("", tool_calls=[call("f", '{"a": 1')])]}, "broken_call",
         "the arguments of f are not JSON"),
        ({"messages": [user("1?"), said("", tool_calls=[call("f", "[1]")])]}, "broken_call",
         "no JSON object"),
        ({"messages": [user("1?")], "response": {}}, "no_model_message", "no reply"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, said("x")]},
         "malformed", "content of type 'image_url'"),
    ],
)  # fmt: skip
def test_faults_say_what_is_wrong(row: Any, kind: str, detail: str, tmp_path: Path) -> None:
    [fault] = read_logs([written(tmp_path / "log.jsonl", [row])])
    assert isinstance(fault, Fault)
    assert fault.kind == kind and detail in fault.detail
    assert fault.place == f"{tmp_path}/log.jsonl:1"


def test_parquet_json_directories_and_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"messages": [user("1?"), said("", tool_calls=[call("f", '{"a": null}')])], "answer": "1"},
        {"messages": [user("2?"), said("two")], "answer": None},
    ]
    logs = tmp_path / "logs"
    logs.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), logs / "a.parquet")
    (logs / "b.json").write_text(json.dumps([rows[1], {"messages": [user("3?"), said("three")]}]))
    found = read_logs([str(logs)])
    assert [outline(i) for i in found if isinstance(i, Logged)] == [
        "u:1? A:f", "u:2? A:two", "u:2? A:two", "u:3? A:three"]  # fmt: skip
    assert isinstance(found[0], Logged) and isinstance(found[3], Logged)
    assert found[0].trace.messages[1].tool_calls[0].arguments == {"a": None}
    assert found[3].trace.place == f"{logs}/b.json, row 2"
    monkeypatch.chdir(tmp_path)
    Path("rows.py").write_text("def log():\n    yield {'prompt': '1?', 'completion': 'one'}\n")
    [made] = read_logs(["rows.py:log"])
    assert isinstance(made, Logged) and made.trace.messages[0] == Message(
        "1?", MessageType.MESSAGE, role="user")  # fmt: skip


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such log: .*none\.jsonl"):
        read_logs([str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="no logs in the directory"):
        read_logs([str(tmp_path)])
