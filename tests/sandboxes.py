"""Which sandboxes work on this machine, for the tests that need one."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from retrain.sandbox import JailSandbox
from retrain.sandbox.jail.inside.syscalls import MACHINES
from retrain.types import UserError


def can_jail() -> bool:
    """Whether this kernel has what the jail is made of: then a jail that fails is a failed test."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return False
    from retrain.sandbox.jail.inside.kernel import landlock_version  # Linux's calls only

    try:
        return landlock_version() > 0
    except OSError:
        return False


@cache
def why_not(**params: bool) -> str:
    """Empty where a jail with these parameters works."""

    async def attempt() -> str:
        sandbox = JailSandbox(packages=(), **params)
        try:
            await sandbox.start()
        except UserError as error:
            return str(error)
        finally:
            await sandbox.close()
        return ""

    with ThreadPoolExecutor(1) as elsewhere:  # the caller may have an event loop
        return elsewhere.submit(asyncio.run, attempt()).result()


def need_jail(**params: bool) -> None:
    """Skip the test where the kernel cannot jail, or lacks what `params` need beyond that."""
    if not can_jail():
        pytest.skip("this kernel has no Landlock, or the processor is unknown to the jail")
    if params and why_not(**params):
        pytest.skip(why_not(**params))


def descendants(process: int) -> list[int]:
    """Process ids below a process, those of other sessions included."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if after_name[0] != "Z":
                parents[int(entry.name)] = int(after_name[1])
    found: list[int] = []
    waiting = [process]
    while waiting:
        parent = waiting.pop()
        below = [child for child, above in parents.items() if above == parent]
        found += below
        waiting += below
    return found


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
