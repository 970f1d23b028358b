"""Text environments with Gymnasium's interface."""

from __future__ import annotations

import asyncio
import importlib
import queue
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from retrain.envs.adapters.text import (
    InvalidAction,
    action_text,
    answered,
    compile_pattern,
    observation_text,
    opened,
    options_of,
    refused,
    seed_of,
)
from retrain.envs.base import Environment, Step
from retrain.importing import import_object
from retrain.tools.threads import in_daemon_thread
from retrain.types import Message, Rollout, Task, UserError

R = TypeVar("R")

ActionKind = Literal["text", "number", "choice"]


class GymnasiumEnvironment(Environment):
    """`type: gymnasium`: an instance of a `gymnasium.Env` a rollout, in a thread of its own.

    The task's prompt holds the instructions, and ends with the first observation; each further one
    is a message. `reset` is given the task's columns `seed` and `options`; without a `seed` it
    follows from the task's id, so that the members of a group begin alike. The step's reward is
    the turn's; `terminated` and `truncated` end the rollout. Words that are no action are answered
    with why, do not reach the environment, and are counted as `invalid_actions`.

    Args:
        id: an id that `gymnasium.make` knows (`Name-v0`, `pkg.module:Name-v0`), or the import path
            of a class (`pkg.module:Class`, `file.py:Class`).
        params: keyword arguments of `make`, or of the class.
        action: what the model's words become: themselves (`text`), numbers of the shape of the
            action space (`number`), or the place of a name among `choices` (`choice`).
        choices: names of a Discrete space's actions, in order.
        action_pattern: a regular expression; see `action_text`.
        observation_field: of an observation that is a mapping; see `observation_text`.
        observations: what each number of a Discrete observation space reads.
        max_steps: most MODEL turns.
        invalid_reward: of a turn whose words are no action.

    Raises:
        UserError: there is no such environment, or the package is missing.
    """

    def __init__(
        self,
        id: str,
        *,
        params: Mapping[str, Any] | None = None,
        action: ActionKind = "text",
        choices: Sequence[str] = (),
        action_pattern: str | None = None,
        observation_field: str | None = None,
        observations: Sequence[str] = (),
        max_steps: int = 10,
        invalid_reward: float = 0.0,
    ) -> None:
        self.id = id
        self.action = action
        self.choices = tuple(choices)
        self.pattern = compile_pattern(action_pattern)
        self.observation_field = observation_field
        self.observations = tuple(observations)
        self.max_steps = max_steps
        self.invalid_reward = invalid_reward
        self.params = dict(params or {})
        self._make = _maker(id, self.params)
        self._thread: _Thread | None = None
        self._env: Any = None

    async def reset(self, task: Task) -> Sequence[Message]:
        seed, options = seed_of(task), options_of(task)
        self._thread = _Thread()

        def begin() -> Any:
            self._env = self._make()
            self._check_spaces()
            observation, _ = self._env.reset(seed=seed, options=options or None)
            return observation

        return opened(self.opening(task), self._shown(await self._thread.call(begin)))

    async def step(self, rollout: Rollout, message: Message) -> Step:
        assert self._thread is not None
        try:
            action = self._read(action_text(message.content, self.pattern))
        except InvalidAction as error:
            return Step([refused(rollout, error)], self.invalid_reward)
        observation, reward, terminated, truncated, _ = await self._thread.call(
            lambda: self._env.step(action)
        )
        over = terminated or truncated
        return Step(
            answered(self._shown(observation)), float(reward), "environment" if over else None
        )

    async def finish(self, rollout: Rollout) -> None:
        if self._thread is None:
            return
        try:
            if self._env is not None:
                await self._thread.call(self._env.close)
        finally:
            self._thread.end()

    def _shown(self, observation: Any) -> str:
        if self.observations:
            observation = self.observations[int(observation) - self._env.observation_space.start]
        return observation_text(observation, self.observation_field)

    def _check_spaces(self) -> None:
        """Names fit the spaces that they stand for, one each."""
        from gymnasium.spaces import Discrete

        for key, names, space in (
            ("choices", self.choices, self._env.action_space),
            ("observations", self.observations, self._env.observation_space),
        ):
            if names and not (isinstance(space, Discrete) and int(space.n) == len(names)):
                raise UserError(
                    f"environment.{key} names {len(names)} things; the space of {self.id} is "
                    f"{space}",
                    "Give one name for each number of a Discrete space.",
                )

    def _read(self, text: str) -> Any:
        """
        Raises:
            InvalidAction: the action space does not contain it.
        """
        space = self._env.action_space
        if self.action == "choice":
            folded = [name.casefold() for name in self.choices]
            if text.casefold() not in folded:
                raise InvalidAction(f"{text!r} is none of {', '.join(self.choices)}")
            return int(space.start) + folded.index(text.casefold())
        action = text if self.action == "text" else _numbers(text, space)
        if not space.contains(action):
            raise InvalidAction(f"{text!r} is not in {space}")
        return action


def _numbers(text: str, space: Any) -> Any:
    """An integer for a Discrete space, else an array of the space's shape and type."""
    import numpy as np
    from gymnasium.spaces import Discrete

    try:
        if isinstance(space, Discrete):
            return int(text)
        words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
        numbers = np.array([float(word) for word in words])
        with np.errstate(invalid="ignore"):
            action = numbers.astype(space.dtype)
        if not np.issubdtype(space.dtype, np.floating) and not np.array_equal(action, numbers):
            raise ValueError
        return action.reshape(space.shape)
    except (ValueError, OverflowError):
        shape = "a whole number" if isinstance(space, Discrete) else f"numbers for {space}"
        raise InvalidAction(f"{text!r} is not {shape}") from None


def _maker(id: str, params: dict[str, Any]) -> Callable[[], Any]:
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(
            "environment.type gymnasium needs the package gymnasium",
            "Run: pip install 'retrain[gymnasium]'",
        ) from error
    module, colon, name = id.rpartition(":")
    if not colon or re.search(r"-v\d+$", name):
        try:
            if module:
                importlib.import_module(module)
            gymnasium.spec(name)
        except (ImportError, gymnasium.error.Error) as error:
            raise UserError(
                f"environment.id: Gymnasium cannot make {id!r}: {error}",
                "Register it, name the module that does so (pkg.module:Name-v0), or name its "
                "class (pkg.module:Class).",
            ) from error
        return lambda: gymnasium.make(name, **params)
    kind = import_object(id, "environment")
    if not (isinstance(kind, type) and issubclass(kind, gymnasium.Env)):
        raise UserError(
            f"environment.id: {id} is not a subclass of gymnasium.Env", "Name one that is."
        )
    return lambda: kind(**params)


class _Thread:
    """A daemon thread that runs one rollout's calls, in their order: an environment may hold what
    only the thread that made it can use."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._served = in_daemon_thread(self._serve)

    async def call(self, function: Callable[[], R]) -> R:
        done: Future[R] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except StopIteration as stop:  # which a future cannot hold
                done.set_exception(RuntimeError(f"StopIteration: {stop}"))
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        self._calls.put(work)
        return await asyncio.wrap_future(done)

    def end(self) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
