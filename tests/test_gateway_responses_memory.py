"""Conversations that go on from a response, replayed answers, and what is refused."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hypothesis import given
from openai.types.responses import Response

from answering import Prescribed, said, serving
from conversing import TWO_CALLS, Scripted, choices
from retrain.gateway.ask import Choice, Reply, RequestRefused
from retrain.gateway.wire.responses import Responses
from test_gateway_responses import ANSWERED, ASKED, TOOL, client, output

BODY = {"model": "m", "input": "2 + 3?"}


def answered(dialect: Responses, body: dict[str, Any], choice: Choice, key: str = "k") -> Any:
    """The answer's object, in the types of OpenAI's client."""
    ask = dialect.read(body, {"Authorization": key})
    return Response.model_validate(dialect.write(Reply((choice,), ask.model), ask))


@given(choices())
def test_an_answer_that_is_sent_again_is_the_same_message(choice: Choice) -> None:
    dialect = Responses()
    answer = answered(dialect, BODY, choice)
    calls = choice.message.get("tool_calls", ())
    outputs = [output(call["id"]) for call in calls]
    replayed = [item.model_dump(mode="json") for item in answer.output]
    again = dialect.read({"model": "m", "input": [ASKED, *replayed, *outputs]}, {})
    assert again.messages[1] == choice.message
    after = {"previous_response_id": answer.id, "input": [*outputs, ASKED], "model": "m"}
    assert dialect.read(after, {"authorization": "k"}).messages[:2] == again.messages[:2]


async def test_a_conversation_goes_on_from_a_response() -> None:
    session = Scripted(TWO_CALLS, said(), said("Ten."))
    results = [
        {"role": "tool", "tool_call_id": each, "content": "5"} for each in ("call_1", "call_2")
    ]
    async with serving(session) as (server, _):
        create = client(server).responses.create
        first = await create(model="m", input="2 + 3?", instructions="Be brief.", tools=[TOOL])
        outputs = [output("call_1"), output("call_2")]
        stream = await create(
            model="m", input=outputs, previous_response_id=first.id, stream=True, tools=[TOOL]
        )
        second = [event async for event in stream][-1].response
        assert second.previous_response_id == first.id
        third = await create(
            model="m", input="Twice?", previous_response_id=second.id, instructions="Be kind."
        )
        await create(model="m", input="And now?", previous_response_id=second.id)
    assert third.output_text == "Ten."
    line = (ASKED, TWO_CALLS.message, *results, ANSWERED)
    told = {"role": "user", "content": "Twice?"}
    assert session.asks[2].messages == ({"role": "system", "content": "Be kind."}, *line, told)
    assert session.asks[3].messages == (*line, {"role": "user", "content": "And now?"})


async def test_an_item_is_found_by_its_id() -> None:
    session = Scripted(TWO_CALLS, said())
    async with serving(session) as (server, _):
        create = client(server).responses.create
        first = await create(model="m", input="2 + 3?", tools=[TOOL])
        references = [{"type": "item_reference", "id": item.id} for item in first.output]
        outputs = [output("call_1"), output("call_2")]
        await create(model="m", input=[ASKED, *references, *outputs], tools=[TOOL])
    assert session.asks[1].messages[:2] == (ASKED, TWO_CALLS.message)


def test_what_is_another_callers_or_not_stored_is_not_found() -> None:
    dialect = Responses()
    mine = answered(dialect, BODY, said())
    unstored = answered(dialect, {**BODY, "store": False}, said())
    for key, name in (("other", mine.id), ("k", unstored.id), ("k", "resp_none")):
        with pytest.raises(RequestRefused) as caught:
            dialect.read({**BODY, "previous_response_id": name}, {"Authorization": key})
        assert caught.value.code == "previous_response_not_found"
    item = {"type": "item_reference", "id": mine.output[0].id}
    with pytest.raises(RequestRefused, match="no item has the id"):
        dialect.read({"model": "m", "input": [item, ASKED]}, {"Authorization": "other"})


def test_conversations_that_were_not_used_for_longest_are_forgotten() -> None:
    """Each answer counts as two messages, 1000 each and their text: 11,111 has room for five."""
    dialect = Responses(most_characters=11_111)
    old = answered(dialect, BODY, said("1"))
    later = answered(dialect, {**BODY, "previous_response_id": old.id}, said("2"))
    others = [answered(dialect, BODY, said("3")) for _ in range(3)]
    assert len(dialect) == 5
    dialect.read({**BODY, "previous_response_id": later.id}, {"Authorization": "k"})
    more = [answered(dialect, BODY, said("4")) for _ in range(3)]
    assert len(dialect) == 5
    for kept in (old, later, *more):
        dialect.read({**BODY, "previous_response_id": kept.id}, {"Authorization": "k"})
    for gone in others:
        with pytest.raises(RequestRefused):
            dialect.read({**BODY, "previous_response_id": gone.id}, {"Authorization": "k"})


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["text"]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [output("c9")]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}]},
            "input",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input"),
        ({"model": None}, "model"),
        ({"instructions": 3}, "instructions"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"name": "no name"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        Responses().read(BODY | change, {})
    assert caught.value.param == param and caught.value.status == 400


async def test_a_refusal_has_the_shape_that_the_client_raises() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        with pytest.raises(openai.BadRequestError, match="nothing here runs it") as caught:
            await client(server).responses.create(
                model="m", input="2 + 3?", tools=[{"type": "web_search"}]
            )
        assert caught.value.param == "tools[0].type"
        session.failure = RequestRefused("the context is full", code="context_length_exceeded")
        session.delay_s = 1.1  # the stream has begun
        stream = await client(server).responses.create(model="m", input="2 + 3?", stream=True)
        with pytest.raises(openai.APIError, match="the context is full") as late:
            [event async for event in stream]
    assert late.value.code == "context_length_exceeded"
