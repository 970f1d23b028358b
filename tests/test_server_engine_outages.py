"""Servers that fail now and then or always, vanish, come back, and lie."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path
from typing import Any

import pytest

from engine_servers.launch import free_port
from engine_servers.server import EngineServer
from retrain.engines.server.dialect import Answer, Ask
from retrain.engines.server.http import Refused
from retrain.engines.server.sync import Sync
from retrain.engines.server.vllm import VLLM
from retrain.types import InfrastructureError, UserError
from serving import (
    PROMPT,
    check,
    engine_over,
    over,
    request,
    saved,
    serving,
    several,
    shake,
    tiny_policy,
    until,
)

KINDS = ["vllm", "sglang"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_policy(), tmp_path_factory.mktemp("other"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are followed up without waiting."""
    monkeypatch.setattr("retrain.engines.server.supervisor.BACKOFF_S", 0.02)


# Servers that fail


@pytest.mark.parametrize("knob", ["fail_next", "drop_next"])
@pytest.mark.parametrize("kind", KINDS)
async def test_failures_now_and_then_are_asked_again(
    kind: Any, knob: str, directory: Path, tmp_path: Path, at_once: None
) -> None:
    policy = tiny_policy()
    asked = [request(PROMPT, 10, seed=i) for i in range(6)]
    with several(directory, 1, dialect=kind) as (server,):
        async with serving(policy, tmp_path, **over(server, type=kind)) as engine:
            undisturbed = await asyncio.gather(*map(engine.generate, asked))
            for count in (1, 6, 2):
                server.knobs.update({knob: count})
                found = await asyncio.gather(*map(engine.generate, asked))
                assert [c.token_ids for c in found] == [c.token_ids for c in undisturbed]
            server.knobs.update({knob: 1})
            assert (await engine.score(PROMPT))[0] == 0.0


async def test_a_server_that_always_fails_is_given_up(
    directory: Path, tmp_path: Path, at_once: None
) -> None:
    """And is not used again: nobody would look after it."""
    policy = tiny_policy()
    with several(directory, 2) as servers:
        async with serving(policy, tmp_path, **over(*servers, max_restarts=2)) as engine:
            servers[0].knobs.fail_next = 10**6
            for seed in range(8):
                got = await engine.generate(request(seed=seed))
                check({0: policy.model}, request(), got)
                await asyncio.sleep(0.02)
            await until(lambda: engine._supervisor._lost)
            count = len(servers[0].requests)
            models = {1: shake(policy, 1)}
            await engine.update_weights(1)
            for seed in range(4):
                check(models, request(), await engine.generate(request(seed=seed)))
            assert len(servers[0].requests) == count
            servers[1].knobs.fail_next = 10**6
            async with asyncio.timeout(10):
                with pytest.raises(InfrastructureError, match=r"told to fail"):
                    while True:
                        await engine.generate(request())
            await until(lambda: len(engine._supervisor._lost) == 2)
            with pytest.raises(UserError, match=r"no server is left: .*max_restarts 2"):
                await engine.update_weights(2)


async def test_max_restarts_0_gives_up_at_once(directory: Path, tmp_path: Path) -> None:
    with several(directory, 1) as (server,):
        async with serving(tiny_policy(), tmp_path, **over(server, max_restarts=0)) as engine:
            server.knobs.fail_next = 2  # the request, and the probe that follows it
            with pytest.raises(
                InfrastructureError, match=r"failed once \(engine\.max_restarts 0\)"
            ):
                await engine.generate(request())


