"""What the sandboxes cost: calls, fresh sessions, start-up, memory; and whether they leak.

    python benchmarks/sandbox.py [--sessions 10000] [--rounds 5]

The jail with numpy and sympy loaded, the jail without packages, and Monty. A fresh session is:
open it, run `1 + 1`, close it. Its rate is compared, in alternating rounds, with that of plain
interpreters (`python -c pass`, fork and exec), one at a time and four at once. Then sessions run
in a row, and what processes, descriptors and memory that leaves behind is counted. Exits with 1
when a bound below is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import time
from pathlib import Path
from statistics import median, quantiles

from retrain.sandbox import JailSandbox, MontySandbox, Sandbox

IN_FLIGHT = 64
FRESH, PLAIN = 300, 60
"""Sessions and interpreters of one round."""


async def fresh(sandbox: Sandbox) -> float:
    """Milliseconds of one session with one call."""
    start = time.perf_counter()
    session = await sandbox.session()
    result = await session.run("1 + 1")
    await session.close()
    if result.stdout != "2\n":
        raise RuntimeError(f"unexpected result: {result}")
    return 1000 * (time.perf_counter() - start)


async def plain() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "pass", stdin=asyncio.subprocess.DEVNULL
    )
    await process.wait()


async def rate(work, count: int, at_once: int) -> float:  # type: ignore[no-untyped-def]
    """How many a second."""

    async def worker() -> None:
        for _ in range(count // at_once):
            await work()

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count / (time.perf_counter() - start)


async def calls_in_one_session(sandbox: Sandbox) -> list[float]:
    session = await sandbox.session()
    times = [1000 * (await session.run("1 + 1")).wall_s for _ in range(1000)]
    await session.close()
    return times


async def calls_in_flight(sandbox: Sandbox) -> float:
    """Calls a second with IN_FLIGHT open sessions that all call without pause."""
    sessions = await asyncio.gather(*(sandbox.session() for _ in range(IN_FLIGHT)))

    async def keep_calling(session) -> None:  # type: ignore[no-untyped-def]
        for _ in range(100):
            await session.run("1 + 1")

    start = time.perf_counter()
    await asyncio.gather(*map(keep_calling, sessions))
    seconds = time.perf_counter() - start
    await asyncio.gather(*(session.close() for session in sessions))
    return 100 * IN_FLIGHT / seconds


def field(process: int, name: str, file: str = "smaps_rollup") -> int:
    """Kilobytes, as /proc says."""
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


async def idle_memory(sandbox: Sandbox) -> float:
    """Private dirty megabytes of a session that has made a call, median of 20."""
    sessions = [await sandbox.session() for _ in range(20)]
    for session in sessions:
        await session.run("1 + 1")
    [zygote] = children(os.getpid())
    dirty = median(field(process, "Private_Dirty") for process in children(zygote))
    for session in sessions:
        await session.close()
    return dirty / 1024


async def leaks(sandbox: Sandbox, count: int) -> dict[str, tuple[float, float]]:
    """What there is before and after `count` sessions in a row, by what."""

    async def measure() -> dict[str, float]:
        await asyncio.sleep(0.2)
        gc.collect()
        [zygote] = children(os.getpid())
        return {
            "processes below the zygote": len(children(zygote)),
            "descriptors here": len(os.listdir("/proc/self/fd")),
            "descriptors of the zygote": len(os.listdir(f"/proc/{zygote}/fd")),
            "resident MB here": field(os.getpid(), "VmRSS", "status") / 1024,
            "resident MB of the zygote": field(zygote, "VmRSS", "status") / 1024,
        }

    for _ in range(200):
        await fresh(sandbox)
    before = await measure()
    for _ in range(count):
        await fresh(sandbox)
    after = await measure()
    return {name: (before[name], after[name]) for name in before}


async def measure_executor(name: str, sandbox: Sandbox, rounds: int) -> dict[str, float]:
    start = time.perf_counter()
    await sandbox.start()
    figures = {"start-up, s": time.perf_counter() - start}
    times = await calls_in_one_session(sandbox)
    figures["call p50, ms"], figures["call p99, ms"] = median(times), quantiles(times, n=100)[98]
    times = [await fresh(sandbox) for _ in range(FRESH)]
    figures["fresh p50, ms"], figures["fresh p99, ms"] = median(times), quantiles(times, n=100)[98]
    for at_once in (1, 4):
        pairs = [
            (await rate(lambda: fresh(sandbox), FRESH, at_once), await rate(plain, PLAIN, at_once))
            for _ in range(rounds)
        ]
        figures[f"fresh/s, {at_once} at once"] = median(ours for ours, _ in pairs)
        figures[f"plain/s, {at_once} at once"] = median(theirs for _, theirs in pairs)
        ratio = median(ours / theirs for ours, theirs in pairs)
        figures[f"fresh / plain, {at_once} at once"] = ratio
    figures["calls/s"] = median([await calls_in_flight(sandbox) for _ in range(rounds)])
    if isinstance(sandbox, JailSandbox):
        figures["idle MB"] = await idle_memory(sandbox)
    print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    return figures


BOUNDS = {
    "start-up, s": lambda value: value < 1,
    "call p50, ms": lambda value: value <= 0.5,
    "fresh p50, ms": lambda value: value <= 10,
    "fresh / plain, 1 at once": lambda value: value >= 4,
    "fresh / plain, 4 at once": lambda value: value >= 4,
    "calls/s": lambda value: value >= 3000,
    "idle MB": lambda value: value <= 2,
}


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    jail = JailSandbox()
    figures = await measure_executor("jail", jail, arguments.rounds)
    missed = [name for name, holds in BOUNDS.items() if not holds(figures[name])]
    for what, (before, after) in (await leaks(jail, arguments.sessions)).items():
        print(f"  {what}: {before:.4g} -> {after:.4g} after {arguments.sessions} sessions")
        if after > before * 1.1:
            missed.append(what)
    await jail.close()
    bare = JailSandbox(packages=())
    await measure_executor("jail, no packages", bare, arguments.rounds)
    await bare.close()
    monty = MontySandbox()
    await measure_executor("monty", monty, arguments.rounds)
    await monty.close()
    print(f"bounds missed: {', '.join(missed) or 'none'}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
