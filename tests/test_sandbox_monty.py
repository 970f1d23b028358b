"""What is Monty's own; the rest is in test_sandbox_contract.py."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from retrain.sandbox import MontySandbox
from retrain.sandbox.base import ALIVE
from retrain.sandbox.monty import return_last_expression
from retrain.sandbox.output import BoundedText, cut_middle


@pytest.fixture
async def sandbox() -> AsyncIterator[MontySandbox]:
    sandbox = MontySandbox(timeout_s=1.0, memory_mb=64, max_output_chars=200)
    yield sandbox
    await sandbox.close()


async def test_the_value_of_the_last_call_has_a_name(sandbox: MontySandbox) -> None:
    session = await sandbox.session()
    await session.run("42")
    assert (await session.run("_ + 1")).stdout == "43\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("try:\n  while True: pass\nexcept BaseException: pass", "timeout"),
        ("x = [1] * 10**9", "memory"),
        ("x = []\nwhile True: x.append('a' * 1000)", "memory"),
        ("x = []\nfor i in range(40): x = [x, x]\nx", ("memory", "timeout")),
        ("x = []\nfor i in range(40): x = [x, x]\ndef repr(v): return x\nx", ("memory", "timeout")),
        ("open('/etc/passwd').read()", "error"),
        ("open('/tmp/retrain-probe', 'w')", "error"),
        ("import os\nos.system('id')", "error"),
        ("import os\nos.environ", "error"),
        ("import socket", "error"),
        ("(" * 5000, "error"),
        ("-" * 90_000 + "1", "error"),
        ("x" * 200_000, "error"),
        ("'\ud800'", "error"),
        ("def f(): return f()\nf()", "error"),
        ("raise SystemExit", "exit"),
    ],
)
async def test_hostile_code_is_contained(
    sandbox: MontySandbox, code: str, status: str | tuple[str, ...]
) -> None:
    session = await sandbox.session()
    start = time.perf_counter()
    result = await session.run(code)
    assert result.status in ((status,) if isinstance(status, str) else status)
    assert result.error
    assert time.perf_counter() - start < 5
    after = await session.run("1")
    assert after.status == ("ok" if result.status in ALIVE else "killed")
    assert (await (await sandbox.session()).run("1")).stdout == "1\n"


async def test_output_is_bounded_while_it_is_printed(sandbox: MontySandbox) -> None:
    result = await (await sandbox.session()).run(
        "print('start')\nfor i in range(10**4): print('a' * 100)\nprint('end')"
    )
    assert result.status == "ok" and result.truncated
    assert result.stdout.startswith("start\n") and result.stdout.endswith("end\n")
    left_out = 6 + 10**4 * 101 + 4 - 200
    assert f"[{left_out} characters left out]" in result.stdout
    long_value = await (await sandbox.session()).run("'b' * 1000")
    assert long_value.truncated and f"[{1003 - 200} characters" in long_value.stdout


async def test_an_error_is_bounded(sandbox: MontySandbox) -> None:
    result = await (await sandbox.session()).run("raise ValueError('a' * 10**6)")
    assert result.status == "error" and "characters left out" in result.error
    assert len(result.error) < 300


async def test_code_never_blocks_the_event_loop(sandbox: MontySandbox) -> None:
    session = await sandbox.session()
    running = asyncio.create_task(session.run("while True: print('x')"))
    worst = 0.0
    while not running.done():
        start = time.perf_counter()
        await asyncio.sleep(0.005)
        worst = max(worst, time.perf_counter() - start)
    assert (await running).status == "timeout"
    assert worst < 0.5


async def test_missing_features_are_explained(sandbox: MontySandbox) -> None:
    session = await sandbox.session()
    numpy = (await (await MontySandbox().session()).run("import numpy")).error
    assert "No module named 'numpy' (this Python has only: asyncio, base64" in numpy
    generator = (await session.run("def f():\n    yield 1")).error
    assert generator.endswith("this Python does not support yield expressions")


async def test_sleep_is_free_and_random_is_seeded(sandbox: MontySandbox) -> None:
    code = "import random, time\ntime.sleep(100)\nrandom.random()"
    first = await (await sandbox.session()).run(code)
    second = await (await sandbox.session()).run(code)
    assert first.stdout == second.stdout and first.wall_s < 1


async def test_a_common_call_is_fast(sandbox: MontySandbox) -> None:
    session = await sandbox.session()
    times = [(await session.run("17*23 + 4")).wall_s for _ in range(100)]
    assert statistics.median(times) < 0.01  # 0.4 ms on an idle machine


def test_the_interpreter_ends_cleanly_after_a_worker_died() -> None:
    script = (
        "import asyncio\nfrom retrain.sandbox import MontySandbox\n"
        "async def main():\n"
        "    sandbox = MontySandbox(memory_mb=32)\n"
        "    await (await sandbox.session()).run('1')\n"
        "    bomb = 'x=[]\\nfor i in range(40): x=[x,x]\\nx'\n"
        "    print((await (await sandbox.session()).run(bomb)).status)\n"
        "    await sandbox.close()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "memory\n")


def test_the_rewrite_keeps_lines_and_returns_a_bounded_string() -> None:
    changed = return_last_expression("x = 1\n(x +\n 1)  # é\n", 10)
    assert changed.splitlines()[:3] == ["x = 1", "_ = ((x +", " 1))  # é"]
    assert return_last_expression("x = (", 10) == "x = (\nNone"


def test_cut_middle_keeps_both_ends_and_counts_the_rest() -> None:
    assert cut_middle("abcdefghij", 4) == "ab\n... [6 characters left out] ...\nij"
    assert cut_middle("abcdefghij", 5) == "abc\n... [5 characters left out] ...\nij"
    assert cut_middle("abcd", 4) == "abcd"


@pytest.mark.parametrize("size", [1, 3, 7, 26])
def test_bounded_text_equals_cutting_the_whole(size: int) -> None:
    whole = "abcdefghijklmnopqrstuvwxyz"
    for limit in (1, 2, 5, 25, 26, 30):
        text = BoundedText(limit)
        for start in range(0, len(whole), size):
            text.write(whole[start : start + size])
        assert text.text() == cut_middle(whole, limit)
        assert text.truncated == (limit < 26)
