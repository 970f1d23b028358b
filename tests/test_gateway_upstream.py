"""A gateway in front of another endpoint: what is asked of it, and what becomes of its failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web

from answering import serving
from retrain.gateway.ask import Ask, RequestRefused
from retrain.gateway.records import RecordedSession, Records
from retrain.gateway.upstream import TextSession, Upstream
from retrain.types import UserError

USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}


class Endpoint:
    """Answers what is queued; an int is a status, a float a wait before the usual answer."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.queue: list[Any] = []
        self.at_once = self.most = 0

    async def __call__(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            given = self.queue.pop(0) if self.queue else 0.0
            if isinstance(given, tuple):
                return web.json_response(given[1], status=given[0])
            await asyncio.sleep(given)
        finally:
            self.at_once -= 1
        n = len(self.bodies)
        message = {"role": "assistant", "content": f"answer {n}", "reasoning": "hm"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {"model": "big", "choices": [choice], "usage": {"prompt_tokens": 3}}
        )


@asynccontextmanager
async def endpoint(**given: Any) -> AsyncIterator[tuple[Endpoint, Upstream]]:
    made = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", made)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    upstream = Upstream(url, **{"backoff_s": 0.001, **given})
    try:
        yield made, upstream
    finally:
        await upstream.close()
        await runner.cleanup()


async def test_a_request_is_passed_on_whole() -> None:
    async with endpoint(model="big") as (made, upstream):
        ask = Ask(
            (USER,),
            tools=(TOOL,),
            tool_choice="tool:run",
            parallel_tool_calls=False,
            n=2,
            stop=("x",),
            max_tokens=5,
            logprobs=True,
            model="small",
            stream=True,
            sampling={"temperature": 0.3, "response_format": {"type": "json_object"}},
        )
        reply = await upstream.answer(ask)
    assert made.bodies == [
        {
            "temperature": 0.3,
            "response_format": {"type": "json_object"},
            "model": "big",
            "messages": [USER],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "run"}},
            "parallel_tool_calls": False,
            "n": 2,
            "stop": ["x"],
            "max_tokens": 5,
            "logprobs": True,
        }
    ]
    (choice,) = reply.choices
    assert (choice.message["content"], choice.message["reasoning_content"]) == ("answer 1", "hm")
    assert (reply.model, reply.prompt_tokens) == ("big", 3)


async def test_every_key_of_an_upstream_acts() -> None:
    async with endpoint(retries=1, timeout_s=0.5, max_concurrency=2) as (made, upstream):
        made.queue = [(503, {}), (200, {"choices": "odd"})]
        with pytest.raises(RequestRefused, match="2 attempts") as refused:
            await upstream.answer(Ask((USER,)))
        assert (refused.value.status, len(made.bodies)) == (502, 2)
        made.queue = [0.7]
        reply = await upstream.answer(Ask((USER,)))
        assert reply.choices[0].message["content"] == "answer 4", "the first try took too long"
        await asyncio.sleep(0.3)
        made.queue, made.most = [0.05] * 6, 0
        await asyncio.gather(*(upstream.answer(Ask((USER,))) for _ in range(6)))
        assert made.most == 2


async def test_refusals_are_told_without_the_key() -> None:
    async with endpoint(api_key="sk-secret") as (made, upstream):
        said = {"error": {"message": "bad sk-secret", "code": "odd", "param": "messages"}}
        made.queue = [(400, said), (401, said)]
        with pytest.raises(RequestRefused, match=r"bad \*\*\*") as refused:
            await upstream.answer(Ask((USER,)))
        assert (refused.value.status, refused.value.code) == (400, "odd")
        with pytest.raises(RequestRefused) as refused:
            await upstream.answer(Ask((USER,)))
        assert refused.value.status == 502, "the key is not the caller's"
        assert "sk-secret" not in refused.value.message
    with pytest.raises(UserError, match="web address"):
        Upstream("nowhere")


async def test_the_other_name_of_the_token_limit_is_learnt() -> None:
    async with endpoint() as (made, upstream):
        made.queue = [(400, {"error": {"message": "use 'max_completion_tokens' instead"}})]
        for _ in range(2):
            await upstream.answer(Ask((USER,), max_tokens=5))
        asked = [{k: v for k, v in body.items() if k.startswith("max")} for body in made.bodies]
        assert asked == [{"max_tokens": 5}, *[{"max_completion_tokens": 5}] * 2]


