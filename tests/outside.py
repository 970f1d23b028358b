"""Programs that know nothing of retrain, and rollouts of them with a policy whose words are
prescribed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrain.engines.base import SamplingParams
from retrain.envs.external import ExternalEnvironment
from retrain.rendering import Renderer
from retrain.rollout import Sampler
from retrain.types import Rollout, Task
from scripted import ScriptedEngine, plain_renderer, user

END = "<|im_end|>"

CLIENT = '''
import json, os, sys, time, urllib.request

def post(url, body):
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

def ask(*said, **more):
    """The model's message after these, users' and its own in turn."""
    messages = [
        {"role": "user", "content": m} if isinstance(m, str) else m for m in said
    ]
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    return post(url, {"model": "any", "messages": messages, **more})["choices"][0]["message"]

def reward(value, **metadata):
    post(os.environ["RETRAIN_REWARD_URL"], {"reward": value, "metadata": metadata})

'''
"""Written before every program here: a client of the standard library."""


def program(folder: Path, text: str, name: str = "agent.py") -> list[str]:
    """A command that runs this in Python; `folder` is to be its working directory."""
    (folder / name).write_text(CLIENT + text, encoding="utf-8")
    return [sys.executable, name]


class Stage:
    """An environment and a sampler, closed at the end of a test."""

    def __init__(
        self,
        turns: Sequence[str | Sequence[int]],
        *,
        renderer: Renderer | None = None,
        engine: Any = None,
        retries: int = 0,
        **settings: Any,
    ) -> None:
        self.renderer = renderer or plain_renderer("chatml")
        self.engine = engine or ScriptedEngine(self.renderer.codec, turns)
        self.world = ExternalEnvironment(self.renderer, **settings)
        self.sampler = Sampler(
            self.world,
            self.engine,
            self.renderer,
            SamplingParams(),
            retries=retries,
            backoff_s=0.0,
        )

    async def __aenter__(self) -> Stage:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.world.close()

    async def play(self, task: Task | None = None, *, sample: int = 0) -> Rollout:
        task = task or Task("t", (user("What is 2 + 3?"),))
        (rollout,) = await self.sampler.episode(task, sample=sample)
        return rollout


async def play(
    turns: Sequence[str | Sequence[int]], task: Task | None = None, **settings: Any
) -> tuple[Rollout, ScriptedEngine]:
    """One rollout."""
    async with Stage(turns, **settings) as stage:
        return await stage.play(task), stage.engine


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state != b"Z"
