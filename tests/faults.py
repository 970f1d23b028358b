"""Faults to inject by config: tools, environments and rewards that fail, and engines that do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.scheduler import Outcome, Scheduler
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Environment, Step
from retrain.rendering import Codec
from retrain.tools import tool
from retrain.types import InfrastructureError, Message, Rollout, Task
from runs import digits, hyperparameters, model_section, rl_config

Say = Callable[[str, int, int], Awaitable[str]]
"""Of a session, a turn and an attempt, all but the last from 0: what the policy says."""


class ScriptedPolicy(TorchEngine):
    """Says what it is told to, at once; only the learner uses the model."""

    def __init__(self, policy: Any, say: Say) -> None:
        super().__init__(policy.model, tokenizer=policy.tokenizer)
        self.codec = Codec(policy.tokenizer)
        self.say = say
        self.turn: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.ended: list[str] = []

    async def generate(self, request: GenerateRequest) -> Completion:
        session = str(request.session)
        turn = self.turn[session] = self.turn.get(session, -1) + 1
        if turn == 0:
            self.attempts[session] = self.attempts.get(session, 0) + 1
        text = await self.say(session, turn, self.attempts[session])
        stopped = text.endswith("</code>")
        ids = array("i", self.codec.encode(text if stopped else text + self.eos))
        logprobs, versions = array("f", [-1.0]) * len(ids), array("i", [0]) * len(ids)
        return Completion(ids, logprobs, versions, "stop_string" if stopped else "stop_token")

    async def end_session(self, session: str) -> None:
        self.turn.pop(session, None)
        self.ended.append(session)

    @property
    def eos(self) -> str:
        return str(self.codec.tokenizer.eos_token)


def run_scripted(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], say: Say
) -> retrain.RunResult:
    monkeypatch.setattr(
        "retrain.loops.run.build_engine", lambda _, policy: ScriptedPolicy(policy, say)
    )
    return retrain.run_sync(config)


def small_run(output_dir: Path, *, rollout: dict[str, Any] | None = None, **sections: Any) -> Any:
    """One step of two groups of three, with room for tool results."""
    algorithm = {"hyperparameters": hyperparameters(steps=1)}
    base = {
        "model": model_section(max_position_embeddings=1024),
        "algorithm": algorithm,
        "rollout": {"backoff_s": 0.01, "timeout_s": 20.0, **(rollout or {})},
    }
    return rl_config(output_dir, **(base | sections))


def failures_of(run: Path) -> list[dict[str, Any]]:
    path = run / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sample_of(rollout_id: str) -> int:
    return int(rollout_id.rsplit("/", 1)[1])


class Unshowable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def _loop() -> list[Any]:
    loop: list[Any] = [1]
    loop.append(loop)
    return loop


@tool
def fine(x: int) -> int:
    """Works."""
    return x


@tool
def raises(x: int) -> int:
    """Raises."""
    raise ValueError("bad input")


@tool
def hangs(x: int) -> int:
    """Hangs in its thread."""
    time.sleep(60)
    return x


@tool
async def waits(x: int) -> int:
    """Hangs on the event loop, and does not heed its cancellation."""
    for _ in range(100):
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue
    return x


@tool
def huge(x: int) -> str:
    """Returns 10 MB."""
    return "y" * 10_000_000


@tool
def table(x: int) -> dict[str, Any]:
    """Returns no string."""
    return {"a": [x, None, 1.5]}


@tool
def raw(x: int) -> bytes:
    """Returns bytes, one of them not UTF-8."""
    return b"ok \xff"


@tool
def cyclic(x: int) -> list[Any]:
    """Returns a list that holds itself."""
    return _loop()


@tool
def exits(x: int) -> int:
    """Ends the interpreter, it thinks."""
    raise SystemExit(3)


@tool
def mute(x: int) -> int:
    """Raises what has no words."""
    raise Unshowable


@tool
async def away(x: int) -> int:
    """Is not there."""
    raise InfrastructureError("503 from the index")


class Hangs(Environment):
    """The first rollout of each group hangs in `where`; the others answer once."""

    finished: list[str]

    def __init__(self, where: str = "step", heeds: bool = True, all_of_them: bool = False) -> None:
        self.where = where
        self.heeds = heeds
        self.all_of_them = all_of_them

    async def reset(self, task: Task) -> list[Message]:
        self.task = task
        if self.where == "reset" and self.all_of_them:
            await self.hang()
        return list(task.prompt)

    async def step(self, rollout: Rollout, message: Message) -> Step:
        if self.where == "step" and (self.all_of_them or rollout.id.endswith("/0")):
            await self.hang()
        return Step(stop="environment")

    async def finish(self, rollout: Rollout) -> None:
        FINISHED.append(rollout.id)
        if self.where == "finish" and rollout.id.endswith("/0"):
            await self.hang()

    async def hang(self) -> None:
        for _ in range(600):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                if self.heeds:
                    raise


FINISHED: list[str] = []


async def slow_reward(rollout: Rollout) -> float:
    """Hangs for tasks of even parity."""
    if rollout.task is not None and rollout.task.metadata["parity"] == "0":
        await asyncio.sleep(60)
    return digits(rollout)


async def remote_reward(rollout: Rollout) -> float:
    """Its server is away for the first rollout of each group."""
    if rollout.id.endswith("/0"):
        raise InfrastructureError("no judge")
    return digits(rollout)


class FailsInForward:
    """A hook on a layer: call number `at` of the decode thread raises; the calls are counted."""

    def __init__(self, at: int) -> None:
        self.calls = 0
        self.at = at

    def __call__(self, *_: Any) -> None:
        if threading.current_thread().name == "decode":
            self.calls += 1
            if self.calls == self.at:
                raise RuntimeError("device lost")


class DyingEngine(TorchEngine):
    """Its schedulers' steps raise, `failures` times in all, from the first on."""

    failures = 0

    def _make_scheduler(self, *args: Any, **kwargs: Any) -> Scheduler:
        scheduler = super()._make_scheduler(*args, **kwargs)
        advance = scheduler.advance

        def failing() -> list[Outcome]:
            if self.failures > 0:
                self.failures -= 1
                raise RuntimeError("device lost")
            return advance()

        scheduler.advance = failing  # type: ignore[method-assign]
        return scheduler


def answer_by(sample: int) -> str:
    """Answers whose rewards differ: shares of digits of 0, 1/2 and 1."""
    return ("a", "1a", "12")[sample]
