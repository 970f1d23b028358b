"""Requests that cannot be answered get the API's own error shape, whatever is wrong with them."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import openai
import pytest

from answering import QUESTION, TOOL, Prescribed, client, serving
from retrain.gateway.server import GatewayServer

CHAT = "/v1/chat/completions"
GOOD = {"model": "m", "messages": list(QUESTION)}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5"}


async def send(
    server: GatewayServer, raw: bytes, answers: int = 1
) -> list[tuple[int, dict[str, str], bytes]]:
    """(status, headers, body) of so many answers."""
    reader, writer = await connect(server)
    writer.write(raw)
    received = []
    for _ in range(answers):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        status, *lines = head.decode().strip().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        length = 0 if raw.startswith(b"HEAD") else int(headers["content-length"])
        received.append((int(status.split()[1]), headers, await reader.readexactly(length)))
    writer.close()
    return received


async def connect(server: GatewayServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


def post(body: bytes, *headers: str) -> bytes:
    """A `Content-Length` or `Transfer-Encoding` in `headers` takes the place of the right one."""
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", *headers, "", ""]
    if not any(line.startswith(("Content-Length", "Transfer")) for line in headers):
        lines.insert(2, f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + body


async def refused(server: GatewayServer, raw: bytes, status: int = 400) -> dict[str, Any]:
    """The error of a single answer, which has OpenAI's shape."""
    ((actual, headers, body),) = await send(server, raw)
    assert actual == status
    assert headers["content-type"].startswith("application/json")
    answer = json.loads(body)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return answer["error"]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "not JSON: Expecting value at character 0"),
        (b'{"model": ', "not JSON: Expecting value at character 10"),
        (b'{"model": "\xff"}', "not UTF-8: byte 11"),
        ('{"model": "m"}'.encode("utf-16"), "not UTF-8: byte 0"),
        (b'{"model": "\xed\xa0\x80"}', "not UTF-8: byte 11"),
        (rb'{"model": "\ud800"}', "half of a surrogate pair"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"temperature": -Infinity}', "-Infinity is no number"),
        (b'{"temperature": 1' + b"0" * 5000 + b"}", "not JSON: "),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'["model"]', "not an object: list"),
        (b"null", "not an object: NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bodies_that_are_no_json_object(body: bytes, message: str) -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        assert message in (await refused(server, post(body)))["message"]
        assert await asks_well(server)
    assert len(session.asks) == 1


async def asks_well(server: GatewayServer) -> bool:
    """Whether the server still answers what is right."""
    ((status, _, _),) = await send(server, post(json.dumps(GOOD).encode()))
    return status == 200


async def test_two_hundred_levels_are_not_too_many() -> None:
    levels = b"[" * 199 + b"]" * 199
    async with serving(Prescribed()) as (server, _):
        body = json.dumps({**GOOD, "metadata": 0}).encode().replace(b": 0}", b": " + levels + b"}")
        ((status, _, _),) = await send(server, post(body))
    assert status == 200


@pytest.mark.parametrize("text", [r"\ud83d\ude00", "😀", "\u2028"])
async def test_characters_beyond_ascii_arrive(text: str) -> None:
    session = Prescribed()
    raw = json.dumps({**GOOD, "messages": []}).replace(
        "[]", f'[{{"role":"user","content":"{text}"}}]'
    )
    async with serving(session) as (server, _):
        ((status, _, _),) = await send(server, post(raw.encode()))
    assert status == 200
    assert session.asks[0].messages[0]["content"] == text.replace(r"\ud83d\ude00", "😀")


CASES: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    ({"messages": [RESULT]}, "messages[0].tool_call_id"),
    ({"messages": [*QUESTION, RESULT]}, "messages[1].tool_call_id"),
    ({"messages": [*QUESTION, CALLS]}, "messages"),
    ({"messages": [*QUESTION, CALLS, *QUESTION]}, "messages"),
    (
        {"messages": [*QUESTION, CALLS, {**RESULT, "tool_call_id": "c2"}]},
        "messages[2].tool_call_id",
    ),
    ({"messages": [*QUESTION, CALLS, RESULT, *QUESTION, RESULT]}, "messages[4].tool_call_id"),
    (
        {"messages": [*QUESTION, CALLS, {"role": "tool", "content": "5"}]},
        "messages[2].tool_call_id",
    ),
    ({"messages": [*QUESTION, CALLS, {**RESULT, "content": None}]}, "messages[2].content"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}]},
        "messages[0].tool_calls[0].id",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
    ),
    ({"tools": {}, "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools[1]"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
            ]
        },
        "tools[0].function.parameters.type",
    ),
    ({"functions": [{"name": "f"}]}, "functions"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        "tool_choice.function.name",
    ),
    ({"tools": [TOOL], "tool_choice": "add"}, "tool_choice"),
    ({"tool_choice": "required"}, "tools"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"seed": 1.5}, "seed"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": []}, None),
    ({"stream": True, "stream_options": 3}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"modalities": ["text", "audio"]}, "modalities"),
]


