"""OpenAI message dicts to messages and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.data.messages import messages_from_dicts, messages_to_dicts
from retrain.types import Message, MessageType, ToolCall, UserError

TEXT = st.text(max_size=12)
OPTIONAL = st.none() | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    name=TEXT,
    arguments=st.dictionaries(TEXT, JSON, max_size=3),
    id=TEXT,
    error=OPTIONAL,
)


def message(type: MessageType, role: str | None) -> st.SearchStrategy[Message]:
    assistant = type is MessageType.MODEL or role == "assistant"
    return st.builds(
        Message,
        content=TEXT,
        type=st.just(type),
        role=st.just(role),
        name=OPTIONAL,
        reasoning=OPTIONAL,
        tool_calls=st.lists(CALLS, max_size=2).map(tuple) if assistant else st.just(()),
        tool_call_id=OPTIONAL,
    )


MESSAGES = st.lists(
    st.one_of(
        message(MessageType.SYSTEM, None),
        message(MessageType.SYSTEM, "developer"),
        message(MessageType.MESSAGE, "user"),
        message(MessageType.MESSAGE, "assistant"),
        message(MessageType.MODEL, None),
        message(MessageType.TOOL, None),
    ),
    max_size=5,
).map(tuple)


@given(MESSAGES)
def test_dicts_are_the_inverse_of_messages(messages: tuple[Message, ...]) -> None:
    rows = messages_to_dicts(messages)
    assert messages_from_dicts(rows) == messages
    assert messages_from_dicts(json.loads(json.dumps(rows))) == messages
    assert messages_to_dicts(messages_from_dicts(rows)) == rows


def test_a_conversation_with_a_tool_keeps_every_part() -> None:
    rows: list[dict[str, Any]] = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": [{"type": "text", "text": "2 "}, {"text": "+ 3?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "add",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "calc", "arguments": '{"x": "2+3", "y": null}'},
                }
            ],
        },
        {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "calc"},
        {"role": "assistant", "content": "5", "weight": 1},
    ]
    assert messages_from_dicts(rows) == (
        Message("Use tools.", MessageType.SYSTEM),
        Message("2 + 3?", MessageType.MESSAGE, role="user"),
        Message(
            "",
            MessageType.MODEL,
            reasoning="add",
            tool_calls=(ToolCall("calc", {"x": "2+3", "y": None}, id="c1"),),
        ),
        Message("5", MessageType.TOOL, name="calc", tool_call_id="c1"),
        Message("5", MessageType.MODEL),
    )


def test_nulls_that_arrow_fills_in_are_dropped_from_object_arguments() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None, "z": {"u": None, "v": 2}}}}
    row = {"role": "assistant", "content": "", "tool_calls": [call], "name": None}
    (message,) = messages_from_dicts([row])
    assert message.tool_calls == (ToolCall("f", {"x": 1, "z": {"v": 2}}),)


def test_an_assistant_message_of_weight_zero_is_context() -> None:
    (message,) = messages_from_dicts([{"role": "assistant", "content": "no", "weight": 0}])
    assert message == Message("no", MessageType.MESSAGE, role="assistant")


def test_another_party_is_written_as_a_named_user() -> None:
    rows = messages_to_dicts([Message("hm", MessageType.MESSAGE, role="critic")])
    assert rows == [{"role": "user", "content": "hm", "name": "critic"}]


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"content": "x"}, "unknown role None"),
        ("hello", "expected an object, found text"),
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": 3}, "content is int 3"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text"),
        ({"role": "assistant", "function_call": {}}, "function_call"),
        (call(name="f", arguments="{x}"), "tool call 1: arguments are not JSON"),
        (call(name="f", arguments="[1]"), "tool call 1: arguments are a list"),
        (call(arguments="{}"), "tool call 1: no function name"),
        ({"role": "assistant", "content": "", "tool_calls": "f()"}, "tool_calls is text"),
        ({**call(name="f"), "role": "user"}, "a user message has tool_calls"),
        ({"role": "user", "content": "x", "weight": 0}, "weight 0"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight 0.5"),
        ({"role": "tool", "content": "x", "tool_call_id": 7}, "tool_call_id is int 7"),
    ],
)
def test_faults_name_the_place(row: Any, fault: str) -> None:
    good = {"role": "user", "content": "x"}
    with pytest.raises(UserError) as caught:
        messages_from_dicts([good, row], place="t.jsonl, line 4")
    assert caught.value.cause.startswith("t.jsonl, line 4, message 2")
    assert fault in caught.value.cause
    assert caught.value.next_step


def test_one_message_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="expected a list of messages, found an object"):
        messages_from_dicts({"role": "user", "content": "x"})  # type: ignore[dict-item]
