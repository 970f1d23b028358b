"""The gateway's server: whose session it is, what arrives, what does not, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import Any

import aiohttp
import openai
import pytest

from answering import QUESTION, OneBook, Prescribed, client, said, serving
from retrain.gateway import exchange
from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.http import place
from retrain.gateway.server import GatewayServer
from retrain.types import InfrastructureError, UserError

GOOD = {"model": "m", "messages": list(QUESTION)}
CHAT = "/v1/chat/completions"


async def call(url: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """A POST, or without a body a GET."""
    async with aiohttp.ClientSession() as http:
        method = "GET" if body is None else "POST"
        async with http.request(method, url, json=body, headers=headers) as answer:
            return answer.status, json.loads(await answer.text()), dict(answer.headers)


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/v1/chat/completions", (None, "chat/completions")),
        ("/chat/completions", (None, "chat/completions")),
        ("/v1/v1/messages", (None, "messages")),
        ("//v1//models/", (None, "models")),
        ("/v1/models/Qwen/Qwen3-0.6B", (None, "models/Qwen/Qwen3-0.6B")),
        ("/sessions/a%20b/v1/responses", ("a b", "responses")),
        ("/sessions/s/reward", ("s", "reward")),
        ("/sessions/v1/v1/reward", ("v1", "reward")),
        ("/sessions", (None, "sessions")),
        ("/", (None, "")),
    ],
)
def test_a_path_names_a_session_and_an_endpoint(path: str, expected: tuple[Any, str]) -> None:
    assert place(path) == expected


@pytest.mark.parametrize(
    "path, status",
    [("/sessions//v1/chat/completions", 404), ("/sessions/", 404), ("/sessions/a%ff/v1/x", 400)],
)
def test_a_path_that_names_no_session_is_refused(path: str, status: int) -> None:
    with pytest.raises(RequestRefused) as refused:
        place(path)
    assert refused.value.status == status


async def test_the_session_is_found_by_path_header_and_key() -> None:
    async with serving(Prescribed()) as (server, book):
        url = server.url
        assert (await call(f"{url}{CHAT}", GOOD))[0] == 200
        await call(f"{url}/sessions/s1{CHAT}", GOOD, Authorization="Bearer k1")
        await call(f"{url}{CHAT}", GOOD, **{"X-Retrain-Session": "s2", "x-api-key": "k2"})
        await call(f"{url}/sessions/s3{CHAT}", GOOD, **{"X-Retrain-Session": "s2"})
        await call(f"{url}/sessions/s4/models")  # opens none
        await call(f"{url}{CHAT}", GOOD, Authorization="Basic abc")
    assert book.found == [(None, None), ("s1", "k1"), ("s2", "k2"), ("s3", None), (None, None)]


async def test_health_needs_no_key_and_models_do() -> None:
    async with serving(Prescribed(), models=("small", "org/large")) as (server, _):
        assert (await call(f"{server.url}/health", Authorization="Bearer wrong"))[0] == 200
        assert (await call(f"{server.url}/v1/models", Authorization="Bearer wrong"))[0] == 401
        sdk = client(server, api_key="k", max_retries=0)
        assert [model.id async for model in sdk.models.list()] == ["small", "org/large"]
        assert (await sdk.models.retrieve("small")).id == "small"
        status, body, _ = await call(f"{server.url}/v1/models/org/large")
        assert (status, body["id"]) == (200, "org/large")
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.models.retrieve("gpt")
    assert missing.value.code == "model_not_found"


async def test_a_reward_is_noted() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        for body in ({"reward": 0.5, "metadata": {"a": 1}}, {"reward": None}, {"reward": 1}):
            assert (await call(f"{server.url}/v1/reward", body))[0] == 200
        for wrong in ({"reward": "1"}, {"reward": True}, {"reward": 1, "metadata": [1]}):
            status, answer, _ = await call(f"{server.url}/sessions/s/v1/reward", wrong)
            assert status == 400 and answer["error"]["param"] in ("reward", "metadata")
        async with aiohttp.ClientSession() as http:
            endless = http.post(f"{server.url}/v1/reward", data=b'{"reward": 1e999}')
            assert (await endless).status == 400
    assert session.notes == [(0.5, {"a": 1}), (None, {}), (1, {})]


async def test_settings_that_are_not_followed_are_named() -> None:
    session = Prescribed()
    session.not_enforced = ("top_k", "seed")
    async with serving(session) as (server, _):
        for body in (GOOD, {**GOOD, "stream": True}):
            async with aiohttp.ClientSession() as http:
                answer = await http.post(f"{server.url}{CHAT}", json=body)
                assert answer.headers["X-Retrain-Not-Enforced"] == "top_k, seed"


@pytest.mark.parametrize(
    "failure, status, kind, retries",
    [
        (InfrastructureError("the engine is gone"), 503, openai.InternalServerError, True),
        (UserError("no tool format", "Set one."), 400, openai.BadRequestError, False),
        (
            RequestRefused("full", code="context_length_exceeded"),
            400,
            openai.BadRequestError,
            False,
        ),
        (RequestRefused("over", status=409), 409, openai.ConflictError, False),
        (RequestRefused("slower", status=429), 429, openai.RateLimitError, True),
        (ConnectionError("of the session's own"), 500, openai.InternalServerError, True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_have_the_status_that_clients_act_on(
    failure: Exception, status: int, kind: type[openai.APIStatusError], retries: bool, stream: bool
) -> None:
    session = Prescribed(failure=failure)
    async with serving(session) as (server, _):
        sdk = client(server, api_key="k", max_retries=1)
        with pytest.raises(kind) as caught:
            await sdk.chat.completions.create(model="m", messages=QUESTION, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == getattr(failure, "code", None)
    assert len(session.asks) == (2 if retries else 1)
    assert [ask.retried for ask in session.asks] == [False, True][: len(session.asks)]


async def test_an_unknown_failure_is_logged_once_and_tells_nothing(caplog: Any) -> None:
    session = Prescribed(failure=ValueError("the password is hunter2"))
    async with serving(session) as (server, _):
        for _ in range(3):
            status, body, _ = await call(f"{server.url}{CHAT}", GOOD, Authorization="Bearer s3cret")
            assert status == 500 and body["error"]["message"] == "the gateway failed: ValueError"
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.name for record in traces] == ["retrain.gateway"]
    assert "s3cret" not in caplog.text


async def test_keys_are_in_no_log(caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    raw = b"POST / HTTP/1.1\r\nAuthorization: Bearer s3cret\r\nbad header s3cret\r\n\r\n"
    async with serving(Prescribed()) as (server, _):
        await call(f"{server.url}{CHAT}", GOOD, Authorization="Bearer s3cret")
        await call(f"{server.url}{CHAT}", {}, **{"x-api-key": "s3cret"})
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        assert (await reader.readline()).startswith(b"HTTP/1.0 400")
        writer.close()
    assert "s3cret" not in caplog.text


async def test_a_stream_that_waits_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "HEADERS_AFTER_S", 0.05)
    monkeypatch.setattr(exchange, "ALIVE_EVERY_S", 0.05)
    session = Prescribed()
    session.delay_s = 0.3
    session.not_enforced = ("seed",)
    async with serving(session) as (server, _), aiohttp.ClientSession() as http:
        start = time.monotonic()
        answer = await http.post(f"{server.url}{CHAT}", json={**GOOD, "stream": True})
        assert answer.status == 200 and time.monotonic() - start < 0.25
        text = await answer.text()
        assert text.startswith(": waiting\n\n: waiting\n\n")
        assert ": not enforced: seed\n\n" in text and text.endswith("data: [DONE]\n\n")
        sdk = client(server, api_key="k", max_retries=0)
        stream = await sdk.chat.completions.create(model="m", messages=QUESTION, stream=True)
        contents = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(contents) == "It is five."
        session.failure = RequestRefused("too long", code="context_length_exceeded")
        stream = await sdk.chat.completions.create(model="m", messages=QUESTION, stream=True)
        with pytest.raises(openai.APIError, match="too long") as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "context_length_exceeded"
    assert session.lost == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_an_answer_that_nobody_waits_for_is_finished_and_reported(
    monkeypatch: pytest.MonkeyPatch, stream: bool, begun: bool
) -> None:
    monkeypatch.setattr(exchange, "HEADERS_AFTER_S", 0.01 if begun else 10.0)
    session = Prescribed()
    session.delay_s = 0.3
    async with serving(session) as (server, _):
        before = asyncio.all_tasks()
        sdk = client(server, api_key="k", max_retries=0)
        create = sdk.chat.completions.create(model="m", messages=QUESTION, stream=stream)
        asking = asyncio.create_task(create)
        await until(lambda: session.asks)
        await asyncio.sleep(0.1)
        if asking.done():
            await asking.result().response.aclose()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await sdk.close()
        assert session.answered == 0
        await until(lambda: session.lost)
        await until(lambda: asyncio.all_tasks() <= before)
    assert session.answered == len(session.lost) == 1
    assert isinstance(session.lost[0], Reply)


async def test_a_caller_that_dies_while_a_large_answer_is_sent() -> None:
    session = Prescribed(said("word " * 4_000_000))
    async with serving(session) as (server, _):
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
        body = json.dumps(GOOD).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        assert await reader.readexactly(1000)
        writer.transport.abort()
        await until(lambda: session.lost)
    assert len(session.lost) == 1


class Named(Prescribed):
    """Says which question it was asked, after a while that depends on it."""

    async def answer(self, ask: Ask) -> Reply:
        number = int(ask.messages[0]["content"])
        await asyncio.sleep(0.001 * (number * 37 % 50))
        return Reply((said(f"answer {number}"),), ask.model)


async def test_two_hundred_at_once_get_their_own_answers() -> None:
    async with serving(Named()) as (server, _), aiohttp.ClientSession() as http:

        async def ask(number: int) -> str:
            message = {"role": "user", "content": str(number)}
            body = {"model": "m", "messages": [message], "stream": number % 2 == 0}
            async with http.post(f"{server.url}{CHAT}", json=body) as answer:
                text = await answer.text()
            if number % 2:
                return json.loads(text)["choices"][0]["message"]["content"]
            chunks = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
            return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

        answers = await asyncio.gather(*map(ask, range(200)))
    assert answers == [f"answer {number}" for number in range(200)]


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_refuses_what_is_under_way(stream: bool) -> None:
    session = Prescribed()
    session.delay_s = 60.0
    before = asyncio.all_tasks()
    async with serving(session) as (server, _):
        asking = asyncio.create_task(call(f"{server.url}{CHAT}", {**GOOD, "stream": stream}))
        await until(lambda: session.asks)
        start = time.monotonic()
        await server.close()
        assert time.monotonic() - start < 5
        status, body, _ = await asking
    assert status == 503 and body["error"]["message"] == "the gateway is closing"
    assert asyncio.all_tasks() <= before and session.answered == 0
    await server.close()


@pytest.mark.parametrize(
    "path, method, key, status, kind",
    [
        ("/v1/messages", "POST", "wrong", 401, "authentication_error"),
        ("/v1/messages", "GET", "k", 405, None),
        ("/sessions/s/v1/messages/batches", "POST", "k", 404, "not_found_error"),
        ("/messages", "POST", "k", 400, "invalid_request_error"),
    ],
)
async def test_errors_have_the_shape_of_the_api_that_was_asked(
    path: str, method: str, key: str, status: int, kind: str | None
) -> None:
    async with serving(Prescribed()) as (server, _), aiohttp.ClientSession() as http:
        headers = {"x-api-key": key}
        answer = await http.request(method, f"{server.url}{path}", data=b"{", headers=headers)
        body = json.loads(await answer.text())
    assert answer.status == status
    assert body["type"] == "error" and set(body["error"]) >= {"type", "message"}
    assert kind is None or body["error"]["type"] == kind


async def test_the_client_learns_that_its_request_is_too_large() -> None:
    async with serving(Prescribed(), max_body_mb=1) as (server, _):
        messages = [{"role": "user", "content": "x" * 2**23}]
        with pytest.raises(openai.APIStatusError) as caught:
            await client(server).chat.completions.create(model="m", messages=messages)
    assert caught.value.status_code == 413


async def test_a_port_that_is_taken() -> None:
    async with serving(Prescribed()) as (server, _):
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            await GatewayServer(OneBook(Prescribed()), port=port).start()
