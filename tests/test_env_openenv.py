"""OpenEnv: environments on its own classes, behind its own server, over its clients."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openenv.core")

import retrain
from adapting import built, check_exact, train, weights_changed
from retrain.envs.adapters.openenv import OpenEnvEnvironment
from retrain.types import InfrastructureError, Message, MessageType, Rollout, Task, UserError
from runs import rl_config, rollouts_of
from test_envs import Speaker, tagged

TESTS = Path(__file__).parent
TASK = Task("t", (Message("Say.", MessageType.MESSAGE),), metadata={"seed": 7})
TYPED = {
    "client": "openenv_worlds:EchoClient",
    "action": "openenv_worlds:Say",
    "action_field": "word",
    "observation_field": "echo",
}


@contextmanager
def server(directory: Path, name: str = "echo", sessions: int = 8) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    port_file = directory / f"{name}-{sessions}-{time.monotonic_ns()}"
    arguments = [str(TESTS / "openenv_worlds.py"), name, str(sessions), str(port_file)]
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    process = subprocess.Popen([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert process.poll() is None and time.monotonic() < deadline, "no server"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("echo")) as url:
        yield url


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("fastmcp")
    with server(tmp_path_factory.mktemp("shop"), "shop") as url:
        yield url


async def play(url: str, *lines: str, task: Task = TASK, **settings: Any) -> Rollout:
    renderer = tagged()
    environment = OpenEnvEnvironment(url, renderer, **settings)
    rollout = await environment.spawn().run(task, Speaker(lines, renderer))
    assert isinstance(rollout, Rollout)
    return rollout


def texts(rollout: Rollout) -> list[str]:
    return [message.content for message in rollout.messages]


async def test_the_environments_own_client_and_action(echo: str) -> None:
    rollout = await play(echo, "so:\n7", "no", "stop", **TYPED)
    assert texts(rollout) == ["Say.\n\nseed 7", "so:\n7", "7", "no", "no", "stop", "stop"]
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.5, 0.0, 1.0], "environment")


async def test_the_generic_client_and_a_json_object(echo: str) -> None:
    task = Task("t", TASK.prompt, metadata={"seed": 1, "options": {"left": 2}})
    rollout = await play(
        echo, '<a>{"word": "x"}</a>', '<a>{"word": "5"}</a>', task=task,
        action_field=None, action_pattern="<a>(.*)</a>",
    )  # fmt: skip
    assert texts(rollout)[0] == 'Say.\n\n{"echo": "seed 1", "length": 2}'
    assert texts(rollout)[2] == '{"echo": "x", "length": 1}'
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.0, 0.5], "environment")


async def test_without_a_seed_it_follows_from_the_task(echo: str) -> None:
    def at(task_id: str) -> Task:
        return Task(task_id, TASK.prompt)

    seeds = [texts(await play(echo, "stop", task=at(t), **TYPED))[0] for t in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize(
    ("settings", "line", "said"),
    [
        (TYPED, "x" * 13, "Invalid action: word: String should have at most 12 characters."),
        ({"action_field": "word"}, "x" * 13, "Invalid action: Invalid message."),
        ({"action_field": None}, "word", "Invalid action: it must be a JSON object: Expecting"),
        ({"action_field": None}, "[1]", "Invalid action: it must be a JSON object."),
        (TYPED | {"action_pattern": "<a>(.*)</a>"}, "7", "Invalid action: the answer has nothing"),
    ],
)
async def test_an_invalid_action_is_the_models_fault(
    echo: str, settings: dict[str, Any], line: str, said: str
) -> None:
    rollout = await play(echo, line, "", invalid_reward=-0.5, max_steps=2, **settings)
    assert texts(rollout)[2].startswith(said)
    assert (rollout.env_rewards, rollout.stop_reason) == ([-0.5, -0.5], "max_steps")
    assert rollout.metrics["invalid_actions"] == 2.0


async def test_an_environment_that_raises_is_the_users_fault(echo: str) -> None:
    with pytest.raises(UserError, match="failed: no such world"):
        await play(echo, "raise", **TYPED)


async def test_a_server_that_is_not_there_is_too_slow_or_dies_is_infrastructure(
    tmp_path: Path,
) -> None:
    with server(tmp_path) as url:
        with pytest.raises(InfrastructureError, match="did not answer in time"):
            await play(url, "sleep", timeout_s=0.5, **TYPED)
        with pytest.raises(InfrastructureError, match=r"cannot be reached.*: ConnectionClosed"):
            await play(url, "die", **TYPED)
        with pytest.raises(InfrastructureError, match=r"cannot be reached.*: ConnectionError"):
            await play(url, "stop", **TYPED)


async def test_rollouts_wait_for_a_session(tmp_path: Path) -> None:
    """A server of one session serves three rollouts; more at once than it has is refused by it."""
    import asyncio

    with server(tmp_path, sessions=1) as url:
        renderer = tagged()
        environment = OpenEnvEnvironment(url, renderer, **TYPED)
        made = await asyncio.gather(
            *(environment.spawn().run(TASK, Speaker(["1", "stop"])) for _ in range(3))
        )
        assert [r.env_rewards for r in made if isinstance(r, Rollout)] == [[0.5, 1.0]] * 3
        environment = OpenEnvEnvironment(url, renderer, max_sessions=3, **TYPED)
        results = await asyncio.gather(
            *(environment.spawn().run(TASK, Speaker(["1", "stop"])) for _ in range(3)),
            return_exceptions=True,
        )
        refusals = [r for r in results if isinstance(r, InfrastructureError)]
        assert refusals and all("max_sessions" in str(refusal) for refusal in refusals)


async def test_tools_are_calls(shop: str) -> None:
    def call(name: str, item: str) -> str:
        return f'<code>{{"name": "{name}", "arguments": {{"item": "{item}"}}}}</code>'

    lines = [
        call("price", "tea") + call("sell", "tea"),
        call("price", "none"),
        call("order", "tea") + call("price", "tea"),
    ]
    rollout = await play(shop, *lines, tools=True)
    said = [m.content for m in rollout.messages if m.type is MessageType.TOOL]
    assert said[:2] == ["3 euros", "no tool 'sell'; tools: price, order"]
    assert "sold out" in said[2]
    assert said[3:] == ["ordered tea", "The environment is done."]
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.25, 0.25, 1.0], "environment")
    rollout = await play(shop, "no", tools=True)
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.0], "answered")


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"client": "runs:Countdown"}, "not a subclass of openenv.core.EnvClient"),
        ({"action": "runs:digits"}, "is not a class"),
        ({"tool_format": {"type": "tags"}, "action_field": "word"}, "nothing to act on"),
        ({"url": "127.0.0.1"}, "url"),
    ],
)
def test_keys_that_cannot_act_are_refused(keys: dict[str, Any], fault: str, tmp_path: Path) -> None:
    environment = {"type": "openenv", "url": "http://127.0.0.1:1", **keys}
    with pytest.raises(UserError, match=fault):
        retrain.run_sync(rl_config(tmp_path, environment=environment, reward_setup={}))


def test_every_key_reaches_the_environment() -> None:
    from openenv_worlds import EchoClient, Say

    url = "http://127.0.0.1:1"
    given = {"action_pattern": "(x)", "max_steps": 3, "invalid_reward": -0.5}
    shared = {"timeout_s": 7.0, "max_sessions": 5}
    made, line = built(tagged(), type="openenv", url=url, **given, **shared, **TYPED)
    assert isinstance(made, OpenEnvEnvironment) and made.pattern is not None
    assert (made.url, made.client_class, made.action_class) == (url, EchoClient, Say)
    assert (made.action_field, made.observation_field) == ("word", "echo")
    assert (made.pattern.pattern, made.max_steps, made.invalid_reward) == ("(x)", 3, -0.5)
    assert (made.timeout_s, made.max_sessions, made.tools) == (7.0, 5, False)
    assert line == f"the server {url}; at most 3 turns"
    made, _ = built(tagged(), type="openenv", url=url, tool_format={"type": "tags"})
    assert isinstance(made, OpenEnvEnvironment) and made.tools


def test_a_training_step(echo: str, tmp_path: Path) -> None:
    trained = train(
        tmp_path,
        sft="openenv_worlds:traces",
        environment={"type": "openenv", "url": echo, "max_sessions": 4, "max_steps": 5, **TYPED},
        prompt_source={"type": "python", "function": "openenv_worlds:tasks"},
    )
    check_exact(trained)
    assert weights_changed(trained)
    ended = [r for r in trained.rollouts if r.stop_reason == "environment"]
    assert ended and any(value in (0.5, 1.0) for r in ended for value in r.env_rewards)
    assert {r.messages[0].content for r in trained.rollouts} <= {
        f"Say a digit, or stop.\n\nseed {n}" for n in range(4)
    }


def test_a_training_step_with_tools(tmp_path: Path) -> None:
    pytest.importorskip("fastmcp")
    with server(tmp_path, "till") as url:
        environment = {
            "type": "openenv",
            "url": url,
            "tool_format": {"type": "tags"},
            "max_sessions": 8,
            "max_steps": 2,
        }
        trained = train(
            tmp_path / "runs",
            sft="openenv_worlds:shop_traces",
            environment=environment,
            prompt_source={"type": "python", "function": "openenv_worlds:shop_tasks"},
        )
    check_exact(trained)
    ordered = [r for r in trained.rollouts if r.stop_reason == "environment"]
    assert ordered and all(r.messages[-1].content == "ordered tea" for r in ordered)
    assert all(r.env_rewards[-1] == 1.0 for r in ordered)


def test_a_run_masks_what_a_dead_server_ended(tmp_path: Path) -> None:
    environment = {"type": "openenv", "url": "http://127.0.0.1:9", **TYPED}
    config = rl_config(
        tmp_path,
        environment=environment,
        reward_setup={},
        rollout={"retries": 1, "backoff_s": 0.01},
    )
    result = retrain.run_sync(config)
    masked = [r for step in rollouts_of(result.path).values() for r in step]
    assert len(masked) == 12 and all("cannot be reached" in (r.error or "") for r in masked)
    assert all([f.kind for f in r.failures] == ["environment"] * 2 for r in masked)
