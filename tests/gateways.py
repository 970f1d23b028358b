"""A gateway on this machine whose policy says what a test prescribes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.gateway.recorder import Recorder
from retrain.gateway.seats import Seats
from retrain.gateway.server import GatewayServer
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import Rollout, Task
from scripted import ScriptedEngine, check_ledger


class Observed(TorchEngine):
    """The real engine; keeps what it is asked and answers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[list[int], Completion]] = []

    async def generate(self, request: GenerateRequest) -> Completion:
        completion = await super().generate(request)
        self.seen.append((list(request.prompt_ids), completion))
        return completion


@dataclass(frozen=True)
class Place:
    """Where an agent finds its model, and what became of it."""

    url: str
    """Of the session, without `/v1`."""
    key: str
    engine: ScriptedEngine
    policy: EngineAgent
    recorder: Recorder

    @property
    def openai(self) -> dict[str, str]:
        return {"base_url": f"{self.url}/v1", "api_key": self.key}

    def rollout(self) -> Rollout:
        """All that was said, held against what the engine saw and sampled."""
        assert self.recorder.failed is None
        made = self.policy.start(Task("t", ()))
        self.recorder.enter(made)
        check_ledger(made, self.engine)
        return made


@asynccontextmanager
async def scripted_gateway(
    renderer: Renderer, turns: Sequence[str | Sequence[int]]
) -> AsyncIterator[Place]:
    engine = ScriptedEngine(renderer.codec, turns)
    policy = EngineAgent(engine, renderer, SamplingParams(), 0, 0, 0, "r")
    recorder = Recorder(policy, Task("t", ()), renderer)
    seats = Seats()
    server = GatewayServer(seats)
    await server.start()
    seat = seats.open(recorder)
    try:
        yield Place(f"{server.url}/sessions/{seat.name}", seat.key, engine, policy, recorder)
    finally:
        await server.close()
