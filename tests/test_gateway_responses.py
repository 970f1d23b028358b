"""OpenAI's own client and its Responses API against the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from answering import Prescribed, said, serving
from conversing import TWO_CALLS, Scripted
from retrain.gateway.server import GatewayServer

TOOL = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}
ASKED = {"role": "user", "content": "2 + 3?"}
ANSWERED = {"role": "assistant", "content": "It is five."}


def client(server: GatewayServer, **settings: Any) -> openai.AsyncOpenAI:
    settings = {"max_retries": 0, "api_key": "key", **settings}
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", **settings)


def output(call_id: str, text: Any = "5") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


async def test_an_answer_has_all_that_the_client_reads() -> None:
    choice = said("Five.", reasoning="Easy.", tokens=[("Fi", -0.5), ("ve.", -0.25)])
    async with serving(Prescribed(choice)) as (server, _):
        raw = await client(server).responses.with_raw_response.create(
            model="m",
            input="2 + 3?",
            instructions="Be brief.",
            metadata={"a": "b"},
            temperature=0.5,
            tools=[TOOL],
            include=["message.output_text.logprobs"],
        )
    answer = Response.model_validate_json(raw.content)  # strictly: every field has its type
    assert answer.id.startswith("resp_") and answer.model == "m" and answer.object == "response"
    assert answer.status == "completed" and answer.error is None
    assert answer.output_text == "Five."
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "Easy."
    tokens = [(t.token, t.bytes, t.logprob) for t in answer.output[1].content[0].logprobs]
    assert tokens == [("Fi", [70, 105], -0.5), ("ve.", [118, 101, 46], -0.25)]
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (11, 7, 18)
    assert usage.input_tokens_details.cached_tokens == 4
    assert answer.instructions == "Be brief." and answer.metadata == {"a": "b"}
    assert answer.temperature == 0.5 and answer.tools[0].name == "add"


async def test_the_session_gets_what_was_asked() -> None:
    session = Prescribed()
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    async with serving(session) as (server, _):
        await client(server).responses.create(
            model="m",
            input=[
                {"role": "developer", "content": "Add."},
                {"role": "user", "content": [{"type": "input_text", "text": "2 + "}, TEXT]},
                {"type": "reasoning", "id": "rs_9", "summary": [SUMMARY]},
                {"type": "message", "role": "assistant", "content": "Hm."},
                {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
                output("c1", [{"type": "input_text", "text": "5"}]),
            ],
            instructions="Be brief.",
            tools=[TOOL],
            tool_choice={"type": "function", "name": "add"},
            parallel_tool_calls=False,
            max_output_tokens=9,
            temperature=0.5,
            top_p=0.9,
            include=["message.output_text.logprobs"],
            reasoning={"effort": "low"},
            text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
            truncation="auto",
            extra_headers={"x-stainless-retry-count": "1"},
        )
    (ask,) = session.asks
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert ask.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "Hm.", "reasoning_content": "So", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    )
    function = {key: TOOL[key] for key in ("name", "description", "parameters", "strict")}
    assert ask.tools == ({"type": "function", "function": function},)
    assert ask.tool_choice == "tool:add" and not ask.parallel_tool_calls
    assert ask.max_tokens == 9 and ask.logprobs and ask.retried and not ask.stream
    assert ask.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }


TEXT = {"type": "input_text", "text": "3?"}
SUMMARY = {"type": "summary_text", "text": "So"}


async def test_a_tool_loop_that_sends_all_again() -> None:
    session = Scripted(TWO_CALLS, said())
    async with serving(session) as (server, _):
        items: list[Any] = [ASKED]
        first = await client(server).responses.create(model="m", input=items, tools=[TOOL])
        calls = [item for item in first.output if item.type == "function_call"]
        assert [(c.call_id, c.name) for c in calls] == [("call_1", "add"), ("call_2", "add")]
        items += [*first.output, *(output(call.call_id) for call in calls)]
        second = await client(server).responses.create(model="m", input=items, tools=[TOOL])
    assert second.output_text == "It is five."
    results = [{"role": "tool", "tool_call_id": c.call_id, "content": "5"} for c in calls]
    assert session.asks[1].messages == (ASKED, TWO_CALLS.message, *results)


async def test_calls_of_one_answer_stay_together_between_their_outputs() -> None:
    session = Scripted(TWO_CALLS, said())
    async with serving(session) as (server, _):
        items: list[Any] = [ASKED]
        first = await client(server).responses.create(model="m", input=items, tools=[TOOL])
        for item in first.output:
            items += [item, *([output(item.call_id)] if item.type == "function_call" else ())]
        await client(server).responses.create(model="m", input=items, tools=[TOOL])
    results = [
        {"role": "tool", "tool_call_id": each, "content": "5"} for each in ("call_1", "call_2")
    ]
    assert session.asks[1].messages == (ASKED, TWO_CALLS.message, *results)


async def test_two_messages_that_stand_together_are_two() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        await client(server).responses.create(model="m", input=[ASKED, ANSWERED, ANSWERED, ASKED])
    assert session.asks[0].messages == (ASKED, ANSWERED, ANSWERED, ASKED)


async def test_the_events_are_those_of_the_api() -> None:
    choice = said(
        "It is five.", calls=[("c1", "add", '{"a": 2}')], reasoning="Easy.", tokens=PIECES
    )
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    async with serving(Prescribed(choice)) as (server, _):
        stream = await client(server).responses.create(model="m", input="2 + 3?", stream=True)
        events = [event async for event in stream]
    for event in events:
        adapter.validate_json(event.to_json())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    part = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done", *done),
        *(*part, *["output_text.delta"] * 3, "output_text.done", *done),
        *("output_item.added", *["function_call_arguments.delta"] * 2),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    first, last = events[0].response, events[-1].response
    assert first.status == "in_progress" and first.output == [] and first.id == last.id
    assert [e.item for e in events if e.type == "response.output_item.done"] == last.output
    begun = [e.item for e in events if e.type == "response.output_item.added"]
    assert [item.status for item in begun] == ["in_progress"] * 3
    assert begun[1].content == [] and begun[2].arguments == ""
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert [e.delta for e in deltas] == ["It", " is", " five."]
    assert [[t.logprob for t in e.logprobs] for e in deltas] == [[-0.5], [-0.25], [-1.0, -2.0]]
    assert {e.item_id for e in deltas} == {last.output[1].id}


PIECES = [("It", -0.5), (" is", -0.25), (" five", -1.0), (".", -2.0)]


async def test_the_client_puts_a_stream_together() -> None:
    async with (
        serving(Prescribed(TWO_CALLS)) as (server, _),
        client(server).responses.stream(model="m", input="2 + 3?", tools=[TOOL]) as stream,
    ):
        seen = [event async for event in stream]
        whole = await stream.get_final_response()
    assert whole.output_text == "Let me see."
    snapshots = [e.snapshot for e in seen if e.type == "response.function_call_arguments.delta"]
    arguments = TWO_CALLS.message["tool_calls"][0]["function"]["arguments"]
    assert whole.output[2].arguments == arguments and arguments in snapshots


async def test_an_answer_that_was_cut_is_incomplete() -> None:
    cut = said("It is")
    session = Prescribed(type(cut)(cut.message, "length"))
    async with serving(session) as (server, _):
        answer = await client(server).responses.create(model="m", input="2 + 3?")
        stream = await client(server).responses.create(model="m", input="2 + 3?", stream=True)
        last = [event async for event in stream][-1]
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete" and last.response.status == "incomplete"


async def test_the_synchronous_client_reads_both() -> None:
    def ask(url: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as sync:
            whole = sync.responses.create(model="m", input="2 + 3?").output_text
            with sync.responses.stream(model="m", input="2 + 3?") as stream:
                return whole, stream.get_final_response().output_text

    async with serving(Prescribed()) as (server, _):
        whole, streamed = await asyncio.to_thread(ask, server.url)
    assert whole == streamed == "It is five."
