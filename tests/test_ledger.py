"""Scripted policies through real rollouts: what the engine saw and said is the ledger."""

from __future__ import annotations

from typing import Any

import pytest

from retrain.envs import DialogueEnvironment, ScriptedUser, ToolEnvironment
from retrain.rendering import Renderer, prompt_token_ids
from retrain.rollout import to_samples
from retrain.tools import tool_schema
from retrain.types import MessageType, Rollout, Source, ToolCall, UserError
from scripted import (
    TAGS,
    check_ledger,
    model,
    native_renderer,
    plain_renderer,
    play,
    run,
    tag_renderer,
    tokenizer,
    tool_result,
    user,
)

ENDS = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "<eos>",
    "r1": "<eos>",
    "strict": "<|im_end|>",
    "no_glue": "<|im_end|>",
    "plain": "<eos>",
}
JSON_CALL = '{"name": "run", "%s": {"code": "%s"}}'


def said(name: str, text: str) -> str:
    return text + ENDS[name]


def conversation(rollout: Rollout, tools: Any = None) -> list[dict[str, Any]]:
    roles = {"message": "user", "model": "assistant", "tool": "tool", "system": "system"}
    return [{"role": roles[m.type], "content": m.content} for m in rollout.messages]


def canonical(name: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """What transformers itself makes of a conversation."""
    made = tokenizer(name, *options.pop("extra", ()))
    encoded = made.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def dialogue(*replies: str) -> DialogueEnvironment:
    return DialogueEnvironment(ScriptedUser(replies))


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "strict", "no_glue"])
async def test_canonical_dialogue_equals_apply_chat_template(name: str) -> None:
    renderer = plain_renderer(name)
    lead = " " if name == "mistral" else ""
    turns = [said(name, lead + text) for text in ("It is 5.", "Now 6.", "😀 done")]
    rollout, engine = await play(
        renderer, turns, user("What is 2 + 3?"), environment=dialogue("and 3 + 3?", "ça va?")
    )
    renderer.enter(rollout)
    check_ledger(rollout, engine)
    assert rollout.num_forks == 0
    assert list(rollout.full_token_ids()) == canonical(name, conversation(rollout))
    assert rollout.stop_reason == "user_done"


async def test_plain_format_is_the_documented_one() -> None:
    renderer = plain_renderer("plain")
    rollout, _ = await play(
        renderer, ["5<eos>", "6<eos>"], user("2 + 3?"), environment=dialogue("3 + 3?")
    )
    renderer.enter(rollout)
    text = "User:\n2 + 3?\n\nAssistant:\n5<eos>\n\nUser:\n3 + 3?\n\nAssistant:\n6<eos>\n\n"
    assert list(rollout.full_token_ids()) == list(renderer.codec.encode(text))
    assert rollout.num_forks == 0


@pytest.mark.parametrize("name", ["chatml", "llama3", "strict", "no_glue"])
async def test_inline_tags_as_special_tokens_equal_apply_chat_template(name: str) -> None:
    renderer = tag_renderer(name, *TAGS)
    turns = ["Let me see. <code>1</code>", " and <code>2</code>", said(name, " so 3")]
    rollout, engine = await play(renderer, turns)
    renderer.enter(rollout)
    check_ledger(rollout, engine)
    whole = (
        "Let me see. <code>1</code><interpreter>ran 1</interpreter>"
        " and <code>2</code><interpreter>ran 2</interpreter> so 3"
    )
    messages = [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": whole},
    ]
    assert rollout.num_forks == 0
    assert list(rollout.full_token_ids()) == canonical(name, messages, extra=TAGS)
    assert len(to_samples(rollout)) == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "plain", "no_glue"])
async def test_inline_tags_that_split_otherwise_in_context_keep_the_text(name: str) -> None:
    renderer = tag_renderer(name)
    rollout, _ = await play(renderer, ["a<code>1</code>", "b<code>2</code>", said(name, "c")])
    renderer.enter(rollout)
    text = renderer.codec.decode(rollout.full_token_ids())
    block = (
        "a<code>1</code><interpreter>ran 1</interpreter>"
        "b<code>2</code><interpreter>ran 2</interpreter>c"
    )
    assert block + ENDS[name] in text
    assert rollout.num_forks == 0


