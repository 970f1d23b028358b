"""Random callers: whatever they send, fork, edit, lose and repeat, the ledger is what the engine
saw and sampled, and every answer that was delivered is in it once."""

from __future__ import annotations

import asyncio
import random
from array import array
from typing import Any

import pytest

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.gateway.ask import Ask, RequestRefused
from retrain.gateway.recorder import Recorder
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import InfrastructureError, Rollout, Source, Task
from scripted import ScriptedEngine, native_renderer, plain_renderer, tag_renderer
from test_gateway_recorder import SCHEMA

RENDERERS = {"plain": plain_renderer, "native": native_renderer, "tag": tag_renderer}
ENDS = {"r1": "<eos>", "plain": "<eos>", "llama3": "<|eot_id|>"}


class Fickle(ScriptedEngine):
    """Thinks, calls, stops at strings, is cut, fails, and finds the context full."""

    def __init__(self, renderer: Renderer, kind: str, end: str, chance: random.Random) -> None:
        super().__init__(renderer.codec, [])
        self.kind, self.end, self.chance = kind, end, chance

    async def generate(self, request: GenerateRequest) -> Completion:
        fate = self.chance.random()
        if fate < 0.1:
            raise InfrastructureError("lost")
        if fate < 0.15:
            return Completion(array("i"), array("f"), array("i"), "context")
        self.turns.append(list(self.codec.encode(self._text(request))))
        return await super().generate(request)

    def _text(self, request: GenerateRequest) -> str:
        number, chance = len(self.requests), self.chance
        text = f"w{number} "
        if chance.random() < 0.4:
            text = f"<think>\nhm {number}\n</think>\n\n{text}"
        if chance.random() < 0.4 and self.kind == "tag":
            return f"{text}<code>{number}</code>"
        if chance.random() < 0.4 and self.kind == "native":
            body = f'{{"name": "run", "arguments": {{"code": "{number}"}}}}'
            text += f"<tool_call>\n{body}\n</tool_call>" * chance.choice([1, 1, 2])
        if "STOP" in request.params.stop and chance.random() < 0.5:
            return f"{text}STOP"
        return text + chance.choice(["", "<eos>", *[self.end] * 8])


def check(rollout: Rollout, engine: ScriptedEngine) -> set[int]:
    """Numbers of the engine's answers in the ledger: the log-probabilities tell them."""
    found: set[int] = set()
    for index, segment in enumerate(rollout.segments):
        full, sampled = list(rollout.full_token_ids(index)), 0
        assert len(full) == len(segment)
        for span in segment.turns:
            number = int(-segment.logprobs[span.start]) - 1
            assert number not in found
            found.add(number)
            start, end = segment.prefix_len + span.start, segment.prefix_len + span.end
            assert full[:start] == engine.requests[number].prompt_ids
            assert full[start:end] == list(engine.completions[number].token_ids)
            assert segment.logprobs[span.start : span.end] == engine.completions[number].logprobs
            sampled += span.end - span.start
        assert sampled == sum(source == Source.SAMPLED for source in segment.source)
    return found


def next_ask(talks: list[list[Any]], kind: str, chance: random.Random) -> Ask:
    """Goes on with some conversation, cut and edited at times."""
    talk = list(chance.choice(talks))
    if talk and chance.random() < 0.3:
        talk = talk[: chance.randrange(len(talk))]
        while talk and (talk[-1].get("tool_calls") or talk[-1]["role"] == "tool"):
            talk = talk[:-1]
    if talk and chance.random() < 0.15:
        at = chance.randrange(len(talk))
        talk[at] = {**talk[at], "content": f"{talk[at].get('content') or ''}X"}
    if not talk and chance.random() < 0.5:
        talk.append({"role": "system", "content": "sys"})
    calls = talk[-1].get("tool_calls") if talk else None
    for call in calls or ():
        talk.append({"role": "tool", "tool_call_id": call["id"], "content": chance.choice("ab")})
    if not calls:
        talk.append({"role": "user", "content": chance.choice("xyz")})
    return Ask(
        tuple(talk),
        tools=(SCHEMA,) if kind != "plain" and chance.random() < 0.85 else (),
        n=chance.choice([1, 1, 1, 2]),
        tool_choice=chance.choice(["auto", "auto", "none"]),
        parallel_tool_calls=chance.random() < 0.8,
        stop=chance.choice([(), ("STOP",)]),
        retried=chance.random() < 0.1,
    )


async def walk(seed: int, template: str, kind: str) -> None:
    chance = random.Random(seed)
    renderer = RENDERERS[kind](template)
    engine = Fickle(renderer, kind, ENDS.get(template, "<|im_end|>"), chance)
    policy = EngineAgent(engine, renderer, SamplingParams(), 0, 0, 0, "r")
    recorder = Recorder(policy, Task("t", ()), renderer)
    talks: list[list[Any]] = [[]]
    given: dict[str, int] = {}
    for _ in range(14):
        ask = next_ask(talks, kind, chance)
        try:
            reply = await recorder.answer(ask)
        except RequestRefused:
            talks.append(list(ask.messages))
            continue
        if chance.random() < 0.15:
            recorder.undelivered(reply)
            given.pop(reply.id, None)
            continue
        given[reply.id] = len(reply.choices)
        talks += [[*ask.messages, dict(choice.message)] for choice in reply.choices]
    rollout = policy.start(Task("t", ()))
    recorder.enter(rollout)
    assert len(check(rollout, engine)) >= sum(given.values())
    assert len(check(rollout, engine)) == len(rollout.model_messages)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        *[(name, kind) for name in ("chatml", "qwen3") for kind in RENDERERS],
        ("r1", "plain"),
        ("r1", "tag"),
        ("llama3", "plain"),
        ("no_glue", "tag"),
        ("plain", "plain"),
    ],
)
def test_random_callers(template: str, kind: str) -> None:
    for seed in range(12):
        asyncio.run(walk(seed, template, kind))
