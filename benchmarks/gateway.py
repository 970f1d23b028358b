"""What the gateway adds to the engine's own time, request by request.

    python benchmarks/gateway.py [--conversations 40]

One caller on loopback, one request after the other, through a bare socket: what a client library
costs is not the gateway's. Three servers take the same bodies, in turn: a bare aiohttp
handler that reads the body and sends a fixed answer; the gateway around a session that answers at
once (HTTP and the API's shapes); the gateway around the recorder, the real renderer and ledger, and
an engine that answers at once. Prompts of 1,000 and 10,000 tokens, as the first turn of a session
and as its turns 2 to 20, each of which sends the whole history. Exits with 1 when the bound below
is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from statistics import median, quantiles
from typing import Any, NamedTuple

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.gateway.ask import Ask, Choice, Reply
from retrain.gateway.recorder import Recorder
from retrain.gateway.seats import Seats
from retrain.gateway.server import GatewayServer
from retrain.gateway.session import Session
from retrain.models.tokenizer import train_tokenizer
from retrain.rendering import Codec, Renderer, make_template
from retrain.rollout import set_aside
from retrain.rollout.agent import EngineAgent
from retrain.types import Task

P50_MS = 2.0
"""Bound: what a request adds, at the median."""
ANSWER = "The tool said forty two, so the answer that you asked me for is forty two."
TURNS = 20
WORDS = "the market opened a little higher on monday as traders weighed new prices ".split()


class Instant:
    """An engine that says the same each time, at once."""

    context_limit = 1_000_000

    def __init__(self, ids: list[int]) -> None:
        self._ids = array("i", ids)
        self._logprobs = array("f", [-0.5]) * len(ids)
        self._versions = array("i", [0]) * len(ids)

    async def generate(self, request: GenerateRequest) -> Completion:
        return Completion(self._ids, self._logprobs, self._versions, "stop_token")

    async def score(self, token_ids: list[int], temperature: float = 1.0) -> array[float]:
        return array("f", bytes(4 * len(token_ids)))

    async def end_session(self, session: str) -> None:
        return None

    async def close(self) -> None:
        return None


class Echo:
    """A session without a recorder."""

    async def answer(self, ask: Ask) -> Reply:
        return Reply((Choice({"role": "assistant", "content": ANSWER}, "stop"),), ask.model)

    def undelivered(self, reply: Reply) -> None:
        raise RuntimeError("an answer got lost")

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        return None


class Spent(NamedTuple):
    """Seconds of one request."""

    wall: float
    processor: float
    """Of this process: the server's and the caller's."""


class Caller:
    """One connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, key: str, messages: list[dict[str, str]]) -> tuple[Spent, bytes]:
        """From the first byte sent to the last received, and the answer's body."""
        body = json.dumps({"model": "m", "messages": messages}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        begun, worked = time.perf_counter(), time.process_time()
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"unexpected answer: {answer!r}")
        lines = answer.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        said = await self._reader.readexactly(length)
        took = Spent(time.perf_counter() - begun, time.process_time() - worked)
        return took, said


def make_renderer() -> Renderer:
    tokenizer = train_tokenizer([" ".join(WORDS), ANSWER] * 20, vocab_size=400)
    tokenizer.eos_token = "<|endoftext|>"
    return Renderer(Codec(tokenizer), make_template(tokenizer))


def prompt_of(tokens: int, renderer: Renderer) -> str:
    each = len(renderer.codec.encode(" ".join(WORDS) + " "))
    return (" ".join(WORDS) + " ") * (tokens // each)


def recorders(renderer: Renderer) -> Callable[[], Session]:
    """Makes one for a new session."""
    engine = Instant([*renderer.codec.encode(ANSWER), min(renderer.codec.stop_token_ids)])

    def make() -> Session:
        agent = EngineAgent(engine, renderer, SamplingParams(), 0, 0, 0, "r")
        return Recorder(agent, Task("t", ()), renderer)

    return make


@asynccontextmanager
async def bare(answer: bytes) -> AsyncIterator[str]:
    """The URL of a handler that reads and answers."""
    from aiohttp import web

    async def handle(request: Any) -> Any:
        await request.read()
        return web.Response(body=answer, content_type="application/json")

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def conversation(caller: Caller, key: str, prompt: str) -> list[Spent]:
    """What each of its turns took."""
    messages = [{"role": "system", "content": prompt}]
    took = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"And what of number {turn}?"})
        spent, body = await caller.ask(key, messages)
        took.append(spent)
        said = json.loads(body)["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})
    return took


Times = dict[str, list[list[Spent]]]
"""By server: the turns of each conversation."""


async def measure(tokens: int, conversations: int) -> Times:
    renderer = make_renderer()
    prompt = prompt_of(tokens, renderer)
    make = {"the gateway": Echo, "the gateway with the recorder": recorders(renderer)}
    seats = Seats()
    server = GatewayServer(seats)
    await server.start()
    answer = {"choices": [{"message": {"role": "assistant", "content": ANSWER}}]}
    times: Times = {"bare aiohttp": [], **{name: [] for name in make}}
    try:
        async with bare(json.dumps(answer).encode()) as url:
            for _ in range(conversations):
                times["bare aiohttp"].append(await conversation(await connect(url), "k", prompt))
                for name, session in make.items():
                    seat = seats.open(session())
                    caller = await connect(server.url)
                    times[name].append(await conversation(caller, seat.key, prompt))
                    seats.close(seat.name)
    finally:
        await server.close()
    return times


async def connect(url: str) -> Caller:
    host, port = url.removeprefix("http://").split(":")
    return Caller(*await asyncio.open_connection(host, int(port), limit=2**24))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=40)
    args = parser.parse_args()
    with set_aside():
        return int(bound_missed(args.conversations))


def bound_missed(conversations: int) -> bool:
    """Measure and print everything; whether the bound was missed."""
    missed = False
    print("prompt | turn | server | p50, p99 ms | times bare | processor, p50 ms")
    for tokens in (1_000, 10_000):
        times = asyncio.run(measure(tokens, conversations))
        for which, part in (("first", slice(0, 1)), ("later", slice(1, None))):
            base = 0.0
            for name, turns in times.items():
                spent = [each for conversation in turns for each in conversation[part]]
                wall = [1000 * each.wall for each in spent]
                middle, last = median(wall), quantiles(wall, n=100)[98]
                worked = 1000 * median(each.processor for each in spent)
                base = base or middle
                missed |= middle - base > P50_MS
                ratio = f"{middle / base:.1f}x | {worked:.2f}"
                print(f"{tokens} | {which} | {name} | {middle:.2f}, {last:.2f} | {ratio}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