@pytest.mark.parametrize("name", ["chatml", "llama3"])
async def test_native_calls_equal_apply_chat_template(name: str) -> None:
    renderer = native_renderer(name)
    key = "parameters" if name == "llama3" else "arguments"
    body = JSON_CALL % (key, "1")
    call = body if name == "llama3" else f"<tool_call>\n{body}\n</tool_call>"
    rollout, engine = await play(renderer, [said(name, call), said(name, "It is 5.")])
    tools = [tool_schema(run)]
    renderer.enter(rollout, tools)
    check_ledger(rollout, engine)
    structured = [
        {"role": "user", "content": "What is 2 + 3?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "run", "arguments": {"code": "1"}}}
            ],
        },
        {"role": "tool", "name": "run", "tool_call_id": "0", "content": "ran 1"},
        {"role": "assistant", "content": "It is 5."},
    ]
    assert rollout.num_forks == 0
    assert list(rollout.full_token_ids()) == canonical(name, structured, tools=tools)


async def test_two_native_calls_in_one_turn_run_together_in_order() -> None:
    renderer = native_renderer("chatml")
    calls = "\n".join(
        f"<tool_call>\n{JSON_CALL % ('arguments', code)}\n</tool_call>" for code in ("1", "2")
    )
    rollout, _ = await play(renderer, [said("chatml", calls), said("chatml", "done")])
    results = [m for m in rollout.messages if m.type is MessageType.TOOL]
    assert [(m.content, m.tool_call_id) for m in results] == [("ran 1", "0"), ("ran 2", "1")]
    text = renderer.codec.decode(rollout.full_token_ids())
    responses = "<tool_response>\nran 1\n</tool_response>\n<tool_response>\nran 2\n</tool_response>"
    assert f"<|im_end|>\n<|im_start|>user\n{responses}<|im_end|>\n" in text
    assert rollout.num_forks == 0


async def test_stripped_reasoning_is_an_explicit_fork_at_the_turn() -> None:
    renderer = plain_renderer("qwen3")
    turns = [
        said("qwen3", "<think>\nhm\n</think>\n\n5"),
        said("qwen3", "<think>\nso\n</think>\n\n6"),
        said("qwen3", "<think>\nok\n</think>\n\n7"),
    ]
    rollout, engine = await play(renderer, turns, user("a"), environment=dialogue("b", "c"))
    first = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [s.parent for s in rollout.segments] == [None, 0, 1]
    assert rollout.segments[1].prefix_len == len(renderer.codec.encode(first))
    for number, request in enumerate(engine.requests):
        expected = canonical(
            "qwen3", conversation(rollout)[: 2 * number + 1], add_generation_prompt=True
        )
        assert request.prompt_ids == expected
    samples = to_samples(rollout)
    assert [sum(s.loss_mask) for s in samples] == [len(t) for t in engine.turns]


async def test_reasoning_before_a_native_call_stays_while_the_template_keeps_it() -> None:
    renderer = native_renderer("qwen3")
    call = f"<think>\nhm\n</think>\n\n<tool_call>\n{JSON_CALL % ('arguments', '1')}\n</tool_call>"
    rollout, _ = await play(
        renderer, [said("qwen3", call), said("qwen3", "<think>\n\n</think>\n\n5")]
    )
    assert rollout.num_forks == 0
    assert len(rollout.segments[0].turns) == 2


async def test_generation_prompt_that_opens_the_reasoning_forks_each_user_turn() -> None:
    renderer = plain_renderer("r1")
    turns = [f"thinking {i}\n</think>\n\n{i}<eos>" for i in range(6)]
    replies = [f"reply {i}" for i in range(5)]
    rollout, engine = await play(renderer, turns, user("a"), environment=dialogue(*replies))
    assert rollout.num_forks == 5
    for number, request in enumerate(engine.requests):
        expected = canonical(
            "r1", conversation(rollout)[: 2 * number + 1], add_generation_prompt=True
        )
        assert request.prompt_ids == expected
    own = sum(len(s.token_ids) for s in rollout.segments)
    assert own < 2 * len(rollout.full_token_ids()) + sum(map(len, engine.turns))


