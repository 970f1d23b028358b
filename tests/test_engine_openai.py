"""Chat endpoints, and the simulated users that they play."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_servers.chat import ChatServer
from engine_servers.server import EngineServer
from engine_servers.wire import Answer
from retrain.engines.openai import (
    ChatEndpoint,
    ChatReply,
    MessagesRefused,
    endpoint_of,
    read_key,
)
from retrain.engines.openai.transport import retry_after_s, wait_s
from retrain.types import InfrastructureError, UserError
from tiny import byte_tokenizer, tiny_qwen3

KEY = "sk-very-secret-4711"
HELLO = [{"role": "user", "content": "Hello there"}]


@asynccontextmanager
async def endpoint(url: str, **options: Any) -> AsyncIterator[ChatEndpoint]:
    made = ChatEndpoint(url, **{"model": "small", "backoff_s": 0.001, **options})
    try:
        yield made
    finally:
        await made.close()


async def ask(url: str, messages: Any = HELLO, seed: int | None = None, **options: Any) -> Any:
    async with endpoint(url, **options) as made:
        return await made.chat(messages, seed=seed)


async def test_a_reply_its_tokens_and_what_it_cost() -> None:
    with ChatServer(lambda messages: f"You said {messages[-1]['content']}") as server:
        got = await ask(server.url, prompt_price=2.0, completion_price=0.5, seed=7)
        assert got == ChatReply("You said Hello there", "stop", 2, 4, (2 * 2 + 4 * 0.5) / 1e6, 1)
        assert server.bodies == [
            {"model": "small", "messages": HELLO, "temperature": 1.0, "seed": 7, "max_tokens": 512}
        ]
        assert "authorization" not in server.wire.headers[0]


async def test_temperature_length_and_key_are_sent() -> None:
    with ChatServer(api_key=KEY) as server:
        await ask(server.url, temperature=0.0, max_tokens=9, api_key=KEY)
        assert server.bodies[0]["temperature"] == 0.0
        assert server.bodies[0]["max_tokens"] == 9
        assert "seed" not in server.bodies[0]
        assert server.wire.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
async def test_ways_to_write_the_address(suffix: str) -> None:
    with ChatServer() as server:
        got = await ask(server.url.removesuffix("/v1") + suffix)
    assert got.text == "Good."


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("host:80", "'host:80' is not a web address"),
        ("http://", "is not a web address"),
        ("http://[::1", "is not a web address"),
        ("http://host:port/v1", "is not a web address"),
        ("ftp://host", "is not a web address"),
        (f"http://me:{KEY}@host/v1", "the url has a user or password in it"),
    ],
)
def test_addresses_that_cannot_be(url: str, cause: str) -> None:
    with pytest.raises(UserError, match=re.escape(cause)) as failure:
        ChatEndpoint(url, "small")
    assert KEY not in str(failure.value)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, {"error": {"message": "down"}}),
        Answer(503, "<html>busy</html>"),
        Answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        Answer(408, None),
        Answer(200, "no JSON"),
        Answer(200, {"choices": []}),
        Answer(200, {"choices": [{"message": {"content": ["parts"]}}]}),
        Answer(200, [1]),
    ],
    ids=lambda answer: f"{answer.status}-{str(answer.body)[:12]}",
)
async def test_what_passes_is_tried_again(answer: Answer) -> None:
    with ChatServer() as server:
        server.answers = [answer, answer]
        got = await ask(server.url, retries=2)
        assert (got.text, got.attempts) == ("Good.", 3)
        server.answers = [answer, answer]
        with pytest.raises(InfrastructureError, match=r"\(2 attempts\)$") as failure:
            await ask(server.url, retries=1)
        assert server.url in str(failure.value)
        assert failure.value.kind is None


async def test_broken_connections_are_tried_again() -> None:
    with ChatServer() as server:
        server.knobs.drop_next = 2
        assert (await ask(server.url, retries=2)).attempts == 3
    with pytest.raises(InfrastructureError, match=r"Connect\w*.*\(3 attempts\)"):
        await ask(server.url, retries=2)


async def test_the_server_says_how_long_to_wait() -> None:
    with ChatServer() as server:
        server.answers = [Answer(429, {}, {"Retry-After": "0.3"})]
        start = time.monotonic()
        assert (await ask(server.url, retries=1)).attempts == 2
    assert 0.3 <= time.monotonic() - start < 3
    assert [retry_after_s(x) for x in (None, "", "2", "-1", "Wed, 21 Oct 2026")] == [
        None, None, 2.0, 0.0, None,
    ]  # fmt: skip


def test_waits_double_up_to_a_minute() -> None:
    for attempt, whole in ((1, 2), (2, 4), (5, 32), (6, 60), (40, 60)):
        assert all(whole / 2 <= wait_s(attempt, 2.0, None) <= whole for _ in range(20))
    assert wait_s(1, 2.0, 7.0) == 7.0
    assert wait_s(1, 2.0, 4000.0) == 60.0


@pytest.mark.parametrize(
    ("status", "said", "step", "asked"),
    [
        (400, "temperature is not supported", "check the model and its limits", 2),
        (401, f"Incorrect API key provided: {KEY}.", "Check the key in the variable", 1),
        (403, "not yours", "Check the key in the variable", 1),
        (404, "no such model", "Check the model's name, 'small'", 1),
        (422, "bad field", "The server does not take this request", 2),
    ],
)
async def test_refusals_are_the_users_and_show_no_key(
    status: int, said: str, step: str, asked: int
) -> None:
    with ChatServer() as server:
        server.answers = [Answer(status, {"error": {"message": said}})] * asked
        with pytest.raises(UserError) as failure:
            await ask(server.url, api_key=KEY)
        assert len(server.bodies) == asked
    assert f"answered {status}: {said.replace(KEY, '***')}" in failure.value.cause
    assert step in failure.value.next_step
    assert KEY not in str(failure.value)


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("first", [True, False])
async def test_messages_that_are_refused_are_no_mistake_of_the_users(
    status: int, first: bool
) -> None:
    """The policy said it: too much, or what a filter holds back. The first one to be refused has
    the endpoint asked something else, in the same form."""
    with ChatServer() as server:
        async with endpoint(server.url, retries=3) as made:
            if not first:
                await made.chat(HELLO)
            server.answers = [Answer(status, {"error": {"message": "content_filter"}})]
            evil = [{"role": "system", "content": "Be."}, {"role": "user", "content": "evil"}]
            with pytest.raises(MessagesRefused, match="content_filter") as refused:
                await made.chat(evil, seed=3)
            assert isinstance(refused.value, InfrastructureError)
            assert refused.value.said == "content_filter"
            await made.chat(HELLO)
        asked = [body["messages"][-1]["content"] for body in server.bodies]
        assert asked.count("evil") == 1
        assert len(asked) == 3
        if first:
            one, probe, _ = server.bodies
            harmless = [m | {"content": "Answer with one word."} for m in evil]
            assert probe == one | {"messages": harmless}


async def test_many_first_messages_that_are_refused_ask_one_thing_more() -> None:
    with ChatServer() as server:
        server.knobs.delay_s = 0.1
        server.answers = [Answer(400, {"error": {"message": "no"}})] * 5
        async with endpoint(server.url) as made:
            results = await asyncio.gather(
                *(made.chat(HELLO) for _ in range(5)), return_exceptions=True
            )
        assert [type(result) for result in results] == [MessagesRefused] * 5
        assert len(server.bodies) == 6


async def test_what_stands_behind_the_address_is_not_shown() -> None:
    """Some services take their key there."""
    with ChatServer() as server:
        server.answers = [Answer(404, {"error": {"message": "gone"}})]
        with pytest.raises(UserError) as failure:
            await ask(f"{server.url}?api-key={KEY}")
    assert "/chat/completions answered 404" in failure.value.cause
    assert KEY not in str(failure.value)


async def test_a_missing_key_and_an_empty_account() -> None:
    with ChatServer(api_key=KEY) as server:
        with pytest.raises(UserError, match="answered 401") as failure:
            await ask(server.url)
        assert "api_key_env" in failure.value.next_step
        spent = {"error": {"message": "no credit", "code": "insufficient_quota"}}
        server.answers = [Answer(429, spent)]
        with pytest.raises(UserError, match="no credit"):
            await ask(server.url, api_key=KEY)
        server.answers = [Answer(307, None, {"Location": "http://elsewhere"})]
        with pytest.raises(UserError, match="answered 307"):
            await ask(server.url, api_key=KEY)


async def test_a_server_that_wants_the_other_name_of_the_length() -> None:
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with ChatServer() as server:
        server.answers = [Answer(400, {"error": {"message": said}})]
        async with endpoint(server.url, max_tokens=5) as made:
            assert (await made.chat(HELLO)).attempts == 1
            await made.chat(HELLO, max_tokens=6)
        lengths = [{k: v for k, v in b.items() if k.startswith("max_")} for b in server.bodies]
    assert lengths == [
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"max_completion_tokens": 6},
    ]


async def test_a_schema_is_sent_unless_the_server_refuses_those_by_name() -> None:
    schema = {"type": "object"}
    refusal = Answer(400, {"error": {"message": "Unknown parameter: 'response_format'."}})
    with ChatServer() as server:
        async with endpoint(server.url) as made:
            await made.chat(HELLO, schema=schema)
            form = server.bodies[0]["response_format"]
            assert form["type"] == "json_schema"
            assert form["json_schema"]["schema"] == schema
            server.knobs.delay_s, server.answers = 0.1, [refusal, refusal]
            both = await asyncio.gather(*(made.chat(HELLO, schema=schema) for _ in range(2)))
            assert [reply.text for reply in both] == ["Good."] * 2
            await made.chat(HELLO, schema=schema)
        assert ["response_format" in body for body in server.bodies[-3:]] == [False] * 3


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({}, "needs the key 'url'"),
        ({"url": "http://h", "modell": "m"}, "has no key 'modell'"),
        ({"url": "http://h", "model": "m", "api_key": "sk-1"}, "has no key 'api_key'"),
        ({"url": "http://h", "model": 3}, "model is 3"),
        ({"url": "http://h", "model": "m", "retries": -1}, "retries is -1"),
        ({"url": "http://h", "model": "m", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"url": "http://h", "model": "m", "timeout_s": 0}, "timeout_s is 0"),
        ({"url": "http://h", "model": "m", "temperature": "low"}, "temperature is 'low'"),
        ({"url": "h", "model": "m"}, "is not a web address"),
        ({"url": "http://h", "model": "m", "api_key_env": "NOT_SET_4711"}, "is not set"),
    ],
)
def test_an_endpoint_of_a_mapping_is_checked(given: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=re.escape(cause)) as refused:
        endpoint_of(given, "judge")
    assert str(refused.value).startswith("judge") and "sk-1" not in str(refused.value)


async def test_an_endpoint_of_a_mapping_asks_as_described(monkeypatch: Any) -> None:
    monkeypatch.setenv("POOL_KEY", KEY)
    with ChatServer(api_key=KEY) as server:
        given = {"url": server.url, "model": "small", "api_key_env": "POOL_KEY", "max_tokens": 5}
        made = endpoint_of(given | {"temperature": 0.5, "completion_price": 2}, "judge")
        assert (await made.chat(HELLO)).cost == 1 * 2 / 1e6
        await made.close()
        body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"]) == (0.5, 5)


async def test_answers_that_say_little() -> None:
    with ChatServer() as server:
        server.answers = [Answer(200, {"choices": [{"message": {"content": None}}]})]
        got = await ask(server.url, completion_price=1.0)
    assert got == ChatReply("", "stop", None, None, None, 1)


async def test_the_deadline_is_that_of_an_attempt() -> None:
    with ChatServer() as server:
        server.knobs.hang = True
        start = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"no answer within 0.2 s \(2 attempts\)"):
            await ask(server.url, timeout_s=0.2, retries=1)
        assert 0.4 <= time.monotonic() - start < 5
        server.knobs.hang = False


async def test_no_more_requests_at_once_than_allowed() -> None:
    with ChatServer() as server:
        server.knobs.delay_s = 0.1
        async with endpoint(server.url, max_concurrency=3) as made:
            await asyncio.gather(*(made.chat(HELLO) for _ in range(7)))
        assert server.wire.peak == 3


async def test_a_chat_that_is_cancelled_hangs_up() -> None:
    with ChatServer() as server:
        server.knobs.delay_s = 30.0
        async with endpoint(server.url, max_concurrency=1) as made:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await made.chat(HELLO)
            assert await asyncio.to_thread(server.cancelled.wait, 5)
            server.knobs.delay_s = 0.0
            assert (await made.chat(HELLO)).text == "Good."


async def test_closing_ends_what_is_under_way() -> None:
    with ChatServer() as server:
        server.knobs.delay_s = 30.0
        made = ChatEndpoint(server.url, "small", retries=5, backoff_s=0.001)
        chat = asyncio.create_task(made.chat(HELLO))
        await asyncio.to_thread(_until, lambda: server.bodies)
        await made.close()
        with pytest.raises(InfrastructureError):
            async with asyncio.timeout(5):
                await chat
        with pytest.raises(InfrastructureError, match="closed"):
            await made.chat(HELLO)
        await made.close()


def _until(true: Any) -> None:
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def test_one_endpoint_serves_several_event_loops() -> None:
    with ChatServer() as server:
        made = ChatEndpoint(server.url, "small")
        assert [asyncio.run(made.chat(HELLO)).text for _ in range(2)] == ["Good."] * 2


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_key("SOME_KEY", "here") == KEY
    assert read_key(None, "here") is None
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match="here: the environment variable SOME_KEY is not set"):
        read_key("SOME_KEY", "here")
    with pytest.raises(UserError, match="no key has") as failure:
        ChatEndpoint("http://host", "small", api_key=f"{KEY} two")
    assert KEY not in str(failure.value)


async def test_it_speaks_to_a_model(tmp_path: Path) -> None:
    tiny_qwen3(0).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with EngineServer(tmp_path) as server:
        options = {"model": "policy", "max_tokens": 6}
        first, again, other = [await ask(server.url, seed=s, **options) for s in (1, 1, 2)]
    assert first == again and first.text != other.text
    assert first.completion_tokens == 6 and first.finish_reason == "length"