async def test_a_request_that_always_fails_costs_no_server(
    directory: Path, tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is to blame: others are answered, however many such requests there are."""
    generate = VLLM.generate

    async def poisoned(self: VLLM, server: Any, ask: Ask) -> Answer:
        if ask.token_ids[0] == 13:
            raise Refused(server.url, 500, "no number")
        return await generate(self, server, ask)

    with several(directory, 1) as (server,):
        async with serving(tiny_policy(), tmp_path, **over(server, max_restarts=1)) as engine:
            monkeypatch.setattr(VLLM, "generate", poisoned)
            for _ in range(3):
                with pytest.raises(InfrastructureError, match=r"no number \(5 attempts\)"):
                    await engine.generate(request([13, *PROMPT]))
                await engine.generate(request())
            assert engine.restarts == 0


async def test_a_server_that_ends_requests_by_itself_is_not_asked_for_ever(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Ask] = []

    async def nothing(self: VLLM, server: Any, ask: Ask) -> Answer:
        asked.append(ask)
        return Answer(array("i"), array("f"), "aborted")

    monkeypatch.setattr("retrain.engines.server.engine.AGAIN_S", 0.001)
    with several(directory, 1) as (server,):
        async with serving(tiny_policy(), tmp_path, **over(server)) as engine:
            monkeypatch.setattr(VLLM, "generate", nothing)
            with pytest.raises(InfrastructureError, match="ended a request 5 times"):
                await engine.generate(request())
    assert len(asked) == 5


async def test_failures_with_answers_in_between_are_forgiven(
    directory: Path, tmp_path: Path, at_once: None
) -> None:
    with several(directory, 1) as (server,):
        async with serving(tiny_policy(), tmp_path, **over(server, max_restarts=1)) as engine:
            for seed in range(4):
                server.knobs.fail_next = 1
                await engine.generate(request(seed=seed))


async def test_a_load_that_fails_once_is_done_again(
    directory: Path, tmp_path: Path, at_once: None
) -> None:
    policy = tiny_policy()
    with several(directory, 1) as (server,):
        async with serving(policy, tmp_path, **over(server)) as engine:
            reload, fails = server.backend.reload, iter([True])

            async def once(path: Path) -> None:
                if next(fails, False):
                    raise RuntimeError("out of memory")
                await reload(path)

            server.backend.reload = once  # type: ignore[method-assign]
            models = {1: shake(policy, 1)}
            await engine.update_weights(1)
            got = await engine.generate(request())
            check(models, request(), got)
            assert set(got.versions) == {1}


async def test_what_nobody_thought_of_stops_everything(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than that requests wait for ever for who should have looked."""

    async def verify(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    with several(directory, 1) as (server,):
        async with serving(tiny_policy(), tmp_path, **over(server)) as engine:
            monkeypatch.setattr(Sync, "verify", verify)
            server.knobs.fail_next = 1
            async with asyncio.timeout(5):
                with pytest.raises(ZeroDivisionError):
                    await engine.generate(request())
                with pytest.raises(ZeroDivisionError):
                    await engine.update_weights(1)


# Servers of others, that come and go


@pytest.mark.parametrize("lora", [False, True])
async def test_a_server_that_comes_back_is_given_the_newest_weights_first(
    lora: bool, tmp_path: Path
) -> None:
    policy = tiny_policy(lora=lora)
    directory, port = saved(policy, tmp_path / "base"), free_port()
    section = {"type": "vllm", "urls": [f"http://127.0.0.1:{port}"], "health_timeout_s": 0.2}
    with EngineServer(directory, port=port, delay_s=0.01) as server:
        engine = engine_over(policy, **section)
        await engine.prepare()
        await engine.start(tmp_path)
        await engine.update_weights(0)
        tasks = [asyncio.ensure_future(engine.generate(request(PROMPT, 90, i))) for i in range(3)]
        await until(lambda: len(server.generated) == 3)
    models = {1: shake(policy, 1)}
    await engine.update_weights(1)
    assert not any(task.done() for task in tasks)
    with EngineServer(directory, port=port) as server:
        for i, task in enumerate(tasks):
            got = await task
            assert set(got.versions) == {1}
            check(models, request(PROMPT, 90, i), got)
        assert engine.restarts == 1
        await engine.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_restarted_unseen_without_its_adapter(
    kind: Any, tmp_path: Path, at_once: None
) -> None:
    """It refuses requests that it would have taken before."""
    policy = tiny_policy(lora=True)
    with several(saved(policy, tmp_path / "base"), 1, dialect=kind) as (server,):
        async with serving(policy, tmp_path, **over(server, type=kind)) as engine:
            server.backend.adapters.clear()
            check({0: policy.model}, request(), await engine.generate(request()))


async def test_a_server_that_comes_back_lying_stops_everything(
    directory: Path, tmp_path: Path
) -> None:
    port = free_port()
    section = {"type": "vllm", "urls": [f"http://127.0.0.1:{port}"], "health_timeout_s": 0.2}
    with EngineServer(directory, port=port):
        engine = engine_over(tiny_policy(), **section)
        await engine.prepare()
        await engine.start(tmp_path)
        await engine.update_weights(0)
    task = asyncio.ensure_future(engine.generate(request()))
    await until(lambda: engine._replicas[0].suspected.is_set() or engine._replicas[0].failures)
    with EngineServer(directory, port=port, ignores_reload=True):
        for work in (task, engine.generate(request()), engine.update_weights(1)):
            with pytest.raises(UserError, match="does not serve version 0 of the policy"):
                await work
        await engine.close()
