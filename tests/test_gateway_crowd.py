"""Two hundred callers at once, who are slow, go away, and ask again."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import weakref
from array import array
from typing import Any

import aiohttp

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.gateway.recorder import Recorder
from retrain.gateway.seats import Seat, Seats
from retrain.gateway.server import GatewayServer
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import Source, Task
from scripted import ScriptedEngine, plain_renderer

CALLERS, TURNS = 200, 3


class Telling(ScriptedEngine):
    """Says the caller's number, which its first message holds, and which answer this is."""

    def __init__(self, renderer: Renderer) -> None:
        super().__init__(renderer.codec, [])
        self.random = random.Random(1)

    async def generate(self, request: GenerateRequest) -> Completion:
        await asyncio.sleep(self.random.random() * 0.1)
        text = self.codec.decode(request.prompt_ids)
        caller = text.split("caller ")[1].split(".")[0]
        ids = list(self.codec.encode(f"{caller}/{len(self.requests)}<|im_end|>"))
        self.requests.append(request)
        made = Completion(
            array("i", ids), array("f", [-1.0] * len(ids)), array("i", [0] * len(ids)), "stop_token"
        )
        self.completions.append(made)
        return made


async def call(
    http: aiohttp.ClientSession, url: str, seat: Seat, number: int, chance: random.Random
) -> list[str]:
    """Talk for some turns; sometimes leave in the middle of one, and ask the same again; callers of
    an even number say so then, as the SDKs do."""
    talk: list[dict[str, Any]] = [{"role": "user", "content": f"I am caller {number}."}]
    heard = []
    headers = {"Authorization": f"Bearer {seat.key}"}
    for _ in range(TURNS):
        for attempt in itertools.count():
            headers["x-stainless-retry-count"] = str(attempt * (number % 2 == 0))
            await asyncio.sleep(chance.random() * 0.01)
            body = {"model": "policy", "messages": talk}
            patience = chance.choice([0.01, 0.1, 0.3, 60.0])
            try:
                async with (
                    asyncio.timeout(patience),
                    http.post(url, json=body, headers=headers) as response,
                ):
                    assert response.status == 200, await response.text()
                    answer = await response.json()
            except TimeoutError:
                continue
            break
        message = answer["choices"][0]["message"]
        heard.append(message["content"])
        talk += [message, {"role": "user", "content": f"I am still caller {number}."}]
    return heard


async def crowd(
    renderer: Renderer,
    server: GatewayServer,
    seats: Seats,
    seed: int,
    held: list[weakref.ref[Any]],
) -> int:
    """One round of all callers; how many answers were given to nobody.

    Args:
        held: gets what should be gone once the round is over.
    """
    engine = Telling(renderer)
    recorders, opened = [], []
    for number in range(CALLERS):
        policy = EngineAgent(engine, renderer, SamplingParams(), seed, 0, 0, f"r{number}")
        recorders.append(Recorder(policy, Task(f"t{number}", ()), renderer))
        opened.append(seats.open(recorders[-1]))
        held += [weakref.ref(policy), weakref.ref(recorders[-1])]
    url = f"{server.url}/v1/chat/completions"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        talks = [
            call(http, url, seat, number, random.Random(1000 * seed + number))
            for number, seat in enumerate(opened)
        ]
        heard = await asyncio.gather(*talks)
    forks = 0
    for number, recorder in enumerate(recorders):
        rollout = recorder._policy.start(Task("t", ()))
        recorder.enter(rollout)
        assert recorder.failed is None
        said = [rollout.messages[i].content for i in rollout.model_messages]
        assert all(text.startswith(f"{number}/") for text in said)
        sampled = sum(s == Source.SAMPLED for segment in rollout.segments for s in segment.source)
        assert sampled == sum(len(engine.codec.encode(f"{text}<|im_end|>")) for text in said)
        if number % 2 == 0:
            assert said == heard[number], "what the caller got is what trains, and nothing else"
            assert len(rollout.segments) == 1, "a retry goes on where the lost answer was"
        # Whoever leaves as the answer arrives, and does not say so, has sampled twice: a fork.
        assert set(heard[number]) <= set(said) and len(said) - TURNS == rollout.num_forks
        forks += rollout.num_forks
    for seat in opened:
        seats.close(seat.name)
    return forks


async def test_many_callers_never_mix_and_lose_nothing() -> None:
    renderer = plain_renderer("chatml")
    seats = Seats()
    server = GatewayServer(seats)
    await server.start()
    try:
        for round_number in (1, 2):
            held: list[weakref.ref[Any]] = []
            forks = await crowd(renderer, server, seats, round_number, held)
            assert forks < CALLERS
            await asyncio.sleep(0.5)  # the last connections close
            gc.collect()
            alive = sum(ref() is not None for ref in held)
            assert (len(held), alive) == (2 * CALLERS, 0), "nothing is kept of what is over"
    finally:
        await server.close()
    assert len(seats) == 0
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others
