"""Programs as processes: nothing of them is left behind, whichever way their end comes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from outside import END, Stage, alive, program
from retrain.types import Task, UserError
from scripted import user

ANSWER = f"5{END}"

FAMILY = """
import signal, subprocess
def family(**how):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], **how)
    with open("pids", "a") as file:
        file.write(f"{os.getpid()} {child.pid} ")
"""
"""A program that heeds no SIGTERM, and a child of it."""


def pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


async def gone(*processes: int) -> bool:
    """Within some seconds."""
    for _ in range(400):
        if not any(map(alive, processes)):
            return True
        await asyncio.sleep(0.02)
    return False


async def until(folder: Path, count: int) -> list[int]:
    for _ in range(1000):
        if len(found := pids(folder)) >= count:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("the programs did not start")


async def test_what_a_program_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    command = program(tmp_path, f"{FAMILY}family()\nask('?')\n")
    async with Stage([ANSWER], command=command, working_dir=str(tmp_path)) as stage:
        rollout = await stage.play()
        assert rollout.error is None
        assert await gone(*pids(tmp_path))


@pytest.mark.parametrize("kind", ["command", "function"])
async def test_one_that_is_late_is_killed_with_its_children(kind: str, tmp_path: Path) -> None:
    text = f"{FAMILY}def agent(task=None):\n    family()\n    ask('?')\n    time.sleep(120)\n"
    command = program(tmp_path, f"{text}if __name__ == '__main__':\n    agent()\n")
    given: dict[str, Any] = (
        {"command": command} if kind == "command" else {"function": f"{tmp_path}/agent.py:agent"}
    )
    settings: dict[str, Any] = {
        **given,
        "working_dir": str(tmp_path),
        "timeout_s": 2.0,
        "kill_after_s": 0.2,
    }
    async with Stage([ANSWER], **settings) as stage:
        rollout = await stage.play()
        assert [f.kind for f in rollout.failures] == ["deadline"]
        assert len(pids(tmp_path)) == 2 and await gone(*pids(tmp_path))


async def test_cancelled_rollouts_leave_nothing(tmp_path: Path) -> None:
    command = program(tmp_path, f"{FAMILY}family()\nask('?')\ntime.sleep(120)\n")
    settings: dict[str, Any] = {
        "command": command,
        "working_dir": str(tmp_path),
        "kill_after_s": 0.2,
    }
    async with Stage([ANSWER] * 3, **settings) as stage:
        rollouts = [asyncio.ensure_future(stage.play(sample=n)) for n in range(3)]
        found = await until(tmp_path, 6)
        for rollout in rollouts:
            rollout.cancel()
        await asyncio.gather(*rollouts, return_exceptions=True)
        assert await gone(*found)


async def test_closing_ends_those_that_left_their_group(tmp_path: Path) -> None:
    command = program(tmp_path, f"{FAMILY}family(start_new_session=True)\nask('?')\n")
    settings: dict[str, Any] = {
        "command": command,
        "working_dir": str(tmp_path),
        "kill_after_s": 0.2,
    }
    async with Stage([ANSWER], **settings) as stage:
        await stage.play()
        _, child = pids(tmp_path)
        assert alive(child)
    assert not alive(child)


RUN = """
import asyncio, sys
from outside import Stage
async def main(folder, command):
    stage = Stage(["5<|im_end|>"] * 2, command=command, working_dir=folder, kill_after_s=0.5)
    await asyncio.gather(stage.play(sample=0), stage.play(sample=1))
asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_killing_the_run_leaves_nothing(how: signal.Signals, tmp_path: Path) -> None:
    command = program(tmp_path, f"{FAMILY}family()\nask('?')\ntime.sleep(120)\n")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), *command],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    try:
        found = await until(tmp_path, 4)
        run.send_signal(how)
        run.wait(120)
        assert await gone(*found)
    finally:
        run.kill()
        run.wait()


