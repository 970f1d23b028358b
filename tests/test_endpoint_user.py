"""Simulated users that the model behind a chat endpoint plays."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import retrain
from engine_servers.chat import ChatServer
from engine_servers.wire import Answer
from retrain.config import load_config
from retrain.loops.check import check
from retrain.loops.world import build_environment
from retrain.rollout import EndpointUser, request_seed
from retrain.types import InfrastructureError, Message, MessageType, Rollout, Task, UserError
from runs import hyperparameters, rl_config, rollouts_of

KEY = "sk-very-secret-4711"


def section(server: ChatServer, **keys: Any) -> dict[str, Any]:
    user = {"type": "openai", "url": server.url, "model": "small", "system_prompt": "{prompt}"}
    return {"type": "dialogue", "max_turns": 2, "user": user | keys}


def build(environment: dict[str, Any]) -> Any:
    config = load_config(rl_config(Path("runs"), environment=environment, seed=5))
    return build_environment(config, None, None).user  # type: ignore[arg-type]


async def talk(environment: dict[str, Any], turns: int = 2) -> list[str | None]:
    """What a user says to a policy that counts."""
    user = build(environment)
    assert isinstance(user, EndpointUser)
    task = Task("t", (Message("Buy shoes", MessageType.MESSAGE),), "no", {"size": 42})
    rollout = Rollout(id="0/t/0", task=task)
    rollout.add_messages(Message("Be brief.", MessageType.SYSTEM), *task.prompt)
    replies = []
    try:
        for turn in range(turns):
            rollout.add_messages(Message(f"Answer {turn}", MessageType.MODEL))
            replies.append(await user.reply(task, rollout))
            rollout.add_messages(Message(replies[-1] or "", MessageType.MESSAGE))
        await user.finish(rollout)
    finally:
        await user.close()
    return replies


async def test_an_endpoint_user_sees_the_parties_exchanged() -> None:
    with ChatServer(lambda messages: f" Reply {len(messages)} ") as server:
        said = await talk(section(server, system_prompt="Want {prompt} of {size}, not {answer}."))
        first, second = server.bodies
    assert said == ["Reply 3", "Reply 5"]
    assert first["messages"] == [
        {"role": "system", "content": "Want Buy shoes of 42, not no."},
        {"role": "assistant", "content": "Buy shoes"},
        {"role": "user", "content": "Answer 0"},
    ]
    assert [m["role"] for m in second["messages"][2:]] == ["user", "assistant", "user"]
    seeds = [request_seed(5, turn, "0/t/0", 0, 0) >> 32 for turn in (1, 2)]
    assert [b["seed"] for b in server.bodies] == seeds
    assert all(0 <= seed < 2**31 for seed in seeds)


async def test_every_key_of_an_endpoint_user_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERS_KEY", KEY)
    with ChatServer(model="large", api_key=KEY) as server:
        keys = {"model": "large", "api_key_env": "USERS_KEY"}
        await talk(section(server, **keys), turns=1)
        await talk(section(server, **keys, temperature=0.0, max_new_tokens=7), turns=1)
        plain, changed = server.bodies
        assert (plain["temperature"], plain["max_tokens"]) == (1.0, 128)
        assert (changed["temperature"], changed["max_tokens"]) == (0.0, 7)
        with pytest.raises(UserError, match=r"environment\.user: .* answered 404"):
            await talk(section(server, **keys | {"model": "small"}), turns=1)
        with pytest.raises(UserError, match=r"environment\.user: .* answered 401"):
            await talk(section(server, model="large"), turns=1)


async def test_deadline_retries_and_concurrency_of_an_endpoint_user() -> None:
    with ChatServer() as server:
        server.knobs.fail_next = 1
        with pytest.raises(InfrastructureError, match=r"answered 500: told to fail$"):
            await talk(section(server, retries=0), turns=1)
        server.knobs.fail_next = 1
        assert await talk(section(server, retries=1), turns=1) == ["Good."]
        server.knobs.delay_s = 0.15
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.1 s$"):
            await talk(section(server, retries=0, timeout_s=0.1), turns=1)
        user = build(section(server, max_concurrency=2))
        task = Task("t", (Message("Hi", MessageType.MESSAGE),))
        before = server.wire.peak
        await asyncio.gather(*(user.reply(task, Rollout(task=task)) for _ in range(5)))
        await user.close()
    assert (before, server.wire.peak) == (1, 2)


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"api_key_env": KEY}, "api_key_env: not the name of an environment variable"),
        ({"api_key": KEY}, "unknown key environment.user.api_key"),
        ({"url": "host"}, "environment.user: 'host' is not a web address"),
        ({"api_key_env": "NOT_SET_HERE"}, "the environment variable NOT_SET_HERE is not set"),
    ],
)
def test_endpoint_users_that_are_refused(keys: dict[str, Any], cause: str) -> None:
    with ChatServer() as server, pytest.raises(UserError, match=re.escape(cause)) as failure:
        build(section(server, **keys))
    assert KEY not in str(failure.value)


async def test_a_user_without_words_leaves_or_was_cut() -> None:
    with ChatServer(lambda messages: "  ") as server:
        assert await talk(section(server), turns=1) == [None]
        choice = {"message": {"content": ""}, "finish_reason": "length"}
        server.answers = [Answer(200, {"choices": [choice]})]
        with pytest.raises(InfrastructureError, match=r"raise environment\.user\.max_new_tokens"):
            await talk(section(server, retries=0), turns=1)


def dialogue_run(path: Path, server: ChatServer, **keys: Any) -> dict[str, Any]:
    return rl_config(
        path,
        environment=section(server, api_key_env="USERS_KEY", **keys),
        rollout={"retries": 1, "backoff_s": 0.001},
        algorithm={
            "hyperparameters": hyperparameters(
                prompts_per_step=4, group_size=4, steps=1, max_new_tokens=120
            )
        },
    )


def test_a_run_with_an_endpoint_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the user says is context; a failure is retried, then masks the rollout; no key is left
    behind."""
    monkeypatch.setenv("USERS_KEY", KEY)
    with caplog.at_level(logging.DEBUG), ChatServer(api_key=KEY) as server:
        answered = retrain.run_sync(dialogue_run(tmp_path, server))
        asked = len(server.bodies)
        server.knobs.fail_next = 10**6
        failed = retrain.run_sync(dialogue_run(tmp_path, server, retries=0))
        assert len(server.bodies) > asked
    talked = [r for r in rollouts_of(answered.path)[1] if len(r.messages) > 2]
    assert len(talked) == asked > 0
    assert {r.messages[2].content for r in talked} == {"Good."}
    assert all(r.error is None and len(r.segments) == 1 for r in talked)
    masked = [r for r in rollouts_of(failed.path)[1] if r.error is not None]
    assert [r.id for r in masked] == [r.id for r in talked]
    assert all("answered 500" in str(r.error) for r in masked)
    assert all([f.kind for f in r.failures] == ["environment"] * 2 for r in masked)
    assert KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_nobody_is_told_that_it_would_be_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USERS_KEY", KEY)
    with ChatServer(api_key=KEY) as server:
        config = dialogue_run(tmp_path, server)
        assert "not bit for bit: an endpoint plays the user" in check(load_config(config))
        retrain.run_sync(config)
    said = "an endpoint plays the user in rl: a resumed run is not the same bit for bit"
    assert said in capsys.readouterr().out
