"""What every executor promises, and what each promises by its capabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from retrain.sandbox import HttpSandbox, JailSandbox, MontySandbox, Sandbox
from retrain.sandbox.base import Result, Status
from run_code_server import RunCodeServer
from sandboxes import need_jail

Make = Callable[..., Sandbox]


@pytest.fixture(params=["jail", "monty", "http"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds an executor with small limits."""
    with ExitStack() as closing:
        if request.param == "jail":
            need_jail()

            def make(**params: Any) -> Sandbox:
                return JailSandbox(**{"packages": (), **params})

        elif request.param == "monty":
            make = MontySandbox
        else:
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            server = closing.enter_context(RunCodeServer())

            def make(**params: Any) -> Sandbox:
                return HttpSandbox(server.url, **params)

        yield lambda **params: make(**{"timeout_s": 2.0, "max_output_chars": 200, **params})


@pytest.fixture
async def sandbox(make: Make) -> AsyncIterator[Sandbox]:
    sandbox = make()
    await sandbox.start()
    yield sandbox
    await sandbox.close()


async def run_all(sandbox: Sandbox, *codes: str) -> list[Result]:
    """One session's calls."""
    session = await sandbox.session()
    try:
        return [await session.run(code) for code in codes]
    finally:
        await session.close()


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("17*23 + 4", "395\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("x = 1", ""),
        ("None", ""),
        ("x = 2; x  # é🙂", "2\n"),
        ("[1,\n 2]", "[1, 2]\n"),
        ("*[1], 2", "(1, 2)\n"),
        ("def repr(x): return 'mine'\n3", "3\n"),
        ("", ""),
        ("# nothing", ""),
    ],
)
async def test_a_call_prints_and_ends_with_the_value(
    sandbox: Sandbox, code: str, stdout: str
) -> None:
    [result] = await run_all(sandbox, code)
    assert (result.status, result.stdout, result.error) == ("ok", stdout, "")
    assert result.wall_s > 0 and not result.truncated


async def test_an_error_says_what_and_where_and_keeps_the_session(sandbox: Sandbox) -> None:
    error, syntax, after = await run_all(
        sandbox, "print('before')\nx = 5\n1/0", "def f(:\n  pass", "6 * 7"
    )
    assert (error.status, error.stdout) == ("error", "before\n")
    assert error.error.startswith("Traceback (most recent call last):\n")
    assert "line 3" in error.error
    assert error.error.endswith("\nZeroDivisionError: division by zero")
    assert syntax.status == "error" and "SyntaxError" in syntax.error.splitlines()[-1]
    assert (after.status, after.stdout) == ("ok", "42\n")


ENDINGS: dict[str, tuple[str, tuple[Status, ...]]] = {
    "endless": ("while True:\n    pass", ("timeout",)),
    "swallows": ("while True:\n    try:\n        1/0\n    except BaseException: 1", ("timeout",)),
    "memory": ("x = [1] * 10**10", ("memory",)),
    "grows": ("x = []\nwhile True: x.append('a' * 100_000)", ("memory", "killed")),
    "exit": ("raise SystemExit('3')", ("exit",)),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
async def test_what_ends_a_session_is_named_and_the_next_call_is_told(
    sandbox: Sandbox, ending: tuple[str, tuple[Status, ...]]
) -> None:
    code, statuses = ending
    ended, after = await run_all(sandbox, code, "1")
    assert ended.status in statuses
    assert ended.error
    assert after.status == "killed" and after.error.startswith("This session is over: ")
    assert (await run_all(sandbox, "1"))[0].stdout == "1\n"


async def test_what_was_printed_before_a_time_out_is_kept(sandbox: Sandbox) -> None:
    [result] = await run_all(sandbox, "print('so far')\nwhile True:\n    pass")
    assert (result.status, result.stdout) == ("timeout", "so far\n")
    assert result.error == "TimeoutError: the code ran longer than 2 s"


async def test_output_and_errors_are_cut_in_the_middle(sandbox: Sandbox) -> None:
    long, loud = await run_all(
        sandbox,
        "print('start')\nprint('a' * 1000)\nprint('end')",
        "raise ValueError('b' * 10_000)",
    )
    assert long.status == "ok" and long.truncated
    assert long.stdout.startswith("start\n") and long.stdout.endswith("end\n")
    assert f"[{6 + 1001 + 4 - 200} characters left out]" in long.stdout
    assert loud.status == "error" and len(loud.error) < 300
    assert "characters left out" in loud.error


async def test_sessions_do_not_see_one_another(sandbox: Sandbox) -> None:
    first, second = await sandbox.session(), await sandbox.session()
    await first.run("import math\nmath.pi = 3\nx = 1")
    seen = await second.run("import math\nprint(math.pi)\nx")
    assert seen.stdout == "3.141592653589793\n"
    assert "NameError: name 'x' is not defined" in seen.error
    await first.close()
    await second.close()
    await second.close()
    assert (await first.run("1")).error == "This session is over: it was closed."


async def test_a_cancelled_call_ends_the_session_at_once(sandbox: Sandbox) -> None:
    session = await sandbox.session()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session.run("while True:\n    pass"), 0.3)
    assert (await session.run("1")).status == "killed"
    await asyncio.wait_for(session.close(), 2)


