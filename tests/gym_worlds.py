"""Text environments on Gymnasium's own classes, tasks for them, and traces of their words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Text

from saying import said

LAKE = ["left", "down", "right", "up"]


class Guess(gymnasium.Env[Any, str]):
    """Guess the digit that the seed has drawn: 1 for the digit, and the end; else a hint, and 0.25
    for a guess that is nearer than the last."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    action_space = Text(1, charset="0123456789")
    observation_space = Dict({"text": Text(40), "tries": Discrete(100)})
    closed: ClassVar[list[int]] = []
    threads: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, most: int = 3) -> None:
        self.most = most
        self._note()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._note()
        self.digit = (options or {}).get("digit", int(self.np_random.integers(10)))
        self.tries, self.last = 0, 10
        return self._seen("guess"), {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._note()
        self.tries += 1
        away = abs(int(action) - self.digit)
        nearer, self.last = away < self.last, away
        if away == 0:
            return self._seen("yes"), 1.0, True, False, {}
        hint = "higher" if int(action) < self.digit else "lower"
        return self._seen(hint), 0.25 * nearer, False, self.tries == self.most, {}

    def close(self) -> None:
        self._note()
        Guess.closed.append(id(self))

    def _seen(self, text: str) -> dict[str, Any]:
        return {"text": text, "tries": self.tries}

    def _note(self) -> None:
        Guess.threads.add((id(self), threading.get_ident()))


class Broken(gymnasium.Env[str, str]):
    action_space = Text(10)
    observation_space = Text(10)

    def reset(self, **_: Any) -> tuple[str, dict[str, Any]]:
        return "go", {}

    def step(self, action: str) -> Any:
        raise ZeroDivisionError("no such world")


class Point(gymnasium.Env[Any, Any]):
    """Two numbers; the observation is their sum, as an array."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)
    observation_space = Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        assert action.dtype == np.float32 and action.shape == (2,)
        return action.sum(keepdims=True), float(action[0]), False, False, {}


gymnasium.register("Guess-v0", entry_point=Guess, max_episode_steps=2)


def lake_tasks() -> Iterator[dict[str, Any]]:
    for seed in range(4):
        yield {"prompt": f"Lake {seed}: left, down, right or up?", "seed": seed}


def guess_tasks() -> Iterator[dict[str, Any]]:
    for number in range(4):
        yield {"prompt": f"Game {number}.", "options": {"digit": 4 + number % 2}}


def lake_traces(n: int = 320) -> Iterator[dict[str, Any]]:
    yield from said("Lake 0: left, down, right or up?\n\nstart", LAKE, n)


def guess_traces(n: int = 320) -> Iterator[dict[str, Any]]:
    yield from said("Game 0.\n\nguess", [str(d) for d in range(10)], n)