@pytest.mark.parametrize("change, param", CASES, ids=[f"{i}-{p}" for i, (_, p) in enumerate(CASES)])
async def test_what_is_wrong_is_named(change: dict[str, Any], param: str | None) -> None:
    session = Prescribed()
    body = post(json.dumps({**GOOD, **change}).encode())
    async with serving(session) as (server, _):
        if param is None:
            ((status, _, _),) = await send(server, body)
            assert status == 200
            return
        assert (await refused(server, body))["param"] == param
    assert session.asks == []


async def test_messages_in_an_order_that_is_right() -> None:
    session = Prescribed()
    orders = [
        [CALLS, RESULT],
        [{"role": "assistant", "content": "Hello."}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": None}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "x", "tool_calls": []}],
        [*QUESTION, CALLS, RESULT, CALLS, RESULT, {"role": "system", "content": "x"}],
    ]
    async with serving(session) as (server, _):
        for order in orders:
            body = json.dumps({**GOOD, "messages": order}).encode()
            ((status, _, answer),) = await send(server, post(body))
            assert status == 200, answer
    assert [len(ask.messages) for ask in session.asks] == [2, 2, 3, 2, 6]


async def test_a_body_that_is_too_large_is_refused_unread() -> None:
    bomb = gzip.compress(b" " * 2**24)
    assert len(bomb) < 2**15
    async with serving(Prescribed(), max_body_mb=0.125) as (server, _):
        error = await refused(server, post(b"", "Content-Length: 200000"), 413)
        assert "larger than 0.125 MiB" in error["message"]
        chunked = b"30000\r\n" + b" " * 0x30000 + b"\r\n0\r\n\r\n"
        await refused(server, post(chunked, "Transfer-Encoding: chunked"), 413)
        await refused(server, post(bomb, "Content-Encoding: gzip"), 413)
        assert await asks_well(server)


async def test_a_body_is_asked_for_where_the_caller_waits_for_that() -> None:
    body = json.dumps(GOOD).encode()
    async with serving(Prescribed()) as (server, _):
        reader, writer = await connect(server)
        writer.write(post(b"", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_packed_bodies() -> None:
    packed = gzip.compress(json.dumps(GOOD).encode())
    async with serving(Prescribed()) as (server, _):
        ((status, _, _),) = await send(server, post(packed, "Content-Encoding: gzip"))
        assert status == 200
        for wrong in (b"no gzip at all", packed[:20]):
            await refused(server, post(wrong, "Content-Encoding: gzip"))
        assert await asks_well(server)


async def test_content_types_do_not_matter() -> None:
    raw = json.dumps(GOOD).encode()
    async with serving(Prescribed()) as (server, _):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
            ((status, _, _),) = await send(server, post(raw, f"Content-Type: {kind}"))
            assert status == 200


async def test_half_a_body_and_then_nothing() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        _, writer = await connect(server)
        writer.write(post(json.dumps(GOOD).encode())[:-20])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.sleep(0.05)
        assert await asks_well(server)
    assert len(session.asks) == 1 and session.lost == []


async def test_requests_one_behind_the_other_are_answered_in_order() -> None:
    bodies = [json.dumps({**GOOD, "model": f"m{i}"}).encode() for i in range(3)]
    bodies[1] = b"{"
    raw = b"".join(map(post, bodies))
    async with serving(Prescribed()) as (server, _):
        answers = await send(server, raw, answers=3)
    assert [status for status, _, _ in answers] == [200, 400, 200]
    assert json.loads(answers[2][2])["model"] == "m2"


@pytest.mark.parametrize(
    "line, status, allow",
    [
        ("GET /v1/chat/completions", 405, "POST"),
        ("OPTIONS /v1/chat/completions", 405, "POST"),
        ("DELETE /v1/models", 405, "GET, HEAD"),
        ("GET /v1/embeddings", 404, None),
        ("GET /", 404, None),
        ("GET /sessions", 404, None),
        ("GET /v1/models/gpt-5", 404, None),
    ],
)
async def test_other_places_and_methods(line: str, status: int, allow: str | None) -> None:
    raw = f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    async with serving(Prescribed()) as (server, _):
        ((_, headers, _),) = await send(server, raw)
        await refused(server, raw, status)
    assert headers.get("allow") == allow


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nno header\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer " + b"k" * 70_000 + b"\r\n\r\n",
        post(b"", "Content-Length: -1"),
        post(b"zz\r\n", "Transfer-Encoding: chunked"),
    ],
    ids=["line", "header", "long", "length", "chunk"],
)
async def test_what_is_hardly_http(raw: bytes) -> None:
    async with serving(Prescribed()) as (server, _):
        await refused(server, raw)
        assert await asks_well(server)


async def test_a_head_has_no_body() -> None:
    async with serving(Prescribed()) as (server, _):
        raw = f"HEAD {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        ((status, _, body),) = await send(server, raw)
    assert (status, body) == (405, b"")


async def test_the_client_raises_its_own_errors() -> None:
    async with serving(Prescribed()) as (server, _):
        sdk = client(server, api_key="wrong", max_retries=2)
        with pytest.raises(openai.AuthenticationError, match="that key is unknown") as caught:
            await sdk.chat.completions.create(model="m", messages=QUESTION)
        assert caught.value.code == "invalid_api_key"
        sdk = client(server, api_key="k", max_retries=2)
        with pytest.raises(openai.BadRequestError) as bad:
            await sdk.chat.completions.create(model="m", messages=[])
        assert bad.value.param == "messages"
