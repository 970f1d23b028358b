"""Servers that die, hang, fail, vanish and lie: no request is lost, answered twice, or answered by
weights that it does not say."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine_servers.launch import FAKE, free_port
from retrain.engines.server import sync
from retrain.types import InfrastructureError, UserError
from serving import (
    PROMPT,
    alive,
    check,
    engine_over,
    kill,
    knobs,
    launching,
    over,
    pids,
    quickly,
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


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """No task, no socket, no thread that waits for a server."""
    quickly()
    before = sockets()
    yield
    await until(lambda: len(asyncio.all_tasks()) <= 1, 5)
    await until(lambda: len(sockets() - before) == 0, 5)


def sockets() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are followed up without waiting."""
    monkeypatch.setattr("retrain.engines.server.supervisor.BACKOFF_S", 0.02)


# Processes that die


@pytest.mark.parametrize(("kind", "lora"), [("vllm", False), ("sglang", True)])
async def test_a_killed_server_is_started_again(kind: str, lora: bool, tmp_path: Path) -> None:
    """What was under way is asked again and gives what it would have given; weights that came
    while it was down are those that it then has."""
    policy = tiny_policy(lora=lora)
    env = knobs(tmp_path / "knobs.json", delay_s=0.005)
    asked = [request(PROMPT, 30, seed=i) for i in range(4)]
    async with serving(policy, tmp_path, **launching(kind, env=env)) as engine:
        models = {0: copy.deepcopy(policy.model)}
        undisturbed = await asyncio.gather(*map(engine.generate, asked))
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.15)
        kill(pids(tmp_path)[-1])
        again = await asyncio.gather(*tasks)
        assert [c.token_ids for c in again] == [c.token_ids for c in undisturbed]
        assert engine.restarts == 1
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.1)
        kill(pids(tmp_path)[-1])
        replica = engine._replicas[0]
        await until(lambda: replica.version is None)
        for version in (1, 2):
            models[version] = shake(policy, version)
            await engine.update_weights(version)
        for one, task in zip(asked, tasks, strict=True):
            got = await task
            assert set(got.versions) == {2}
            check(models, one, got)
        assert engine.restarts == 2
        await engine.update_weights(3)
        assert set((await engine.generate(request())).versions) == {3}
        started = pids(tmp_path)
    assert len(started) == 3
    await until(lambda: not any(map(alive, started)))


async def test_what_one_server_drops_another_takes_up(tmp_path: Path) -> None:
    """Without waiting until the first is back, which here it never is."""
    policy = tiny_policy()
    path = tmp_path / "knobs.json"
    section = launching(env=knobs(path, delay_s=0.005), replicas=2, max_restarts=1)
    async with serving(policy, tmp_path, **section) as engine:
        asked = [request(PROMPT, 60, seed=i) for i in range(6)]
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.1)
        knobs(path, delay_s=0.005, exit_at_start=1)
        kill(pids(tmp_path)[0])
        for one, task in zip(asked, tasks, strict=True):
            check({0: policy.model}, one, await task)
        await until(lambda: engine._supervisor._lost)
        assert engine.restarts == 0
        models = {1: shake(policy, 1)}
        await engine.update_weights(1)
        for seed in range(3):
            check(models, request(seed=seed), await engine.generate(request(seed=seed)))


async def test_a_server_that_does_not_start_again_at_once_is_tried_again(
    tmp_path: Path, at_once: None
) -> None:
    policy = tiny_policy()
    path = tmp_path / "knobs.json"
    section = launching(env=knobs(path), max_restarts=20)
    async with serving(policy, tmp_path, **section) as engine:
        knobs(path, exit_at_start=1)
        kill(pids(tmp_path)[0])
        await until(lambda: engine._replicas[0].failures >= 2)
        knobs(path)
        check({0: policy.model}, request(), await engine.generate(request()))
        assert engine.restarts == 1


async def test_a_server_that_never_starts_again_is_given_up(tmp_path: Path, at_once: None) -> None:
    path = tmp_path / "knobs.json"
    policy = tiny_policy()
    section = launching(env=knobs(path, delay_s=0.01), max_restarts=2)
    async with serving(policy, tmp_path, **section) as engine:
        tasks = [asyncio.ensure_future(engine.generate(request(PROMPT, 90))) for _ in range(3)]
        await asyncio.sleep(0.1)
        knobs(path, exit_at_start=1)
        kill(pids(tmp_path)[0])
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in [*outcomes, await outcome_of(engine.generate(request()))]:
            assert isinstance(outcome, InfrastructureError)
            said = str(outcome)
            assert "failed 3 times in a row (engine.max_restarts 2)" in said
            assert "told not to come up" in said
        with pytest.raises(UserError, match=r"no server is left: .*told not to come up") as raised:
            await engine.update_weights(1)
        assert "--resume" in raised.value.next_step


