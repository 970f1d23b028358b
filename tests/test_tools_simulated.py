"""Tools that are not there: a table's answers, and a model's that plays the tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_servers.chat import ChatServer
from engine_servers.wire import Answer
from retrain.tools import ToolOutput, ToolResult, ToolRunner, resolve_tools
from retrain.types import InfrastructureError, ToolCall, UserError

CITY = {"city": {"type": "string", "description": "which city"}}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": CITY}
ROUTE = {
    "name": "route",
    "description": "A way.",
    "parameters": {
        "start": {"type": "string"},
        "stops": {"type": "array"},
        "limit": {"type": "integer", "default": 5},
    },
}


def build(params: dict[str, Any], **more: Any) -> Any:
    [tool] = resolve_tools("simulated", params | more)
    return tool


async def call(tool: Any, *arguments: dict[str, Any]) -> list[ToolResult]:
    async with ToolRunner([tool], retries=0) as runner:
        return await runner.run([ToolCall(tool.name, given) for given in arguments])


async def test_a_table_answers_whatever_the_case_and_the_spaces() -> None:
    tool = build(WEATHER, table={"Paris": "18 C", "New York": {"c": 3}})
    results = await call(
        tool,
        {"city": "Paris"},
        {"city": " new   YORK\n"},
        {"city": "Rome"},
        {"town": "Paris"},
    )
    assert [(r.text, r.status) for r in results[:3]] == [
        ("18 C", "ok"),
        ('{"c": 3}', "ok"),
        ("weather has no result for these arguments.", "tool_error"),
    ]
    assert results[3].status == "model_error"
    assert "argument 'city' is missing" in results[3].text
    assert tool.parameters["properties"] == CITY
    [missed] = await call(build(WEATHER, table={"Paris": "18 C"}, default="?"), {"city": "Rome"})
    assert (missed.text, missed.status) == ("?", "ok")


async def test_rows_of_several_arguments_fill_in_defaults_and_compare_numbers() -> None:
    rows = [
        {"arguments": {"start": "A", "stops": ["b C", 2]}, "result": "short"},
        {"arguments": {"start": "A", "stops": ["b C", 2], "limit": 9}, "result": "long"},
    ]
    tool = build(ROUTE, table=rows)
    results = await call(
        tool,
        {"start": "a", "stops": ["B c", 2.0], "limit": 5},
        {"stops": ["B c", 2], "start": "A", "limit": 9},
        {"start": "A", "stops": ["B c", 3]},
        {"start": "A", "stops": "B"},
        {"start": "A", "stops": [], "limit": "many"},
    )
    assert [r.text for r in results[:2]] == ["short", "long"]
    assert [r.status for r in results[2:]] == ["tool_error", "model_error", "model_error"]


async def test_null_is_the_default_and_choices_may_be_written_as_text() -> None:
    parameters = {
        "page": {"type": "integer", "enum": [1, 2], "default": 1},
        "all": {"type": "boolean", "enum": [False, True], "default": None},
    }
    rows = [
        {"arguments": {}, "result": "first"},
        {"arguments": {"page": 2}, "result": "second"},
        {"arguments": {"page": 2, "all": True}, "result": "all"},
    ]
    tool = build(WEATHER, parameters=parameters, table=rows)
    results = await call(
        tool,
        {"page": None, "all": None},
        {"page": "2"},
        {"page": " 2 ", "all": "true"},
        {"page": 2.0},
        {"page": "3"},
        {"page": True},
    )
    assert [r.text for r in results[:4]] == ["first", "second", "all", "second"]
    assert [r.status for r in results[4:]] == ["model_error"] * 2


async def test_tables_in_files(tmp_path: Path) -> None:
    rows = [{"arguments": {"city": c}, "result": r} for c, r in (("Paris", "18"), ("Rome", "25"))]
    lines, whole, plain = (tmp_path / name for name in ("a.jsonl", "b.json", "c.json"))
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    whole.write_text(json.dumps(rows))
    plain.write_text(json.dumps({"Paris": "18", "Rome": "25"}))
    for file in (lines, whole, plain):
        results = await call(build(WEATHER, path=str(file)), {"city": "rome"}, {"city": "paris"})
        assert [r.text for r in results] == ["25", "18"]


async def test_a_model_plays_the_tool_and_sees_the_rollouts_earlier_calls() -> None:
    with ChatServer(lambda messages: f" answer {len(messages)} ") as server:
        model = {"url": server.url, "model": "small", "completion_price": 1.0}
        tool = build(WEATHER, model=model, instructions="It is winter.")
        session = tool.session()
        first = await session.call({"city": "Paris"})
        second = await session.call({"city": "Rome"})
        assert first == ToolOutput(
            "answer 2",
            {
                "weather/calls": 1,
                "weather/prompt_tokens": first.metrics["weather/prompt_tokens"],
                "weather/completion_tokens": 2,
                "weather/cost": pytest.approx(2e-6),
            },
        )
        assert second.text == "answer 4"
        system, *said = server.bodies[1]["messages"]
        assert said == [
            {"role": "user", "content": '{"name": "weather", "arguments": {"city": "Paris"}}'},
            {"role": "assistant", "content": "answer 2"},
            {"role": "user", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        ]
        assert "The weather of a city." in system["content"]
        assert system["content"].endswith("It is winter.")
        assert (server.bodies[0]["temperature"], server.bodies[0]["seed"]) == (0.0, 42)
        other = tool.session()
        cached = await other.call({"city": "Paris"})
        assert cached == ToolOutput("answer 2", {"weather/calls": 1})
        assert len(server.bodies) == 2
        await other.call({"city": "Oslo"})
        assert len(server.bodies) == 3
        await tool.close()
        fresh = build(WEATHER, model=model, cache=False)
        for _ in range(2):
            await fresh.session().call({"city": "Paris"})
        assert len(server.bodies) == 5
        await fresh.close()


async def test_calls_of_one_turn_are_played_in_order() -> None:
    with ChatServer(lambda messages: str(len(messages))) as server:
        tool = build(WEATHER, model={"url": server.url, "model": "small"})
        results = await call(tool, *({"city": city} for city in ("a", "b", "c")))
        await tool.close()
    assert [r.text for r in results] == ["2", "4", "6"]


async def test_a_model_that_is_down_masks_and_is_not_remembered() -> None:
    with ChatServer() as server:
        server.knobs.fail_next = 1
        tool = build(WEATHER, model={"url": server.url, "model": "small", "retries": 0})
        session = tool.session()
        with pytest.raises(InfrastructureError, match="answered 500"):
            await session.call({"city": "Paris"})
        assert (await session.call({"city": "Paris"})).text == "Good."
        assert len(server.bodies[-1]["messages"]) == 2
        await tool.close()


async def test_a_call_that_the_playing_model_refuses_is_the_policys_fault() -> None:
    with ChatServer() as server:
        server.answers = [Answer(413, {"error": {"message": "too long"}})]
        tool = build(WEATHER, model={"url": server.url, "model": "small"})
        [result] = await call(tool, {"city": "P" * 999})
        asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert (result.status, result.text) == (
        "model_error",
        "weather does not take this call: too long",
    )
    assert sum("PPP" in text for text in asked) == 1


async def test_numbers_match_exactly() -> None:
    parameters = {"n": {"type": "integer"}, "x": {"type": "number", "default": None}}
    rows = [
        {"arguments": {"n": 2**53}, "result": "even"},
        {"arguments": {"n": 10**400}, "result": "huge"},
        {"arguments": {"n": 1, "x": 2**53}, "result": "number"},
    ]
    tool = build(WEATHER, parameters=parameters, table=rows, default="none")
    results = await call(
        tool,
        {"n": 2**53 + 1},
        {"n": float(2**53)},
        {"n": 10**400},
        {"n": 1, "x": 2**53 + 1},
        {"n": 1, "x": "9007199254740992"},
        {"n": 1, "x": 2.0**53},
        {"n": 1, "x": 10**400},
    )
    said = ["none", "even", "huge", "none", "number", "number", "none"]
    assert [(r.text, r.status) for r in results] == [(text, "ok") for text in said]


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({}, "it has none"),
        ({"table": {}, "path": "x.json"}, "it has table and path"),
        ({"table": "x"}, "is no list of rows"),
        ({"table": [{"arguments": {"city": "a"}}]}, "row 1 is"),
        ({"table": [{"arguments": {"town": "a"}, "result": ""}]}, "row 1: .*'city' is missing"),
        ({"table": {"a": 1, "A ": 2}}, "row 2: another has the same arguments"),
        ({"table": {}, "cache": False}, "do nothing"),
        ({"path": "no_such.json"}, "cannot be read"),
        ({"model": {"url": "http://h", "model": "m"}, "default": "x"}, "default does nothing"),
        ({"model": "m"}, "model is 'm'"),
        ({"model": {"url": "http://h"}}, "needs the key 'model'"),
        ({"table": {}, "name": "a b"}, "cannot be a tool's name"),
        ({"table": {}, "parameters": {}}, "declares none"),
        ({"table": {}, "parameters": {"a": "text"}}, "parameters.a is 'text'"),
        ({"table": {}, "parameters": {"a-b": {}}}, "cannot be a parameter's name"),
        ({"table": {}, "parameters": {"a": {"type": "text"}}}, "type is 'text'"),
        ({"table": {}, "parameters": {"a": {"enum": []}}}, r"enum is \[\]"),
        ({"table": {}, "parameters": {"a": {"enum": [1]}}}, "enum has 1, which is no string"),
        ({"table": {}, "parameters": {"a": {"type": "array", "enum": ["a"]}}}, "enum is"),
        ({"table": {}, "parameters": {"a": {"default": 5}}}, "parameters.a.default is 5"),
        (
            {"table": {}, "parameters": {"a": {"type": "integer", "default": True}}},
            "parameters.a.default is True",
        ),
        (
            {"table": {}, "parameters": {"a": {"enum": ["a", "b"], "default": "c"}}},
            "parameters.a.default is 'c'",
        ),
    ],
)
def test_what_cannot_be_is_refused(params: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        build(WEATHER, **params)
