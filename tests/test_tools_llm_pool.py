"""Models as a tool: who is asked, with what settings, at what price, and what failures come to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine_servers.chat import PATH, ChatServer
from engine_servers.wire import Answer
from retrain.config import load_config
from retrain.loops.check import check
from retrain.tools import ToolResult, ToolRunner, resolve_tools
from retrain.tools.base import ModelError
from retrain.tools.llm_pool import LLMPool
from retrain.types import InfrastructureError, ToolCall, UserError
from runs import rl_config

KEY = "sk-very-secret-4711"


def member(server: ChatServer, name: str = "small", **keys: Any) -> dict[str, Any]:
    return {"name": name, "url": server.url, "model": server.model, "backoff_s": 0.001} | keys


async def call(tool: Any, *calls: dict[str, Any], **options: Any) -> list[ToolResult]:
    options = {"retries": 0, "backoff_s": 0.001} | options
    try:
        async with ToolRunner([tool], **options) as runner:
            return await runner.run([ToolCall(tool.name, arguments) for arguments in calls])
    finally:
        await tool.close()


def pool_tool(models: list[dict[str, Any]], **keys: Any) -> Any:
    [tool] = resolve_tools("llm_pool", {"models": models, **keys})
    return tool


async def test_the_named_model_is_asked_and_its_price_is_paid() -> None:
    with (
        ChatServer(lambda _: "Paris it is") as cheap,
        ChatServer(lambda _: "42", model="large") as dear,
    ):
        tool = pool_tool(
            [
                member(cheap, price=0.3, description="Knows cities."),
                member(dear, "big one", price=2, prompt_price=1),
            ]
        )
        first, second = await call(
            tool,
            {"model": "small", "query": "The capital of France?"},
            {"model": "big one", "query": "6 x 7 ?"},
        )
    assert (first.text, first.status) == ("Paris it is", "ok")
    assert first.metrics == {
        "llm_pool/calls": 1,
        "llm_pool/small/calls": 1,
        "llm_pool/prompt_tokens": 4,
        "llm_pool/completion_tokens": 3,
        "llm_pool/cost": pytest.approx(3 * 0.3 / 1e6),
    }
    assert second.text == "42"
    assert second.metrics["llm_pool/big one/calls"] == 1
    assert second.metrics["llm_pool/cost"] == pytest.approx((4 * 1 + 1 * 2) / 1e6)
    assert cheap.bodies == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "The capital of France?"}],
            "temperature": 0.0,
            "seed": 42,
            "max_tokens": 512,
        }
    ]


async def test_what_the_policy_reads_of_the_pool() -> None:
    with ChatServer() as server:
        tool = pool_tool(
            [
                member(server, price=0.3, description="Knows cities."),
                member(server, "large", price=2.5, prompt_price=1),
            ],
            tool_name="ask",
            description="Ask an expert:",
        )
    assert tool.name == "ask"
    assert tool.description.splitlines() == [
        "Ask an expert:",
        "- small: Knows cities. (0.3 per million output tokens)",
        "- large (1 per million input tokens, 2.5 per million output tokens)",
    ]
    assert tool.parameters["properties"]["model"]["enum"] == ["small", "large"]
    assert tool.parameters["required"] == ["model", "query"]
    await tool.close()


async def test_settings_are_each_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_KEY", KEY)
    with ChatServer(api_key=KEY) as server:
        settings = {"temperature": 0.1, "max_tokens": 7, "seed": None, "system_prompt": "Be brief."}
        pool = LLMPool([member(server, api_key_env="POOL_KEY", **settings)])
        await pool.ask("small", "Hi")
        await pool.ask("small", "Hi", "Be long.")
        await pool.close()
        first, second = server.bodies
    assert (first["temperature"], first["max_tokens"], "seed" in first) == (0.1, 7, False)
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert second["messages"][0] == {"role": "system", "content": "Be long."}


async def test_a_wrong_call_is_the_policys_fault_and_asks_nobody() -> None:
    with ChatServer() as server:
        tool = pool_tool([member(server), member(server, "other")])
        results = await call(
            tool,
            {"model": "gpt", "query": "Hi"},
            {"model": "small"},
            {"model": "small", "query": 3},
        )
        assert server.bodies == []
        pool = LLMPool([member(server)])
        with pytest.raises(ModelError, match=r"no model 'gpt'. Models: small\."):
            await pool.ask("gpt", "Hi")
    assert [result.status for result in results] == ["model_error"] * 3
    assert "'small' or 'other'" in results[0].text
    assert "argument 'query' is missing" in results[1].text


async def test_passing_failures_are_retried_and_lasting_ones_mask_or_are_told() -> None:
    with ChatServer() as server:
        server.answers = [
            Answer(500),
            Answer(429, {}, {"Retry-After": "0.01"}),
            Answer(200, "no JSON"),
        ]
        [result] = await call(
            pool_tool([member(server, retries=3)]), {"model": "small", "query": "?"}
        )
        assert (result.text, len(server.bodies)) == ("Good.", 4)
        server.knobs.fail_next = 10**6
        asked = len(server.bodies)
        with pytest.raises(InfrastructureError, match=r"small.*answered 500.*\(2 attempts\)"):
            await call(pool_tool([member(server, retries=1)]), {"model": "small", "query": "?"})
        assert len(server.bodies) == asked + 2
        tool = pool_tool([member(server, retries=1)], on_failure="tell")
        [told] = await call(tool, {"model": "small", "query": "?"})
        assert (told.text, told.status) == ("small gave no answer.", "tool_error")
        server.knobs.fail_next, server.knobs.hang = 0, True
        tool = pool_tool([member(server, retries=0, timeout_s=0.1)])
        with pytest.raises(InfrastructureError, match=r"no answer within 0.1 s"):
            await call(tool, {"model": "small", "query": "?"}, timeout_s=0.01)
        server.knobs.hang = False


async def test_no_more_are_asked_at_once_than_allowed_and_waiting_is_no_time_out() -> None:
    with ChatServer() as server:
        server.knobs.delay_s = 0.1
        tool = pool_tool([member(server, max_concurrency=2, timeout_s=5.0)])
        results = await call(tool, *[{"model": "small", "query": "?"}] * 6, timeout_s=0.15)
        assert server.wire.peak == 2
    assert [result.status for result in results] == ["ok"] * 6


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("on_failure", ["mask", "tell"])
async def test_a_query_that_is_refused_is_the_policys_fault(first: bool, on_failure: str) -> None:
    """Whether it is the first one of all, or not; it is not sent again."""
    with ChatServer() as server:
        tool = pool_tool([member(server)], on_failure=on_failure)
        if not first:
            await tool.ask({"model": "small", "query": "fine"})
        server.answers = [Answer(400, {"error": {"message": "maximum context length is 8"}})]
        [result] = await call(tool, {"model": "small", "query": "too much"}, retries=2)
        asked = [body["messages"][0]["content"] for body in server.bodies]
    assert result.status == "model_error"
    assert result.text == "small does not take this query: maximum context length is 8"
    assert asked.count("too much") == 1


async def test_a_request_that_is_never_taken_stops_the_run() -> None:
    with ChatServer() as server:
        server.answers = [Answer(400, {"error": {"message": "no temperature"}})] * 2
        with pytest.raises(UserError, match="answered 400: no temperature"):
            await call(pool_tool([member(server)]), {"model": "small", "query": "?"})


async def test_a_refused_key_stops_the_run() -> None:
    with ChatServer(api_key=KEY) as server, pytest.raises(UserError, match="answered 401"):
        await call(pool_tool([member(server)]), {"model": "small", "query": "?"})


@pytest.mark.parametrize(
    ("models", "cause"),
    [
        ([], "lists none"),
        (["small"], r"models\[0\] is 'small'"),
        ([{"url": "http://h"}], r"models\[0\]\.name is ''"),
        ([{"name": "a"}], "needs the key 'url'"),
        ([{"name": "a", "url": "http://h"}] * 2, "another is named 'a'"),
        ([{"name": "a", "url": "http://h", "prize": 1}], "has no key 'prize'"),
        ([{"name": "a", "url": "http://h", "price": -1}], r"price is -1"),
        ([{"name": "a", "url": "http://h", "seed": "x"}], r"seed is 'x'"),
        ([{"name": "a", "url": "http://h", "api_key_env": "NOT_SET_4711"}], "NOT_SET_4711"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(models: list[Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause) as refused:
        resolve_tools("llm_pool", {"models": models})
    assert str(refused.value).startswith("tool 'llm_pool'")


def test_making_a_pool_asks_nobody() -> None:
    with ChatServer() as server:
        pool_tool([member(server)])
        assert [path for path, _ in server.wire.requests if path == PATH] == []


def test_a_pool_serves_one_event_loop_after_the_other() -> None:
    with ChatServer() as server:
        pool = LLMPool([member(server)])
        for _ in range(2):
            assert asyncio.run(pool.ask("small", "Hi")).text == "Good."


def test_a_check_asks_nobody_and_says_that_answers_may_differ(tmp_path: Path) -> None:
    with ChatServer() as server:
        model = {"url": server.url, "model": "small"}
        about = {"name": "time", "description": "The time.", "parameters": {"zone": {}}}
        tools = [
            {"name": "llm_pool", "params": {"models": [member(server)]}},
            {"name": "http", "params": about | {"name": "web", "url": f"{server.url}/{{zone}}"}},
            {"name": "simulated", "params": about | {"model": model}},
        ]
        config = rl_config(tmp_path, environment={"type": "smolagent", "tools": tools})
        said = check(load_config(config))
        assert server.wire.requests == []
    assert "tool llm_pool(model, query): Ask another model" in said
    for name in ("llm_pool", "http", "simulated"):
        assert f"the tool {name} asks an endpoint" in said
    table = [{"name": "simulated", "params": about | {"table": {"UTC": "noon"}}}]
    config = rl_config(tmp_path, environment={"type": "smolagent", "tools": table})
    assert "asks an endpoint" not in check(load_config(config))