async def outcome_of(work: Any) -> Any:
    return (await asyncio.gather(work, return_exceptions=True))[0]


async def test_a_server_that_dies_while_it_loads_weights(tmp_path: Path) -> None:
    policy = tiny_policy()
    async with serving(policy, tmp_path, **launching(env=quickly(), replicas=2)) as engine:
        dialect: Any = engine._dialect
        load = dialect.load

        async def dies(server: Any, *more: Any) -> None:
            if server.url == engine._replicas[0].name and engine.restarts == 0:
                kill(pids(tmp_path)[0])
            await load(server, *more)

        dialect.load = dies
        models = {1: shake(policy, 1)}
        await engine.update_weights(1)
        for seed in range(4):
            check(models, request(seed=seed), await engine.generate(request(seed=seed)))
        await until(lambda: engine.restarts == 1)
        assert [replica.version for replica in engine._replicas] == [1, 1]


async def test_whatever_dies_every_request_is_answered_once_and_truly(
    tmp_path: Path, at_once: None
) -> None:
    """Kills and updates at random, requests cancelled among them."""
    chance = random.Random(1)
    policy = tiny_policy()
    env = knobs(tmp_path / "knobs.json", delay_s=0.004)
    section = launching(env=env, replicas=2, max_restarts=50, max_concurrency=5)
    async with serving(policy, tmp_path, **section) as engine:
        models = {0: copy.deepcopy(policy.model)}
        asked = [
            request(PROMPT[: 3 + i % 12], 20 + i, seed=i, group=str(i // 4)) for i in range(24)
        ]
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        for version in range(1, 6):
            await asyncio.sleep(0.3 * chance.random())
            if version % 2:
                kill(chance.choice([pid for pid in pids(tmp_path) if alive(pid)]))
            if version == 3:
                for task in chance.sample(tasks, 5):
                    task.cancel()
            await asyncio.sleep(0.1 * chance.random())
            models[version] = shake(policy, version)
            await engine.update_weights(version)
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        answered = 0
        for one, outcome in zip(asked, outcomes, strict=True):
            if not isinstance(outcome, asyncio.CancelledError):
                assert not isinstance(outcome, BaseException), outcome
                assert len(outcome.token_ids) == one.params.max_new_tokens
                check(models, one, outcome)
                answered += 1
        assert answered >= 19
        assert list(engine._router.in_flight) == [0, 0]
        await until(lambda: all(r.version == 5 for r in engine._replicas))
        assert engine.restarts >= 1


# Servers that hang


async def test_a_server_that_stops_is_replaced_after_health_timeout_s(tmp_path: Path) -> None:
    policy = tiny_policy()
    env = knobs(tmp_path / "knobs.json", delay_s=0.005)
    async with serving(policy, tmp_path, **launching(env=env, health_timeout_s=0.3)) as engine:
        asked = [request(PROMPT, 60, seed=i) for i in range(3)]
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.1)
        kill(pids(tmp_path)[0], signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await engine.generate(request())
        async with asyncio.timeout(25):
            for one, task in zip(asked, tasks, strict=True):
                check({0: policy.model}, one, await task)
        assert engine.restarts == 1
        started = pids(tmp_path)
    await until(lambda: not any(map(alive, started)))


async def test_a_running_server_that_hangs_is_waited_for(directory: Path, tmp_path: Path) -> None:
    policy = tiny_policy()
    with several(directory, 1) as (server,):
        async with serving(policy, tmp_path, **over(server, health_timeout_s=0.1)) as engine:
            server.knobs.hang = True
            task = asyncio.ensure_future(engine.generate(request()))
            await until(lambda: engine._replicas[0].version is None)
            models = {1: shake(policy, 1)}
            await engine.update_weights(1)
            server.knobs.hang = False
            got = await task
            assert set(got.versions) == {1}
            check(models, request(), got)
            assert engine.restarts == 1


async def test_a_server_that_hangs_as_it_is_tried_blocks_nothing_for_ever(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    """The probe, too, has a time limit."""
    policy = tiny_policy()
    with several(directory, 2) as servers:
        async with serving(policy, tmp_path, **over(*servers, max_restarts=99)) as engine:
            monkeypatch.setattr(sync, "CONTROL_S", 1.0)
            generate = servers[0].backend.generate

            async def never(job: Any) -> Any:
                await asyncio.Event().wait()

            monkeypatch.setattr(servers[0].backend, "generate", never)
            engine._replicas[0].suspected.set()
            await until(lambda: engine._replicas[0].version is None)
            models = {1: shake(policy, 1)}
            async with asyncio.timeout(5):
                await engine.update_weights(1)
                check(models, request(), await engine.generate(request()))
            monkeypatch.setattr(servers[0].backend, "generate", generate)
            await until(lambda: engine._replicas[0].version == 1)
    with several(directory, 1) as (server,):
        monkeypatch.setattr(server.backend, "generate", never)
        with pytest.raises(UserError, match=r"no answer to a probe in 1 s"):
            async with serving(policy, tmp_path, **over(server)):
                pass


async def test_signs_of_life_do_not_count_while_it_loads(directory: Path, tmp_path: Path) -> None:
    """A server may well be deaf while it loads; that has a time limit of its own."""
    policy = tiny_policy()
    with several(directory, 1) as (server,):
        async with serving(policy, tmp_path, **over(server, health_timeout_s=0.05)) as engine:
            reload = server.backend.reload

            async def deaf(path: Path) -> None:
                server.knobs.hang = True
                await asyncio.sleep(1)
                server.knobs.hang = False
                await reload(path)

            server.backend.reload = deaf  # type: ignore[method-assign]
            models = {1: shake(policy, 1)}
            await engine.update_weights(1)
            check(models, request(), await engine.generate(request()))
            assert engine.restarts == 0


# The end


async def test_closing_and_cancelling_while_servers_start(tmp_path: Path) -> None:
    env = knobs(tmp_path / "knobs.json", start_delay_s=30)
    for how in ("cancel", "close"):
        directory = tmp_path / how
        engine = engine_over(tiny_policy(), **launching(env=env, replicas=2))
        await engine.prepare()
        await engine.start(directory)
        update = asyncio.ensure_future(engine.update_weights(0))
        await until(lambda: len(keepers(directory)) == 2)  # noqa: B023
        processes = keepers(directory)
        waiting = asyncio.ensure_future(engine.generate(request()))
        if how == "cancel":
            update.cancel()
            with pytest.raises(asyncio.CancelledError):
                await update
            await until(lambda: not any(map(alive, processes)))  # noqa: B023
        await engine.close()
        with pytest.raises(InfrastructureError, match="closed"):
            await waiting
        if how == "close":
            with pytest.raises(InfrastructureError, match="closed"):
                await update
        assert not any(map(alive, processes))
        assert not (directory / "engine" / "weights").exists()
        with pytest.raises(InfrastructureError, match="closed"):
            await engine.update_weights(1)
        assert not (directory / "engine" / "weights").exists()


def keepers(directory: Path) -> list[int]:
    """Processes that look after servers whose logs are in a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"keeper.py" in (process / "cmdline").read_bytes():
                log = (process / "fd" / "1").resolve()
                found += [int(process.name)] if log.is_relative_to(directory.resolve()) else []
        except OSError:
            continue
    return found


async def test_a_cancelled_update_leaves_no_server_paused(directory: Path, tmp_path: Path) -> None:
    policy = tiny_policy()
    with several(directory, 1) as (server,):
        async with serving(policy, tmp_path, **over(server)) as engine:
            loading, reload = threading.Event(), server.backend.reload

            async def slow(path: Path) -> None:
                loading.set()
                await asyncio.sleep(0.5)
                await reload(path)

            server.backend.reload = slow  # type: ignore[method-assign]
            models = {1: shake(policy, 1)}
            update = asyncio.ensure_future(engine.update_weights(1))
            await until(loading.is_set)
            update.cancel()
            with pytest.raises(asyncio.CancelledError):
                await update
            await until(lambda: server.backend.paused == "no", 3)
            await engine.update_weights(1)
            got = await engine.generate(request())
            check(models, request(), got)


SCRIPT = """
    import asyncio, sys
    from pathlib import Path
    from retrain.engines.server.process import ServerProcess

    async def main():
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *sys.argv[3:]]
        server = ServerProcess(command, {"PYTHONPATH": sys.argv[1]}, Path(sys.argv[2]))
        await server.start()
        await asyncio.sleep(60)

    asyncio.run(main())
"""


async def test_servers_end_with_a_run_that_is_killed(directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine" / "server.log"
    arguments = ["--model", str(directory), "--port", str(free_port())]
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(FAKE), str(log), *arguments],
        env=os.environ | quickly(),
    )
    with run:
        await until(lambda: log.exists() and pids(tmp_path))
        (keeper,), (server,) = keepers(tmp_path), pids(tmp_path)
        assert alive(keeper) and alive(server)
        run.kill()
    await until(lambda: not alive(keeper) and not alive(server))


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGKILL]])
async def test_a_server_ends_with_its_keeper(signals: list[int], tmp_path: Path) -> None:
    """However that ends; and another one is started."""
    policy = tiny_policy()
    async with serving(policy, tmp_path, **launching(env=quickly())) as engine:
        (keeper,), (server,) = keepers(tmp_path), pids(tmp_path)
        for number in signals:
            kill(keeper, number)
        await until(lambda: not alive(keeper) and not alive(server))
        check({0: policy.model}, request(), await engine.generate(request()))
        assert engine.restarts == 1
