"""A session that the policy answers, where answers get lost, engines fail and contexts are full."""

from __future__ import annotations

from array import array

import pytest

from retrain.engines.base import Completion, GenerateRequest
from retrain.gateway.ask import Ask, RequestRefused
from retrain.gateway.recorder import Recorder
from retrain.types import InfrastructureError, Task
from scripted import ScriptedEngine, check_ledger, native_renderer, plain_renderer
from test_gateway_recorder import END, SCHEMA, Talk, policy, words


async def test_a_retry_gets_the_answer_that_was_lost() -> None:
    talk = Talk(plain_renderer("chatml"), [f"one{END}", f"two{END}", f"three{END}"])
    lost = await talk.ask("a")
    talk.recorder.undelivered(lost)
    assert await talk.ask("a") is lost
    assert await talk.ask("a", retried=True) is lost
    given = await talk.ask("a", gone=lambda: True)
    assert given.choices[0].message["content"] == "two"
    rollout = talk.rollout()
    assert words(rollout) == ["a", "one"], "what nobody got does not count"
    assert (await talk.ask("a")) is given
    assert words(talk.rollout()) == ["a", "one", "a", "two"]


async def test_an_engine_that_fails_is_tried_again() -> None:
    class Failing(ScriptedEngine):
        failed = False

        async def generate(self, request: GenerateRequest) -> Completion:
            if not self.failed:
                self.failed = True
                raise InfrastructureError("lost")
            return await super().generate(request)

    renderer = plain_renderer("chatml")
    agent = policy(renderer, Failing(renderer.codec, [f"one{END}"]))
    recorder = Recorder(agent, Task("t", ()), renderer)
    ask = Ask(({"role": "user", "content": "a"},))
    with pytest.raises(RequestRefused) as refused:
        await recorder.answer(ask)
    assert refused.value.status == 503 and recorder.stirred.is_set()
    assert isinstance(recorder.failed, InfrastructureError)
    reply = await recorder.answer(ask)
    assert reply.choices[0].message["content"] == "one"
    rollout = agent.start(Task("t", ()))
    recorder.enter(rollout)
    assert words(rollout) == ["a", "one"]


async def test_a_full_context_is_the_callers_to_handle() -> None:
    class Full(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> Completion:
            return Completion(array("i"), array("f"), array("i"), "context")

    renderer = plain_renderer("chatml")
    recorder = Recorder(policy(renderer, Full(renderer.codec, [])), Task("t", ()), renderer)
    with pytest.raises(RequestRefused) as refused:
        await recorder.answer(Ask(({"role": "user", "content": "a"},)))
    assert refused.value.code == "context_length_exceeded" and recorder.failed is None
    rollout = recorder._policy.start(Task("t", ()))
    recorder.enter(rollout)
    assert rollout.messages == []


class Unsteady(ScriptedEngine):
    """Fails, or finds the context full, where it is told to."""

    fates: dict[int, str]
    asked = -1

    async def generate(self, request: GenerateRequest) -> Completion:
        self.asked += 1
        fate = self.fates.get(self.asked)
        if fate == "lost":
            raise InfrastructureError("lost")
        if fate == "full":
            return Completion(array("i"), array("f"), array("i"), "context")
        return await super().generate(request)


@pytest.mark.parametrize("fate", ["lost", "full"])
async def test_a_request_that_is_refused_leaves_nothing_behind(fate: str) -> None:
    talk = Talk(plain_renderer("chatml"), [])
    engine = Unsteady(talk.renderer.codec, [f"one{END}", f"two{END}"])
    engine.fates = {1: fate}
    talk.policy.engine = talk.engine = engine
    first = await talk.say("a")
    with pytest.raises(RequestRefused):
        await talk.say("a", first, "b")
    await talk.say("a", first, "b", "c")
    rollout = talk.rollout()
    check_ledger(rollout, engine)
    assert words(rollout) == ["a", "one", "b", "c", "two"] and len(rollout.segments) == 1


async def test_another_request_with_the_same_messages_is_another() -> None:
    talk = Talk(native_renderer("chatml"), [f"{n}{END}" for n in range(4)])
    lost = await talk.ask("a", n=2)
    talk.recorder.undelivered(lost)
    alone = await talk.ask("a")
    assert [c.message["content"] for c in alone.choices] == ["2"]
    assert (await talk.ask("a", n=2)) is lost
    assert (await talk.ask("a", tools=(SCHEMA,))).choices[0].message["content"] == "3"


async def test_a_retry_of_a_refused_request_is_not_given_a_neighbours_answer() -> None:
    talk = Talk(plain_renderer("chatml"), [])
    engine = Unsteady(talk.renderer.codec, [f"one{END}", f"two{END}"])
    engine.fates = {1: "lost"}
    talk.policy.engine = talk.engine = engine
    assert (await talk.say("a"))["content"] == "one"
    with pytest.raises(RequestRefused):
        await talk.say("a")
    assert (await talk.say("a", retried=True))["content"] == "two"
    assert (await talk.say("a", retried=True))["content"] == "two"
