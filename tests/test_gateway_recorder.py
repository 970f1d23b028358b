"""A session that the policy answers: what is recognised, what forks, and what trains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from retrain.engines import SamplingParams
from retrain.engines.base import Completion, GenerateRequest
from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.history import key_of
from retrain.gateway.recorder import Recorder
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import MessageType, Rollout, Source, Task, UserError
from scripted import ScriptedEngine, check_ledger, native_renderer, plain_renderer, tag_renderer

END = "<|im_end|>"
SCHEMA = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Runs code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}


def policy(renderer: Renderer, engine: Any, **given: Any) -> EngineAgent:
    return EngineAgent(engine, renderer, SamplingParams(), 0, 0, 0, "r", **given)


class Talk:
    """A caller that keeps its conversation itself."""

    def __init__(self, renderer: Renderer, turns: Sequence[str | Sequence[int]]) -> None:
        self.renderer = renderer
        self.engine = ScriptedEngine(renderer.codec, turns)
        self.policy = policy(renderer, self.engine)
        self.recorder = Recorder(self.policy, Task("t", ()), renderer)

    async def ask(self, *messages: Any, **given: Any) -> Reply:
        wires = tuple({"role": "user", "content": m} if isinstance(m, str) else m for m in messages)
        return await self.recorder.answer(Ask(wires, **given))

    async def say(self, *messages: Any, **given: Any) -> dict[str, Any]:
        return dict((await self.ask(*messages, **given)).choices[0].message)

    def rollout(self) -> Rollout:
        made = self.policy.start(Task("t", ()))
        self.recorder.enter(made)
        return made


def words(rollout: Rollout) -> list[str]:
    return [message.content for message in rollout.messages]


async def test_a_history_that_is_replayed_goes_on_from_its_own_tokens() -> None:
    talk = Talk(plain_renderer("chatml"), [f"one{END}", f"two{END}"])
    first = await talk.say("a")
    await talk.say("a", first, "b")
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert words(rollout) == ["a", "one", "b", "two"] and len(rollout.segments) == 1


@pytest.mark.parametrize(
    "told",
    [
        {"content": " one\n"},
        {"content": [{"type": "text", "text": "one"}]},
        {"content": "one", "reasoning_content": "hm", "refusal": None},
    ],
)
async def test_what_clients_change_when_they_replay_does_not_count(told: dict[str, Any]) -> None:
    talk = Talk(plain_renderer("chatml"), [f"one{END}", f"two{END}"])
    await talk.say("a")
    await talk.say("a", {"role": "assistant", **told}, "b")
    check_ledger(talk.rollout(), talk.engine)
    assert talk.recorder.forks == 0


async def test_a_changed_answer_is_context_and_forks() -> None:
    talk = Talk(plain_renderer("chatml"), [f"one{END}", f"two{END}"])
    await talk.say("a")
    await talk.say("a", {"role": "assistant", "content": "none"}, "b")
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert words(rollout) == ["a", "one", "a", "none", "b", "two"]
    assert rollout.messages[3].type is MessageType.MESSAGE
    first, second = rollout.segments
    assert second.parent == 0 and 0 < second.prefix_len < len(first)
    assert Source.SAMPLED not in second.source[: second.turns[0].start]


async def test_a_branch_from_the_middle_keeps_the_very_tokens() -> None:
    """Tokens that no tokenizer would write: what was sampled is never tokenised again."""
    renderer = plain_renderer("chatml")
    spelled = [renderer.codec.encode(letter)[0] for letter in "user"]
    assert list(renderer.codec.encode("user")) != spelled
    end = renderer.codec.encode(END)[0]
    talk = Talk(renderer, [[*spelled, end], f"two{END}", f"three{END}"])
    first = await talk.say("a")
    await talk.say("a", first, "b")
    await talk.say("a", first, "c")
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    whole, fork = rollout.segments
    assert fork.parent == 0 and fork.prefix_len > whole.turns[0].end
    shared = list(rollout.full_token_ids(1)[whole.turns[0].start : whole.turns[0].end])
    assert shared == [*spelled, end]
    assert words(rollout) == ["a", "user", "b", "two", "c", "three"]


async def test_a_fork_of_a_fork() -> None:
    talk = Talk(plain_renderer("chatml"), [f"{n}{END}" for n in range(5)])
    one = await talk.say("a")
    two = await talk.say("a", one, "b")
    three = await talk.say("a", one, "c")
    await talk.say("a", one, "c", three, "d")
    await talk.say("a", one, "c", three, "e")
    assert two["content"] == "1"
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert [s.parent for s in rollout.segments] == [None, 0, 1]
    sampled = [sum(s == Source.SAMPLED for s in segment.source) for segment in rollout.segments]
    assert sum(sampled) == sum(len(c.token_ids) for c in talk.engine.completions)


async def test_the_same_question_twice_is_two_branches() -> None:
    talk = Talk(plain_renderer("chatml"), [f"one{END}", f"two{END}", f"three{END}"])
    await talk.say("a")
    again = await talk.ask("a", n=2)
    assert [c.message["content"] for c in again.choices] == ["two", "three"]
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert len({r.seed for r in talk.engine.requests}) == 3
    lengths = {segment.prefix_len for segment in rollout.segments[1:]}
    assert lengths == {len(talk.engine.requests[0].prompt_ids)}


async def test_sub_agents_are_segments_of_their_own() -> None:
    talk = Talk(plain_renderer("chatml"), [f"{n}{END}" for n in range(4)])
    talks: list[list[Any]] = [["red"], ["blue"]]
    for turn in range(4):
        talks[turn % 2] += [await talk.say(*talks[turn % 2]), "on"]
    rollout = talk.rollout()
    assert words(rollout) == ["red", "0", "on", "2", "blue", "1", "on", "3"]
    sampled = [list(c.token_ids) for c in talk.engine.completions]
    for segment, own in enumerate(([0, 2], [1, 3])):
        spans = rollout.segments[segment].turns
        columns = rollout.segments[segment].token_ids
        assert [list(columns[s.start : s.end]) for s in spans] == [sampled[n] for n in own]
        full = list(rollout.full_token_ids(segment))
        assert full[: -len(sampled[own[1]])] == talk.engine.requests[own[1]].prompt_ids


CALL = '<tool_call>\n{"name": "run", "arguments": {"code": "1"}}\n</tool_call>'


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
async def test_native_calls_are_told_and_recognised(template: str) -> None:
    talk = Talk(native_renderer(template), [f"Hm. {CALL}{CALL}{END}", f"two{END}"])
    said = await talk.say("a", tools=(SCHEMA,))
    assert said["content"] == "Hm."
    assert [json.loads(c["function"]["arguments"]) for c in said["tool_calls"]] == [
        {"code": "1"}
    ] * 2
    for call in said["tool_calls"]:
        call["function"]["arguments"] = '{ "code":"1"}'
    results = [
        {"role": "tool", "content": "ran", "tool_call_id": call["id"]}
        for call in said["tool_calls"]
    ]
    await talk.say("a", {**said, "content": "Hm. "}, *results, tools=(SCHEMA,))
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert len(rollout.segments) == 1
    assert [m.name for m in rollout.messages if m.type is MessageType.TOOL] == ["run", "run"]


async def test_inline_calls_go_on_in_their_own_turn() -> None:
    talk = Talk(tag_renderer("chatml"), ["<code>1</code>", f"two{END}"])
    said = await talk.say({"role": "system", "content": "Be brief."}, "a", tools=(SCHEMA,))
    assert said["content"] is None and said["tool_calls"][0]["function"]["name"] == "run"
    result = {"role": "tool", "content": "</code>ran", "tool_call_id": said["tool_calls"][0]["id"]}
    system = {"role": "developer", "content": "Be brief."}
    await talk.say(system, "a", said, result, tools=(SCHEMA,))
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert len(rollout.segments) == 1
    assert rollout.messages[0].content.startswith("Be brief.\n\nYou can use these tools:")
    assert "</code>" not in rollout.messages[3].content, "a result forges no tag"


async def test_calls_that_the_policy_did_not_make_are_context() -> None:
    """With tags they and their results become words of the conversation."""
    call = {
        "id": "x",
        "type": "function",
        "function": {"name": "run", "arguments": '{"code": "2"}'},
    }
    told = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "4", "tool_call_id": "x"}
    for renderer in (tag_renderer("chatml"), native_renderer("chatml")):
        talk = Talk(renderer, [f"one{END}"])
        await talk.say("a", told, result, "b", tools=(SCHEMA,))
        rollout = talk.rollout()
        check_ledger(rollout, talk.engine)
        prompt = renderer.codec.decode(talk.engine.requests[0].prompt_ids)
        assert '"code": "2"' in prompt or "<code>2</code>" in prompt
        assert rollout.model_messages == [len(rollout.messages) - 1]


async def test_a_stop_string_is_cut_and_may_come_back() -> None:
    """The tokens stay as sampled; agents that put the stop string back are recognised too."""
    for suffix in ("", "</end>"):
        talk = Talk(plain_renderer("chatml"), ["one</end>", f"two{END}"])
        reply = await talk.ask("a", stop=("</end>",))
        assert reply.choices[0].message["content"] == "one"
        assert reply.choices[0].stopped_by == "</end>"
        await talk.say("a", {"role": "assistant", "content": "one" + suffix}, "b")
        rollout = talk.rollout()
        check_ledger(rollout, talk.engine)
        assert len(rollout.segments) == 1 and talk.engine.requests[0].params.stop == ("</end>",)


async def test_limits_choices_and_what_is_not_followed() -> None:
    talk = Talk(
        native_renderer("chatml"), [f"{CALL}{CALL}{END}", f"{CALL}{END}", f"no{END}", "cut"]
    )
    one = await talk.ask("a", tools=(SCHEMA,), parallel_tool_calls=False, max_tokens=7)
    assert len(one.choices[0].message["tool_calls"]) == 1
    assert talk.engine.requests[0].params.max_new_tokens == 7
    none = await talk.ask("b", tools=(SCHEMA,), tool_choice="none", sampling={"temperature": 0.2})
    assert "tool_calls" not in none.choices[0].message and none.not_enforced == ("temperature",)
    must = await talk.ask("c", tools=(SCHEMA,), tool_choice="required")
    assert must.not_enforced == ("tool_choice",)
    cut = await talk.ask("d", logprobs=True)
    assert cut.choices[0].finish_reason == "length"
    tokens = cut.choices[0].logprobs
    assert tokens is not None and "".join(t.text for t in tokens) == "cut"
    assert [t.logprob for t in tokens] == list(talk.engine.completions[3].logprobs)


async def test_what_the_engine_cannot_do_is_refused() -> None:
    talk = Talk(plain_renderer("chatml"), [])
    with pytest.raises(RequestRefused, match="response_format"):
        await talk.say("a", sampling={"response_format": {"type": "json_object"}})
    with pytest.raises(RequestRefused, match="top_logprobs"):
        await talk.say("a", sampling={"top_logprobs": 2})
    with pytest.raises(RequestRefused, match="text only"):
        await talk.say({"role": "user", "content": [{"type": "image_url"}]})
    assert talk.recorder.failed is None
    with pytest.raises(RequestRefused, match="tool_format"):
        await talk.say("a", tools=(SCHEMA,))
    assert isinstance(talk.recorder.failed, UserError), "that is for the user to mend"


async def test_requests_that_overlap_do_not_mix() -> None:
    class Slow(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> Completion:
            assert not self.busy, "a session of an engine takes one request at a time"
            self.busy = True
            await asyncio.sleep(0.001)
            self.busy = False
            return await super().generate(request)

        busy = False

    renderer = plain_renderer("chatml")
    engine = Slow(renderer.codec, [f"{n}{END}" for n in range(8)])
    agent = policy(renderer, engine)
    recorder = Recorder(agent, Task("t", ()), renderer)
    asks = [Ask(({"role": "user", "content": str(n)},)) for n in range(8)]
    replies = await asyncio.gather(*map(recorder.answer, asks))
    assert sorted(str(r.choices[0].message["content"]) for r in replies) == list("01234567")
    rollout = agent.start(Task("t", ()))
    recorder.enter(rollout)
    assert len(rollout.segments) == 8


async def test_rewards_are_finite_numbers() -> None:
    talk = Talk(plain_renderer("chatml"), [])
    talk.recorder.note(None, {"a": 1})
    assert not talk.recorder.stirred.is_set()
    talk.recorder.note(0.5, {"b": 2})
    assert talk.recorder.stirred.is_set()
    assert (talk.recorder.reward, talk.recorder.metadata) == (0.5, {"a": 1, "b": 2})
    with pytest.raises(RequestRefused, match="finite"):
        talk.recorder.note(float("nan"), {})


def test_the_order_of_arguments_does_not_count() -> None:
    first = {"id": "1", "function": {"name": "run", "arguments": '{"a": 1, "b": [2]}'}}
    second = {"id": "2", "function": {"name": "run", "arguments": '{"b":[2],"a":1}'}}
    said = {"role": "assistant", "content": ""}
    assert key_of({**said, "tool_calls": [first]}) == key_of({**said, "tool_calls": [second]})


async def test_a_stop_string_that_is_put_back_behind_reasoning() -> None:
    talk = Talk(plain_renderer("qwen3"), ["<think>\nhm\n</think>\n\none</end>", f"two{END}"])
    await talk.say("a", stop=("</end>",))
    await talk.say("a", {"role": "assistant", "content": "one</end>"}, "b")
    rollout = talk.rollout()
    check_ledger(rollout, talk.engine)
    assert [m.type for m in rollout.messages].count(MessageType.MODEL) == 2


async def test_a_fork_from_before_its_tools_is_told_of_them() -> None:
    talk = Talk(tag_renderer("chatml"), [f"{n}{END}" for n in range(3)])
    first = await talk.say("a")
    for question in ("b", "c"):
        await talk.say("a", first, question, tools=(SCHEMA,))
    prompts = [talk.renderer.codec.decode(r.prompt_ids) for r in talk.engine.requests]
    assert ["You can use these tools" in prompt for prompt in prompts] == [False, True, True]


async def test_logprobs_are_those_of_the_words_that_are_told() -> None:
    talk = Talk(plain_renderer("chatml"), ["one</end>"])
    reply = await talk.ask("a", stop=("</end>",), logprobs=True)
    tokens = reply.choices[0].logprobs
    assert tokens is not None and "".join(token.text for token in tokens) == "one"