@pytest.mark.parametrize("code", ["x" * 500_000, "'\ud800'", "(" * 5000, "x = '\n"])
async def test_code_that_is_no_code_is_an_error(sandbox: Sandbox, code: str) -> None:
    bad, after = await run_all(sandbox, code, "1")
    assert bad.status == "error" and bad.error
    assert after.stdout == "1\n"


async def test_waiting_for_a_turn_is_not_counted_in_the_time_out(make: Make) -> None:
    """Six calls of 0.25 s, one at a time, each allowed a second."""
    sandbox = make(max_concurrency=1, timeout_s=1.0)
    await sandbox.start()
    code = "import time\nend = time.monotonic() + 0.25\nwhile time.monotonic() < end: pass\n'done'"
    results = await asyncio.gather(*(run_all(sandbox, code) for _ in range(6)))
    assert [result.stdout for [result] in results] == ["'done'\n"] * 6
    assert all(result.wall_s < 1 for [result] in results)
    await sandbox.close()


async def test_many_sessions_wait_side_by_side(sandbox: Sandbox) -> None:
    results = await asyncio.gather(*(run_all(sandbox, f"{n} * 2") for n in range(100)))
    assert [result.stdout for [result] in results] == [f"{n * 2}\n" for n in range(100)]


async def test_the_sandbox_can_be_used_again_after_it_was_closed(sandbox: Sandbox) -> None:
    session = await sandbox.session()
    await sandbox.close()
    await session.close()
    assert (await run_all(sandbox, "1 + 1"))[0].stdout == "2\n"


def test_one_sandbox_serves_several_event_loops(make: Make) -> None:
    sandbox = make()

    async def once() -> str:
        [result] = await run_all(sandbox, "1 + 1")
        return result.stdout

    assert [asyncio.run(once()) for _ in range(3)] == ["2\n"] * 3
    asyncio.run(sandbox.close())


# What only some can do


async def test_state_lasts_where_it_is_promised(sandbox: Sandbox) -> None:
    _, second = await run_all(sandbox, "x = 40\ndef f(a): return a + 2", "print(f(x))\n_ = x")
    if sandbox.capabilities.stateful:
        assert second.stdout == "42\n"
    else:
        assert "NameError" in second.error


FULL_PYTHON = {
    "inheritance": "class A:\n  pass\nclass B(A):\n  pass\nB.__mro__[1].__name__",
    "generators": "def g():\n  yield from range(3)\nlist(g())",
    "modules": "import fractions, statistics, heapq, string\nstatistics.mean([1, 2])",
    "asyncio": "import asyncio\nasync def f():\n  return 1\nasyncio.run(f())",
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nlist(T(4).map(abs, [-1]))",
    "regex": "import re\nre.sub(r'(a)(?=b)', r'<\\1>', 'ab')",
    "pickle": "import pickle\npickle.loads(pickle.dumps({1: [2]}))",
    "with": "import contextlib\nwith contextlib.suppress(KeyError): {}[1]",
    "decimal": "from decimal import *\ngetcontext().prec = 5\nDecimal(1) / 3",
    "sqlite": "import sqlite3\nsqlite3.connect(':memory:').execute('select 1 + 1').fetchone()",
    "zone": "import zoneinfo, datetime\ndatetime.datetime(2020, 1, 1).year",
    "match": "match [1, 2]:\n  case [a, b]:\n    print(a + b)",
    "pickled class": "import pickle\nclass P:\n  x = 3\npickle.loads(pickle.dumps(P())).x",
    "ctypes": "import ctypes\nctypes.sizeof(ctypes.c_int)",
    "input": "try:\n  input()\nexcept EOFError:\n  print('no input')",
}


@pytest.mark.parametrize("code", FULL_PYTHON.values(), ids=FULL_PYTHON.keys())
async def test_full_python_is_full(sandbox: Sandbox, code: str) -> None:
    [result] = await run_all(sandbox, code)
    if sandbox.capabilities.full_python:
        assert (result.status, result.error) == ("ok", "")
    elif result.status != "ok":
        assert result.status == "error" and result.error


async def test_a_subset_of_python_says_what_it_lacks(sandbox: Sandbox) -> None:
    if sandbox.capabilities.full_python:
        pytest.skip("lacks nothing")
    for code in (FULL_PYTHON["inheritance"], FULL_PYTHON["generators"]):
        [result] = await run_all(sandbox, code)
        assert "this Python does not support" in result.error


async def test_files_are_there_where_they_are_promised(make: Make, tmp_path: Path) -> None:
    (tmp_path / "local.csv").write_text("a,b\n1,2\n")
    if not make().capabilities.files:
        pytest.skip("promises none")
    sandbox = make(files={"data/table.csv": str(tmp_path / "local.csv")})
    await sandbox.start()
    [result] = await run_all(sandbox, "open('data/table.csv').read()")
    assert result.stdout == "'a,b\\n1,2\\n'\n"
    await sandbox.close()


async def test_packages_can_be_imported_where_they_are_promised(make: Make) -> None:
    try:
        sandbox = make(packages=("numpy",))
    except TypeError:
        [result] = await run_all(make(max_output_chars=1000), "import numpy")
        assert "(this Python has only: " in result.error
        return
    assert sandbox.capabilities.packages == ("numpy",)
    [result] = await run_all(sandbox, "import numpy\nint(numpy.arange(5).sum())")
    assert result.stdout == "10\n"
    await sandbox.close()