async def test_a_fork_server_that_is_lost_is_started_again(tmp_path: Path) -> None:
    """Its programs die with it, their rollouts are tried again."""
    text = (
        f"{FAMILY}def agent(task):\n    family()\n    ask('?')\n    time.sleep(len(PIDS()) < 4)\n"
    )
    text += "    while len(PIDS()) < 4:\n        time.sleep(0.05)\n    return 1\n"
    text += "def PIDS():\n    return open('pids').read().split()\n"
    program(tmp_path, text)
    settings: dict[str, Any] = {
        "function": f"{tmp_path}/agent.py:agent",
        "working_dir": str(tmp_path),
    }
    async with Stage([ANSWER] * 2, retries=1, **settings) as stage:
        rollout = asyncio.ensure_future(stage.play())
        found = await until(tmp_path, 2)
        programs = stage.world.service._programs
        assert programs is not None and programs._process is not None
        programs._process.kill()
        made = await rollout
        assert [f.kind for f in made.failures] == ["environment"]
        assert made.error is None and made.env_rewards == [1.0]
        assert await gone(*found)


async def test_descriptors_and_sessions_are_given_back(tmp_path: Path) -> None:
    """Of this process and of the fork server, over rollouts that end in every way."""
    text = (
        "def agent(task):\n"
        "    ask('?')\n"
        "    if task['metadata']['n'] == 1:\n"
        "        sys.exit(1)\n"
        "    if task['metadata']['n'] == 2:\n"
        "        time.sleep(60)\n"
        "    return 1\n"
    )
    program(tmp_path, text)
    settings: dict[str, Any] = {
        "function": f"{tmp_path}/agent.py:agent",
        "timeout_s": 1.0,
        "on_failure": "score",
    }

    async def round_of(stage: Stage, number: int) -> None:
        tasks = [Task(f"{number}.{n}", (user("?"),), metadata={"n": n}) for n in range(8)]
        rollouts = await asyncio.gather(*map(stage.play, tasks))
        assert [r.env_rewards for r in rollouts] == [[1.0], [0.0], [0.0], *[[1.0]] * 5]

    def held() -> tuple[int, int]:
        programs = stage.world.service._programs
        assert programs is not None and programs._process is not None
        return len(os.listdir("/proc/self/fd")), len(
            os.listdir(f"/proc/{programs._process.pid}/fd")
        )

    before = len(os.listdir("/proc/self/fd"))
    async with Stage([ANSWER] * 100, **settings) as stage:
        await round_of(stage, 0)
        await asyncio.sleep(0.2)
        first = held()
        for number in range(1, 5):
            await round_of(stage, number)
        await asyncio.sleep(0.2)
        assert held() == first
        assert len(stage.world.service._seats) == 0
    await asyncio.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_task_costs_a_fork_not_an_import(tmp_path: Path) -> None:
    """The module is imported once, and what its import left in memory is there for each."""
    text = (
        "time.sleep(1.5)\nIMPORTED_BY = os.getpid()\nCALLS = []\n"
        "def agent(task):\n"
        "    ask('?')\n"
        "    CALLS.append(1)\n"
        "    return {'by': IMPORTED_BY, 'calls': len(CALLS)}\n"
    )
    program(tmp_path, text)
    async with Stage([ANSWER] * 20, function=f"{tmp_path}/agent.py:agent") as stage:
        first = await stage.play()
        began = time.monotonic()
        rollouts = [await stage.play(sample=n) for n in range(1, 11)]
        assert time.monotonic() - began < 10 * 1.5
    assert {r.metrics["external/by"] for r in rollouts} == {first.metrics["external/by"]}
    assert {r.metrics["external/calls"] for r in rollouts} == {1.0}


async def test_a_client_that_is_made_by_the_import(tmp_path: Path) -> None:
    """It asks nobody else and is refused; without `preload` it asks for its task."""
    text = (
        "URL, KEY = os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY']\n"
        "def agent(task):\n"
        "    os.environ |= {'OPENAI_BASE_URL': URL, 'OPENAI_API_KEY': KEY}\n"
        "    ask('?')\n"
        "    return 1\n"
    )
    program(tmp_path, text)
    function = f"{tmp_path}/agent.py:agent"
    async with Stage([ANSWER], function=function) as stage:
        with pytest.raises(UserError, match=r"(?s)without asking.*401"):
            await stage.play()
    async with Stage([ANSWER], function=function, preload=False) as stage:
        assert (await stage.play()).env_rewards == [1.0]
