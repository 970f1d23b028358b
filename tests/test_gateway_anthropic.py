"""Anthropic's own client against the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
from anthropic import beta_async_tool
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from answering import Prescribed, said, serving
from conversing import TWO_CALLS, Scripted, parsed
from retrain.gateway.ask import Choice
from retrain.gateway.server import GatewayServer

TOOL = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
ASKED = {"role": "user", "content": "2 + 3?"}
BASE: dict[str, Any] = {"model": "m", "max_tokens": 64}
THINKING = {"type": "enabled", "budget_tokens": 1024}


def client(server: GatewayServer, **settings: Any) -> anthropic.AsyncAnthropic:
    settings = {"max_retries": 0, "api_key": "key", **settings}
    return anthropic.AsyncAnthropic(base_url=server.url, **settings)


def result(call_id: str, content: Any = "5", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


async def test_an_answer_has_all_that_the_client_reads() -> None:
    async with serving(Prescribed(TWO_CALLS)) as (server, _):
        create = client(server).messages.with_raw_response.create
        raw = await create(**BASE, messages=[ASKED], tools=[TOOL], thinking=THINKING)
        whole = await raw.text()
    answer = Message.model_validate_json(whole)  # strictly: every field has its type
    assert answer.id.startswith("msg_") and answer.model == "m" and answer.role == "assistant"
    assert answer.stop_reason == "tool_use" and answer.stop_sequence is None
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, call, _ = answer.content
    assert thinking.thinking == "Two and three." and thinking.signature == ""
    assert text.text == "Let me see."
    assert (call.id, call.name) == ("call_1", "add")
    assert call.input == {"a": 2, "b": {"c": [1.5, None]}}
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (7, 4, 7)


async def test_the_session_gets_what_was_asked() -> None:
    session = Prescribed()
    cached = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "c1", "name": "add", "input": {"b": 2, "a": "é"}}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    async with serving(session) as (server, _):
        await client(server).messages.create(
            **BASE,
            system=[{"type": "text", "text": "Be brief.", **cached}, text("Add.")],
            messages=[
                {"role": "user", "content": [text("2 + 3?") | cached, text("Now.")]},
                {"role": "assistant", "content": [text("He"), text("re: "), call]},
                {"role": "user", "content": [result("c1", [text("5")]) | cached, text("Well?")]},
                {"role": "system", "content": "Hurry."},
                ASKED,
            ],
            tools=[TOOL | cached],
            tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
            stop_sequences=["\n", "END"],
            output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
            metadata={"user_id": "u"},
            service_tier="auto",
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
            extra_headers={"x-stainless-retry-count": "1"},
        )
    (ask,) = session.asks
    function = {"name": "add", "arguments": '{"b":2,"a":"é"}'}
    calls = [{"id": "c1", "type": "function", "function": function}]
    assert ask.messages == (
        {"role": "system", "content": "Be brief.\n\nAdd."},
        {"role": "user", "content": "2 + 3?\n\nNow."},
        {"role": "assistant", "content": "Here: ", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "user", "content": "Well?"},
        {"role": "system", "content": "Hurry."},
        ASKED,
    )
    described = {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": TOOL["input_schema"],
    }
    assert ask.tools == ({"type": "function", "function": described},)
    assert ask.tool_choice == "tool:add" and not ask.parallel_tool_calls
    assert ask.stop == ("\n", "END") and ask.max_tokens == 64
    assert ask.retried and not ask.stream and not ask.logprobs
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert ask.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "reasoning_effort": "low",
        "response_format": form,
    }


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


async def test_a_tool_loop_that_sends_all_again() -> None:
    session = Scripted(TWO_CALLS, said())
    async with serving(session) as (server, _):
        messages: list[Any] = [ASKED]
        create = client(server).messages.create
        first = await create(**BASE, messages=messages, tools=[TOOL], thinking=THINKING)
        calls = [block for block in first.content if block.type == "tool_use"]
        results = [result(calls[0].id), result(calls[1].id, "no such tool", is_error=True)]
        messages.append({"role": "assistant", "content": first.content})
        messages.append({"role": "user", "content": results})
        second = await create(**BASE, messages=messages, tools=[TOOL])
    assert second.content[0].text == "It is five." and second.stop_reason == "end_turn"
    asked, sent, *told = session.asks[1].messages
    assert asked == ASKED and parsed(sent) == parsed(TWO_CALLS.message)
    assert told == [
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: no such tool"},
    ]


async def test_the_client_runs_the_tools_itself() -> None:
    @beta_async_tool
    async def add(a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    asks = said(None, calls=[("call_1", "add", '{"a": 2, "b": 3}')])
    for stream in (False, True):
        session = Scripted(asks, said())
        async with serving(session) as (server, _):
            run = client(server).beta.messages.tool_runner(
                **BASE, messages=[ASKED], tools=[add], stream=stream
            )
            final = await run.until_done()
        assert final.content[0].text == "It is five."
        _, sent, told = session.asks[1].messages
        assert parsed(sent) == parsed(asks.message)
        assert told == {"role": "tool", "tool_call_id": "call_1", "content": "5"}


async def test_reasoning_is_for_callers_that_turned_thinking_on() -> None:
    choice = said("Five.", reasoning="Easy.")
    settings = (None, {"type": "disabled"}, {"type": "adaptive"}, HIDDEN)
    seen = []
    async with serving(Prescribed(choice)) as (server, _):
        for thinking in settings:
            more = {} if thinking is None else {"thinking": thinking}
            answer = await client(server).messages.create(**BASE, messages=[ASKED], **more)
            seen.append([block.type for block in answer.content])
    assert seen == [["text"], ["text"], ["thinking", "text"], ["text"]]


HIDDEN = {"type": "adaptive", "display": "omitted"}


async def test_the_events_are_those_of_the_api() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    choice = said("It is five.", calls=[("c1", "add", '{"a": "b c"}')], reasoning="Easy one.")
    async with serving(Prescribed(choice)) as (server, _):
        stream = await client(server).messages.create(
            **BASE, messages=[ASKED], thinking=THINKING, stream=True
        )
        events = [event async for event in stream]
    for event in events:
        adapter.validate_json(event.to_json())
    start, *blocks, delta, stop = events
    assert start.type == "message_start" and start.message.content == []
    assert start.message.stop_reason is None and start.message.usage.input_tokens == 7
    assert [(e.type.removeprefix("content_block_"), e.index) for e in blocks] == [
        *[(kind, 0) for kind in ("start", "delta", "delta", "delta", "stop")],
        *[(kind, 1) for kind in ("start", "delta", "delta", "delta", "stop")],
        *[(kind, 2) for kind in ("start", "delta", "delta", "delta", "stop")],
    ]
    deltas = [event.delta for event in blocks if event.type == "content_block_delta"]
    assert [d.thinking for d in deltas[:2]] == ["Easy", " one."]
    assert deltas[2].type == "signature_delta" and deltas[2].signature == ""
    assert [d.text for d in deltas[3:6]] == ["It", " is", " five."]
    assert [d.partial_json for d in deltas[6:]] == ["", '{"a":"b', ' c"}']
    assert delta.delta.stop_reason == "tool_use" and delta.usage.output_tokens == 7
    assert stop.type == "message_stop"


async def test_the_client_puts_a_stream_together() -> None:
    async with serving(Prescribed(TWO_CALLS)) as (server, _):
        settings = {**BASE, "messages": [ASKED], "tools": [TOOL], "thinking": THINKING}
        async with client(server).messages.stream(**settings) as stream:
            words = [piece async for piece in stream.text_stream]
            streamed = await stream.get_final_message()
        whole = await client(server).messages.create(**settings)
    assert words == ["Let", " me", " see."]
    kept = {"content", "stop_reason", "stop_sequence", "usage", "role", "model"}
    assert streamed.model_dump(include=kept) == whole.model_dump(include=kept)


async def test_why_it_stopped() -> None:
    """A stop string of the request is named; one of the policy's own is not."""
    message = said().message
    ends = [
        (Choice(message, "stop"), "end_turn", None),
        (Choice(message, "stop", stopped_by="END"), "stop_sequence", "END"),
        (Choice(message, "length"), "max_tokens", None),
        (Choice(message, "content_filter"), "refusal", None),
        (Choice(TWO_CALLS.message, "tool_calls", stopped_by="END"), "tool_use", None),
    ]
    for choice, reason, sequence in ends:
        async with serving(Prescribed(choice)) as (server, _):
            answer = await client(server).messages.create(**BASE, messages=[ASKED])
            async with client(server).messages.stream(**BASE, messages=[ASKED]) as stream:
                streamed = await stream.get_final_message()
        for each in (answer, streamed):
            assert (each.stop_reason, each.stop_sequence) == (reason, sequence)


async def test_the_synchronous_client_reads_both() -> None:
    def ask(url: str) -> tuple[str, str]:
        with anthropic.Anthropic(base_url=url, api_key="key", max_retries=0) as sync:
            whole = sync.messages.create(**BASE, messages=[ASKED]).content[0].text
            with sync.messages.stream(**BASE, messages=[ASKED]) as stream:
                return whole, stream.get_final_text()

    async with serving(Prescribed()) as (server, book):
        whole, streamed = await asyncio.to_thread(ask, server.url)
    assert whole == streamed == "It is five."
    assert book.found == [(None, "key")] * 2
