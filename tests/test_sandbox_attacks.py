"""The jail under attack: each is judged by what can be seen of it from outside.

Everything that could be harmed belongs to the test; no attack runs anywhere but in the jail.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from retrain.sandbox.base import ALIVE, Result, Session
from retrain.sandbox.jail.inside.syscalls import MACHINES, NUMBERS
from retrain.sandbox.jail.sandbox import JailSandbox
from sandbox_attacks import files, kernel_calls, processes, talk, time_and_memory
from sandbox_attacks.attack import PRELUDE, Attack
from sandbox_attacks.machine import (
    Machine,
    Peaks,
    children,
    field,
    megabytes,
    processor_ticks,
    started,
    zygotes,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="the jail is for Linux"),
]

TIMEOUT_S, MARGIN_S, MEMORY_MB = 0.8, 1.5, 96
MAX_OUTPUT_CHARS = 20_000
MOST_THREADS = 32
"""Twice the limit: several may be asked about at once."""
OTHERS_SOCKETS, OTHERS_SHARED_MB = 500, 96
"""What the rest of the machine may come to hold meanwhile: these two are counted machine-wide."""

FAMILIES = {
    "time": time_and_memory.TIME,
    "memory": time_and_memory.MEMORY,
    "forks": processes.FORKS,
    "signals": processes.SIGNALS,
    "others": processes.OTHERS,
    "reads": files.READS,
    "writes": files.WRITES,
    "descriptors": files.DESCRIPTORS,
    "sockets": files.SOCKETS,
    "kernel": kernel_calls.KERNEL,
    "values": talk.VALUES,
    "output": talk.OUTPUT,
    "protocol": talk.PROTOCOL,
}
ATTACKS = [
    pytest.param(attack, id=f"{family}: {attack.name}")
    for family, attacks in FAMILIES.items()
    for attack in attacks
]


@dataclass
class Arena:
    sandbox: JailSandbox
    machine: Machine
    bystander: Session
    """A session that attacks on others must not touch."""
    bystander_pid: int
    zygote: int
    names: str
    """Code that tells an attack what it may know."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def arena() -> AsyncIterator[Arena]:
    machine = Machine()
    sandbox = JailSandbox(
        timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB, max_output_chars=MAX_OUTPUT_CHARS
    )
    try:
        before = set(zygotes())
        await started(sandbox)
        (zygote,) = set(zygotes()) - before
        bystander = await sandbox.session()
        await bystander.run("mine = 42")
        column = MACHINES.index(os.uname().machine)
        named = sorted(n for row in NUMBERS.values() if (n := row[column]) is not None)
        (pid,) = children(zygote)
        yield Arena(sandbox, machine, bystander, pid, zygote, f"{machine.names()}NAMED = {named}\n")
    finally:
        await sandbox.close()
        machine.close()


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_attack_is_contained(arena: Arena, attack: Attack) -> None:
    if attack.name in kernel_calls.X86_ONLY and os.uname().machine != "x86_64":
        pytest.skip("another processor")
    await _only(arena.zygote, {arena.bystander_pid})
    session = await arena.sandbox.session()
    try:
        (pid,) = children(arena.zygote) - {arena.bystander_pid}
        result = await _under_watch(arena, session, attack)
        if attack.idle:
            await _stands_still(pid)
        if result.status in ALIVE:
            again = await session.run("1 + 1")
            assert again.stdout.endswith("2\n") or again.status != "ok"
    finally:
        await session.close()
    await _only(arena.zygote, {arena.bystander_pid})
    assert arena.machine.harm() == ""
    assert (await arena.bystander.run("mine")).stdout == "42\n"


async def _under_watch(arena: Arena, session: Session, attack: Attack) -> Result:
    with Peaks(arena.zygote) as peaks:
        running = asyncio.create_task(session.run(arena.names + PRELUDE + attack.code))
        start, worst_pause_s = time.perf_counter(), 0.0
        while not running.done():
            before = time.perf_counter()
            await asyncio.wait([running], timeout=0.05)
            worst_pause_s = max(worst_pause_s, time.perf_counter() - before - 0.05)
        wall_s = time.perf_counter() - start
    result = await running
    said = result.stdout + result.error
    assert result.status in attack.status, said[-2000:]
    assert "BREACH" not in said
    assert attack.shows in result.stdout
    assert arena.machine.secret not in said
    assert len(said) < 2 * MAX_OUTPUT_CHARS + 200
    assert wall_s < TIMEOUT_S + MARGIN_S
    assert worst_pause_s < MARGIN_S, "the event loop stood still"
    assert peaks.processes <= 2
    assert peaks.threads <= MOST_THREADS
    assert peaks.sockets < 64 + OTHERS_SOCKETS
    assert peaks.resident_mb < MEMORY_MB + megabytes(field("VmSize", arena.zygote)) + 16
    assert peaks.shared_mb < MEMORY_MB + OTHERS_SHARED_MB
    return result


async def _stands_still(pid: int) -> None:
    await asyncio.sleep(0.05)
    before = processor_ticks(pid)
    await asyncio.sleep(0.25)
    assert processor_ticks(pid) == before
    assert field("State", pid) == "T (stopped)"


async def _only(zygote: int, expected: set[int]) -> None:
    """Wait until the zygote has these children and no other."""
    for _ in range(200):
        if children(zygote) == expected:
            return
        await asyncio.sleep(0.01)
    assert children(zygote) == expected
