"""Environments on OpenEnv's own classes, their client, and a server of them:
`python openenv_worlds.py NAME SESSIONS PORT_FILE`."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openenv.core import EnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from pydantic import Field

from saying import said


class Say(Action):
    word: str = Field(max_length=12)


class Heard(Observation):
    echo: str = ""
    length: int = 0


class Echo(Environment[Say, Heard, State]):
    """Says what it hears; a digit earns 0.5, and "stop" ends with 1. `left` steps in all."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self.left = 0

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, left: int = 3, **_: Any
    ) -> Heard:
        self.left = left
        return Heard(echo=f"seed {seed}", length=left)

    def step(self, action: Say, timeout_s: float | None = None, **_: Any) -> Heard:
        if action.word == "raise":
            raise ZeroDivisionError("no such world")
        if action.word == "die":
            os._exit(1)
        if action.word == "sleep":
            time.sleep(30)
        self.left -= 1
        stopped = action.word == "stop"
        reward = 1.0 if stopped else 0.5 * any(c.isdigit() for c in action.word)
        over = stopped or self.left == 0
        return Heard(echo=action.word, length=len(action.word), reward=reward, done=over)

    @property
    def state(self) -> State:
        return self._state


class EchoClient(EnvClient[Say, Heard, State]):
    def _step_payload(self, action: Say) -> dict[str, Any]:
        return {"word": action.word}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Heard]:
        seen = Heard(**payload["observation"])
        return StepResult(seen, payload.get("reward"), payload.get("done", False))

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)


def shop(asks_prices: bool) -> Any:
    """An environment of MCP tools: a price asked earns 0.25, and the right order 1."""
    from fastmcp import FastMCP
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction

    class Shop(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            counter = FastMCP("shop")

            def price(item: str) -> str:
                """What an item costs."""
                if item == "none":
                    raise ValueError("sold out")
                return f"{len(item)} euros"

            def order(item: str) -> str:
                """Order an item."""
                return f"ordered {item}"

            if asks_prices:
                counter.tool(price)
            counter.tool(order)
            super().__init__(counter)
            self._state = State()

        def reset(self, seed: int | None = None, **_: Any) -> Observation:
            return Observation()

        def _step_impl(self, action: Any, **_: Any) -> Observation:
            return Observation()

        async def step_async(self, action: Any, **keywords: Any) -> Observation:
            seen = await super().step_async(action, **keywords)
            if isinstance(action, CallToolAction):
                right = action.tool_name == "order" and action.arguments == {"item": "tea"}
                seen.reward, seen.done = (1.0, True) if right else (0.25, False)
            return seen

        @property
        def state(self) -> State:
            return self._state

    return Shop


def tasks() -> Iterator[dict[str, Any]]:
    for seed in range(4):
        yield {"prompt": "Say a digit, or stop.", "seed": seed, "options": {"left": 2}}


def traces(n: int = 320) -> Iterator[dict[str, Any]]:
    yield from said("Say a digit, or stop.\n\nseed 0", ["1", "2", "stop", "no"], n)


def shop_tasks() -> Iterator[dict[str, Any]]:
    for name in "abcd":
        yield {"prompt": f"{name}: tea?"}


def shop_traces(n: int = 320) -> Iterator[dict[str, Any]]:
    yield from said("a: tea?", ["<code>tea</code>", "<code>a</code>", "no"], n)


def main(name: str, sessions: str, port_file: str) -> None:
    import uvicorn

    if name != "echo":
        from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation

        app = create_app(
            shop(name == "shop"),
            CallToolAction,
            CallToolObservation,
            max_concurrent_envs=int(sessions),
        )
    else:
        app = create_app(Echo, Say, Heard, max_concurrent_envs=int(sessions))
    listener = socket.create_server(("127.0.0.1", 0))
    part = Path(f"{port_file}.part")
    part.write_text(str(listener.getsockname()[1]))
    part.rename(port_file)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