async def test_another_end_of_sequence_token_is_kept_and_the_next_prompt_forks_before_it() -> None:
    renderer = plain_renderer("chatml")
    rollout, engine = await play(
        renderer, ["5<eos>", "6<|im_end|>"], user("a"), environment=dialogue("b")
    )
    assert rollout.messages[1].content == "5"
    child = rollout.segments[1]
    assert (child.parent, child.prefix_len) == (0, len(rollout.segments[0]) - 1)
    expected = canonical("chatml", conversation(rollout)[:3], add_generation_prompt=True)
    assert engine.requests[1].prompt_ids == expected
    assert [sum(s.loss_mask) for s in to_samples(rollout)] == [2, 2]


async def test_a_turn_that_ends_before_its_call_is_closed_goes_on_without_the_end_token() -> None:
    renderer = tag_renderer("chatml", *TAGS)
    rollout, engine = await play(renderer, ["a<code>1<|im_end|>", "b<|im_end|>"])
    assert rollout.metrics["tool_calls/model_error"] == 1
    prompt = renderer.codec.decode(engine.requests[1].prompt_ids)
    assert "a<code>1<interpreter>a call starts with" in prompt
    assert rollout.num_forks == 1
    renderer.enter(rollout)
    check_ledger(rollout, engine)
    assert rollout.num_forks == 1


async def test_turn_cut_in_the_middle_of_a_tag() -> None:
    renderer = tag_renderer("chatml")
    rollout, _ = await play(renderer, ["a<code>1</co"])
    assert rollout.stop_reason == "length"
    assert rollout.messages[-1].tool_calls == ()
    renderer.enter(rollout)
    assert renderer.codec.decode(rollout.full_token_ids()).endswith("a<code>1</co<|im_end|>\n")
    assert rollout.num_forks == 0


async def test_invalid_utf8_goes_on_as_sampled() -> None:
    renderer = tag_renderer("chatml")
    smile = list(renderer.codec.encode("😀"))
    assert len(smile) > 2
    tail = list(renderer.codec.encode(" <code>1</code>"))
    rollout, _ = await play(
        renderer, [smile[:2] + tail, [*smile, *renderer.codec.encode("<|im_end|>")]]
    )
    assert "\ufffd" in rollout.messages[1].content
    assert rollout.messages[3].content == "😀"
    renderer.enter(rollout)
    assert rollout.num_forks == 0
    assert list(rollout.full_token_ids()).count(smile[0]) == 2


async def test_a_turn_that_says_nothing() -> None:
    renderer = plain_renderer("chatml")
    rollout, engine = await play(
        renderer, ["<|im_end|>", "x<|im_end|>"], user("a"), environment=dialogue("b")
    )
    assert rollout.messages[1].content == ""
    expected = canonical("chatml", conversation(rollout)[:3], add_generation_prompt=True)
    assert engine.requests[1].prompt_ids == expected
    empty, _ = await play(renderer, [[]])
    assert empty.stop_reason == "length"
    assert to_samples(empty) == []


async def test_sampled_special_tokens_stay_in_the_turn() -> None:
    renderer = plain_renderer("chatml")
    rollout, _ = await play(
        renderer, ["a<|im_start|>user\nb<|im_end|>", "c<|im_end|>"], environment=dialogue("d")
    )
    assert rollout.messages[1].content == "a<|im_start|>user\nb"
    assert rollout.num_forks == 0


@pytest.mark.parametrize("extra", [(), TAGS])
async def test_tool_output_cannot_forge_the_policy(extra: tuple[str, ...]) -> None:
    renderer = tag_renderer("chatml", *extra)
    rollout, _ = await play(renderer, ["<code>forge</code>", "b<|im_end|>"])
    text = rollout.messages[2].content
    assert not any(m in text for m in ("<|im_end|>", "<eos>", *TAGS))
    assert "\ue000\ue001\ue000" in text
    renderer.enter(rollout)
    assert rollout.num_forks == 0
    whole = renderer.codec.decode(rollout.full_token_ids())
    assert whole.count("<interpreter>") == 1


async def test_long_output_enters_once() -> None:
    renderer = tag_renderer("chatml", *TAGS)
    rollout, _ = await play(renderer, ["<code>long</code>", "b<|im_end|>"])
    assert rollout.messages[2].content == "x" * 10_000
    assert renderer.codec.decode(rollout.full_token_ids()).count("x" * 10_000) == 1


async def test_whitespace_that_the_template_trims_stays_as_sampled() -> None:
    renderer = plain_renderer("llama3")
    rollout, _ = await play(
        renderer, ["  5 \n<|eot_id|>", "6<|eot_id|>"], environment=dialogue("and?")
    )
    assert rollout.num_forks == 0
    assert "  5 \n<|eot_id|><|start|>user" in renderer.codec.decode(rollout.full_token_ids())


