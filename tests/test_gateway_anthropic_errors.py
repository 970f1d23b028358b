"""Replayed answers of Anthropic's API, the order of messages, and what is refused."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic.types import ErrorResponse
from hypothesis import given

from answering import Prescribed, said, serving
from conversing import choices, parsed
from retrain.gateway.ask import Choice, Reply, RequestRefused
from retrain.gateway.history import key_of
from retrain.gateway.wire.anthropic import UNREADABLE, read, refusal, write
from test_gateway_anthropic import ASKED, BASE, THINKING, TOOL, client, result, text

CALL = {"type": "tool_use", "id": "c1", "name": "add", "input": {}}
CALLS = {"role": "assistant", "content": [CALL]}
SAID = {"role": "assistant", "content": "Well."}
RESULT = {"role": "user", "content": [result("c1")]}
WIRE_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
WIRE_RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5"}


@given(choices())
def test_an_answer_that_is_sent_again_is_the_same_message(choice: Choice) -> None:
    ask = read({**BASE, "messages": [ASKED], "thinking": THINKING}, {})
    answer = anthropic.types.Message.model_validate(write(Reply((choice,), "m"), ask))
    results = [result(call["id"]) for call in choice.message.get("tool_calls", ())]
    replayed = {
        "role": "assistant",
        "content": [block.model_dump(mode="json") for block in answer.content],
    }
    after = {"role": "user", "content": [*results, text("Go on.")]}
    again = read({**BASE, "messages": [ASKED, replayed, after]}, {})
    assert parsed(again.messages[1]) == parsed(choice.message)
    assert key_of(again.messages[1]) == key_of(choice.message)


def test_arguments_that_are_no_object_are_kept_in_one() -> None:
    answer = write(Reply((said(None, calls=[("c1", "add", "not JSON")]),), "m"), read(BODY, {}))
    assert answer["content"][0]["input"] == {UNREADABLE: "not JSON"}


BODY = {**BASE, "messages": [ASKED]}


def read_messages(*messages: Any) -> Any:
    return read({**BASE, "messages": list(messages)}, {}).messages


def test_messages_that_follow_each_other() -> None:
    """The assistant's are one, and so are its text and its calls; a user's stay as they are."""
    assert read_messages(ASKED, ASKED, SAID, CALLS, RESULT) == (
        ASKED,
        ASKED,
        {"role": "assistant", "content": "Well.", "tool_calls": [WIRE_CALL]},
        WIRE_RESULT,
    )


def test_results_may_come_in_two_messages_and_after_words() -> None:
    both = {"role": "assistant", "content": [CALL, CALL | {"id": "c2"}]}
    words_first = {"role": "user", "content": [text("Here."), result("c2")]}
    read_back = read_messages(ASKED, both, RESULT, words_first)
    assert [m["role"] for m in read_back] == ["user", "assistant", "tool", "tool", "user"]
    assert [m.get("tool_call_id") for m in read_back[2:]] == ["c1", "c2", None]


@pytest.mark.parametrize(
    ("content", "more", "expected"),
    [
        ("", {}, ""),
        ([], {}, ""),
        ([text("a"), text("b")], {}, "a\n\nb"),
        ("no such file", {"is_error": True}, "Error: no such file"),
        ("ValueError: no", {"is_error": True}, "ValueError: no"),
        ("no", {"is_error": False}, "no"),
    ],
)
def test_results(content: Any, more: dict[str, Any], expected: str) -> None:
    block = result("c1", content, **more)
    assert read_messages(ASKED, CALLS, {"role": "user", "content": [block]})[2] == {
        "role": "tool",
        "tool_call_id": "c1",
        "content": expected,
    }
    bare = {"type": "tool_result", "tool_use_id": "c1"}
    assert read_messages(ASKED, CALLS, {"role": "user", "content": [bare]})[2]["content"] == ""


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "messages is missing"),
        ([], "messages is empty"),
        ("text", "messages must be a list"),
        (["text"], "messages.0 must be an object"),
        ([{"role": "robot", "content": "x"}], "messages.0.role must be one of"),
        ([{"role": "user"}], "messages.0.content must be a string or a list"),
        ([{"role": "user", "content": ""}], "messages.0.content must not be empty"),
        ([{"role": "user", "content": []}], "messages.0.content must not be empty"),
        ([{"role": "user", "content": [3]}], "messages.0.content.0 must be an object"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has the type 'image'"),
        ([{"role": "user", "content": [{"type": "document"}]}], "has the type 'document'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content.0.text must be a string"),
        ([{"role": "user", "content": [CALL]}], "has the type 'tool_use'"),
        ([SAID, ASKED], "messages.0: the first message must be a user's"),
        ([ASKED, SAID], "the last message is the assistant's"),
        ([RESULT], "messages.0.content.0: the tool_result is of 'c1'"),
        ([ASKED, CALLS, RESULT, RESULT], "messages.3.content.0: the tool_result is of 'c1'"),
        ([ASKED, CALLS, ASKED], "messages.2: no tool_result for the tool_use c1"),
        ([ASKED, CALLS], "messages: no tool_result for the tool_use c1"),
        ([ASKED, {"role": "assistant", "content": [result("c1")]}, ASKED], "type 'tool_result'"),
        (
            [ASKED, {"role": "assistant", "content": [{"type": "server_tool_use"}]}, ASKED],
            "type 'server_tool_use'",
        ),
        (
            [ASKED, {"role": "assistant", "content": [CALL | {"input": "x"}]}, RESULT],
            "messages.1.content.0.input must be an object",
        ),
        (
            [ASKED, CALLS, {"role": "user", "content": [result("c1", [{"type": "image"}])]}],
            "messages.2.content.0.content.0 has the type 'image'",
        ),
    ],
)
def test_messages_that_are_refused(messages: Any, says: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        read({**BASE, "messages": messages}, {})
    assert says in caught.value.message and caught.value.status == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "add"}]}, "tools.0.input_schema"),
        ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools.0.input_schema.type"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"temperature": 1.5}, "temperature"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"thinking": "on"}, "thinking"),
        ({"thread": {"type": "create"}}, "thread"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        read(BODY | change, {})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
    ],
)
def test_tool_choice(choice: dict[str, Any], expected: str) -> None:
    ask = read(BODY | {"tools": [TOOL], "tool_choice": choice}, {})
    assert ask.tool_choice == expected and ask.parallel_tool_calls


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_type_of_an_error(status: int, kind: str) -> None:
    body = refusal(RequestRefused("no", status=status))
    error = {"type": kind, "message": "no"}
    assert body == {"type": "error", "error": error, "request_id": None}
    if status != 413:  # which the client's types do not know
        ErrorResponse.model_validate(body)


async def test_the_client_raises_what_is_refused() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        with pytest.raises(anthropic.BadRequestError, match="end with a user's message"):
            await client(server).messages.create(**BASE, messages=[ASKED, SAID])
        with pytest.raises(anthropic.AuthenticationError, match="that key is unknown") as wrong:
            await client(server, api_key="wrong").messages.create(**BASE, messages=[ASKED])
        session.failure = RequestRefused("the context is full")
        session.delay_s = 1.1  # the stream has begun
        stream = await client(server).messages.create(**BASE, messages=[ASKED], stream=True)
        with pytest.raises(anthropic.APIStatusError, match="the context is full"):
            [event async for event in stream]
    assert wrong.value.body["error"]["type"] == "authentication_error"