async def test_a_lost_answer_is_given_again_and_written_once(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    async with endpoint() as (made, upstream):
        session = RecordedSession(TextSession(upstream), records, "s")
        lost = await session.answer(Ask((USER,), gone=lambda: True))
        assert await session.answer(Ask((USER,))) is lost
        other = await session.answer(Ask((USER,)))
        assert other is not lost and len(made.bodies) == 2
        session.undelivered(other)
        assert await session.answer(Ask((USER,))) is other
        said = dict(lost.choices[0].message)
        await session.answer(Ask((USER, said, USER)))
        await session.answer(Ask((USER, said, {**USER, "content": "b"})))
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    places = [line["conversation"] for line in lines]
    assert len(lines) == 4 and len(set(places)) == 3
    assert places[2] == places[0] and lines[2]["messages"] == [USER]
    assert lines[3]["parent"] == places[0] and len(lines[3]["messages"]) == 3


async def test_records_are_whole_lines_and_tools_are_told_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"type": "exchange", "torn')
    records = Records(path)
    async with endpoint() as (_, upstream):
        session = RecordedSession(TextSession(upstream), records, "s")
        talk: list[Any] = [USER]
        for tools in ((TOOL,), (TOOL,), ()):
            reply = await session.answer(Ask(tuple(talk), tools=tools))
            talk += [dict(reply.choices[0].message), USER]
    session.note(1.0, {"answer": 5})
    records.close()
    torn, *lines = path.read_text().splitlines()
    assert torn.endswith("torn")
    exchanges = [json.loads(line) for line in lines]
    assert [line.get("tools") for line in exchanges[:3]] == [[TOOL], None, []]
    assert exchanges[3]["reward"] == 1.0 and records.exchanges == 3
    with pytest.raises(UserError, match="cannot be written"):
        Records(tmp_path / "records.jsonl" / "below")


async def test_what_some_endpoints_answer_is_read() -> None:
    """Parts, thoughts among them; calls without an id; an answer of nothing is none."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "it "}, {"type": "text", "text": "is"}]
    function = {"name": "f", "arguments": {"a": 1}}
    call = {"id": "", "type": "function", "function": function}
    async with endpoint(retries=0) as (made, upstream):
        said = {"content": parts}, {"content": None, "tool_calls": [call, call]}
        made.queue = [(200, {"choices": [{"message": each}]}) for each in said]
        made.queue += [(200, {"choices": []}), (307, {})]
        first, second = [(await upstream.answer(Ask((USER,)))).choices[0] for _ in range(2)]
        for fault in ("no chat completion", "answers 307"):
            with pytest.raises(RequestRefused, match=fault) as refused:
                await upstream.answer(Ask((USER,)))
            assert refused.value.status == 502
    assert (first.message["content"], first.message["reasoning_content"]) == ("it is", "hm")
    calls = second.message["tool_calls"]
    assert [each["function"]["arguments"] for each in calls] == ['{"a": 1}'] * 2
    assert "" not in {each["id"] for each in calls} and calls[0]["id"] != calls[1]["id"]


async def test_waiting_for_a_turn_is_no_part_of_an_attempt() -> None:
    async with endpoint(retries=0, timeout_s=0.4, max_concurrency=1) as (made, upstream):
        made.queue = [0.15] * 5
        await asyncio.gather(*(upstream.answer(Ask((USER,))) for _ in range(5)))
    assert made.most == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2},
        {"tools": (TOOL,)},
        {"tool_choice": "none"},
        {"stop": ("x",)},
        {"max_tokens": 5},
        {"model": "other"},
        {"sampling": {"temperature": 0}},
    ],
)
async def test_a_lost_answer_is_that_of_the_same_request(change: dict[str, Any]) -> None:
    async with endpoint() as (made, upstream):
        session = TextSession(upstream)
        lost = await session.answer(Ask((USER,), gone=lambda: True))
        assert await session.answer(Ask((USER,), **change)) is not lost
        assert await session.answer(Ask((USER,))) is lost
    assert len(made.bodies) == 2


async def test_callers_do_not_try_again_with_a_wrong_key_of_ours() -> None:
    async with (
        endpoint(api_key="sk-secret") as (made, upstream),
        serving(TextSession(upstream)) as (server, _),
        httpx2.AsyncClient() as caller,
    ):
        made.queue = [(403, {}), (501, {}), (501, {}), (501, {})]
        url, body = f"{server.url}/v1/chat/completions", {"model": "m", "messages": [USER]}
        answers = [await caller.post(url, json=body) for _ in range(2)]
    told = [(each.status_code, each.headers.get("x-should-retry")) for each in answers]
    assert told == [(502, "false"), (502, None)]