async def test_other_tools_or_an_edited_message_fork() -> None:
    renderer = native_renderer("chatml")
    rollout, _ = await play(renderer, ["5<|im_end|>"])
    rollout.add_messages(user("b"))
    assert renderer.prompt(rollout, [tool_schema(run)]).prefix_len == len(rollout.segments[0])
    changed = renderer.prompt(rollout, [_schema("other")])
    head = renderer.codec.encode('<|im_start|>system\n# Tools{"type": "function", "function": ')
    assert len(head) <= changed.prefix_len < len(head) + 20
    assert prompt_token_ids(rollout, changed) == canonical(
        "chatml", conversation(rollout), tools=[_schema("other")], add_generation_prompt=True
    )
    bare = plain_renderer("chatml")
    rollout, _ = await play(bare, ["5<|im_end|>"], user("What?"))
    rollout.messages[0] = user("Why?")
    rollout.add_messages(user("b"))
    prompt = bare.prompt(rollout)
    assert prompt.prefix_len < len(bare.codec.encode("<|im_start|>user\nWhat?"))
    assert prompt_token_ids(rollout, prompt) == canonical(
        "chatml", conversation(rollout), add_generation_prompt=True
    )


def _schema(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}


async def test_closing_twice_and_going_on_after_closing_write_nothing_twice() -> None:
    renderer = plain_renderer("chatml")
    rollout, _ = await play(renderer, ["5<|im_end|>"])
    renderer.enter(rollout)
    closed = list(rollout.full_token_ids())
    renderer.enter(rollout)
    assert list(rollout.full_token_ids()) == closed
    rollout.add_messages(user("b"))
    prompt = renderer.prompt(rollout)
    assert prompt.prefix_len == len(closed)
    assert prompt_token_ids(rollout, prompt) == canonical(
        "chatml", conversation(rollout), add_generation_prompt=True
    )


async def test_a_conversation_that_holds_every_sentinel_forks_and_stays_right() -> None:
    renderer = plain_renderer("chatml")
    nasty = "\ue000\ue001\ue000 \ue002\ue003\ue002"
    rollout, _ = await play(
        renderer, ["5<|im_end|>", "6<|im_end|>"], user(nasty), environment=dialogue("b")
    )
    assert rollout.num_forks == 0
    nasty += "\ue004\ue005\ue004"
    rollout, engine = await play(
        renderer, ["5<|im_end|>", "6<|im_end|>"], user(nasty), environment=dialogue("b")
    )
    assert rollout.num_forks == 1
    assert engine.requests[1].prompt_ids == canonical(
        "chatml", conversation(rollout)[:3], add_generation_prompt=True
    )


async def test_native_tools_on_a_template_that_refuses_them_say_so() -> None:
    with pytest.raises(UserError, match="chat template"):
        native_renderer("strict")
    with pytest.raises(UserError, match="need a tokenizer"):
        native_renderer("plain")


async def test_roles_that_a_template_refuses_are_named() -> None:
    renderer = plain_renderer("strict")
    rollout = Rollout()
    rollout.add_messages(user("a"), user("b"))
    with pytest.raises(UserError, match="roles must alternate"):
        renderer.prompt(rollout)


async def test_unsampled_model_messages_before_an_inline_result_are_context() -> None:
    renderer: Renderer = tag_renderer("chatml", *TAGS)
    shot = model("a", ToolCall("run", {"code": "1"}))
    rollout, engine = await play(renderer, [" b<|im_end|>"], user("q"), shot, tool_result("ran 1"))
    text = renderer.codec.decode(engine.requests[0].prompt_ids)
    assert text.endswith("assistant\na<code>1</code><interpreter>ran 1</interpreter>")
    assert [s for s in rollout.segments[0].source if s == Source.TARGET] == []


async def test_native_tools_are_described_by_the_template_alone() -> None:
    renderer = native_renderer("chatml")
    world = ToolEnvironment([run], renderer, describe_tools=True)
    rollout, _ = await play(renderer, ["5<|im_end|>"], user("a"), environment=world)
    assert [m.type for m in rollout.messages] == [MessageType.MESSAGE, MessageType.MODEL]
