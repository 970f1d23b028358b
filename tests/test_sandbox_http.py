"""The HTTP sandbox, against a local server that runs what it is sent."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from retrain.sandbox.base import Result, Sandbox
from retrain.sandbox.http import server as server_module
from retrain.sandbox.http.answer import Answer, split_traceback
from retrain.sandbox.http.sandbox import HttpSandbox
from retrain.sandbox.last_expression import assign_last_expression
from run_code_server import RunCodeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunCodeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with RunCodeServer() as server:
        yield server


@pytest.fixture
async def sandbox(server: RunCodeServer) -> AsyncIterator[HttpSandbox]:
    sandbox = HttpSandbox(server.url, timeout_s=20.0, max_output_chars=200)
    await sandbox.start()
    yield sandbox
    await sandbox.close()


async def run(sandbox: Sandbox, code: str = "1") -> Result:
    session = await sandbox.session()
    try:
        return await session.run(code)
    finally:
        await session.close()


# What the code does


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
        ("def repr(x): return 'mine'\ndef print(*x): 1/0\n3;", "3\n"),
        ("from __future__ import annotations\nx = 1\r\nx\r\n", "1\n"),
        ("import sys\nsys.stderr.write('warned')\nprint('out', end='')", "out\nwarned"),
        ("import warnings\nwarnings.warn('old', stacklevel=1)\n'\\d'", None),
        ("", ""),
    ],
)
async def test_a_call_prints_and_ends_with_the_value(
    sandbox: HttpSandbox, code: str, stdout: str | None
) -> None:
    result = await run(sandbox, code)
    assert (result.status, result.error, result.truncated) == ("ok", "", False)
    assert stdout is None or result.stdout == stdout
    assert 0 < result.wall_s < 20


@pytest.mark.parametrize(
    ("code", "line", "last"),
    [
        ("print('before')\n1/0", "line 2", "ZeroDivisionError: division by zero"),
        ("print('before')\nx = 1\n(1 /\n 0)", "line 3", "ZeroDivisionError: division by zero"),
        ("print('before')\nraise KeyboardInterrupt", "line 2", "KeyboardInterrupt"),
        ("print('before')\nassert 0, 'a\\n\\nb'", "line 2", "AssertionError: a\n\nb"),
    ],
)
async def test_an_exception_is_shown_apart_from_what_was_printed(
    sandbox: HttpSandbox, code: str, line: str, last: str
) -> None:
    session = await sandbox.session()
    result = await session.run(code)
    assert (result.status, result.stdout) == ("error", "before\n")
    assert result.error.startswith("Traceback (most recent call last):")
    assert line in result.error and result.error.endswith(last)
    assert (await session.run("1")).status == "ok"


async def test_chained_tracebacks_stay_whole(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, timeout_s=20.0)
    code = (
        "import sys, traceback\n"
        "try: [][1]\n"
        "except IndexError: traceback.print_exc()\n"
        "try: int('a')\n"
        "except ValueError as e: raise KeyError('k') from e"
    )
    result = await run(sandbox, code)
    assert result.status == "error" and result.stdout.endswith(
        "IndexError: list index out of range\n"
    )
    assert "invalid literal for int" in result.error and result.error.endswith("KeyError: 'k'")
    assert result.error.count("Traceback") == 2 and result.stdout.count("Traceback") == 1
    group = await run(sandbox, "print(1)\nraise ExceptionGroup('many', [ValueError(7)])")
    assert group.status == "error" and group.stdout == "1\n" and "ValueError: 7" in group.error
    await sandbox.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = (\n", "SyntaxError: '(' was never closed"),
        ("if 1:\nx", "IndentationError: expected an indented block after 'if' statement on line 1"),
        ("return 1", "SyntaxError: 'return' outside function"),
        ("+".join(["1"] * 40_000), "RecursionError: maximum recursion depth exceeded"),
    ],
)
async def test_code_that_does_not_parse_reaches_the_server_unchanged(
    server: RunCodeServer, sandbox: HttpSandbox, code: str, error: str
) -> None:
    result = await run(sandbox, code)
    assert server.requests[-1]["code"] == code
    assert (result.status, result.stdout) == ("error", "")
    assert result.error.splitlines()[-1].startswith(error)


@pytest.mark.parametrize(
    ("code", "status", "stdout", "error"),
    [
        ("print(1)\nraise SystemExit(3)", "exit", "1\n", "SystemExit: 3"),
        ("import sys\nsys.exit('done')", "exit", "done\n", "SystemExit: 1"),
        ("import os\nos._exit(7)", "exit", "", "SystemExit: 7"),
        (
            "print('some')\nx = []\nwhile 1: x.append(bytearray(2**24))",
            "memory",
            "some\n",
            "MemoryError: the code used more memory than it may",
        ),
        ("import os\nos.kill(os.getpid(), 9)", "killed", "", "The process was killed (SIGKILL)"),
        ("import os\nos.abort()", "killed", "", "The process crashed (SIGABRT)."),
    ],
)
async def test_what_ends_a_session(
    sandbox: HttpSandbox, code: str, status: str, stdout: str, error: str
) -> None:
    session = await sandbox.session()
    result = await session.run(code)
    assert (result.status, result.stdout) == (status, stdout)
    assert result.error.startswith(error)
    after = await session.run("1")
    assert after.status == "killed" and after.error.startswith("This session is over: ")
    assert (await run(sandbox, "1")).stdout == "1\n"


async def test_a_time_out_keeps_what_was_printed(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, timeout_s=0.5)
    session = await sandbox.session()
    result = await session.run("print('some', flush=True)\nwhile True: pass")
    assert (result.status, result.stdout) == ("timeout", "some\n")
    assert result.error == "TimeoutError: the code ran longer than 0.5 s"
    asked = len(server.requests)
    assert "its time ran out" in (await session.run("1")).error
    assert len(server.requests) == asked
    await sandbox.close()


@pytest.mark.parametrize("code", ["'\ud800'", "x" * 100_001])
async def test_code_that_no_file_can_hold_is_the_models_fault(
    server: RunCodeServer, sandbox: HttpSandbox, code: str
) -> None:
    session = await sandbox.session()
    result = await session.run(code)
    assert result.status == "error" and result.error.startswith("SyntaxError: ")
    assert len(server.requests) == 1  # the self-test
    assert (await session.run("1")).status == "ok"


async def test_output_and_errors_are_cut_in_the_middle(sandbox: HttpSandbox) -> None:
    result = await run(sandbox, "print('a' * 150 + 'b' * 150)")
    assert result.truncated and "[101 characters left out]" in result.stdout
    assert result.stdout.startswith("a" * 100 + "\n") and result.stdout.endswith("b" * 99 + "\n")
    failed = await run(sandbox, "raise ValueError('c' * 10**5)")
    assert not failed.truncated and len(failed.error) < 300


async def test_nothing_lasts_from_call_to_call(sandbox: HttpSandbox) -> None:
    session = await sandbox.session()
    await session.run("x = 1\nopen('note', 'w').write('a')")
    assert "NameError" in (await session.run("x")).error
    assert (await session.run("import os\nos.path.exists('note')")).stdout == "False\n"
    assert sandbox.stateful is False and sandbox.capabilities.stateful is False


async def test_files_are_there(server: RunCodeServer, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000  # several chunks
    Path(tmp_path, "local.bin").write_bytes(data)
    sandbox = HttpSandbox(server.url, timeout_s=20.0, files={"data/a.bin": tmp_path / "local.bin"})
    Path(tmp_path, "local.bin").unlink()
    result = await run(sandbox, "len(open('data/a.bin', 'rb').read())")
    assert result.stdout == "1024000\n"
    assert server.requests[-1]["files"] == {"data/a.bin": base64.b64encode(data).decode()}
    await sandbox.close()


async def test_what_is_asked_for_is_sent(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, timeout_s=2.5, memory_mb=300)
    await run(sandbox, "x")
    assert server.requests[-1] == {
        "code": "_ = (x)\n__import__('sys').displayhook(_)",
        "language": "python",
        "run_timeout": 2.5,
        "memory_limit_MB": 300,
        "files": {},
    }
    await sandbox.close()


# Concurrency and resources


async def test_requests_in_flight_are_bounded_and_waiting_is_free(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, timeout_s=20.0, max_concurrency=2)
    await sandbox.start()
    server.finish(0, stdout="x")
    server.delay_s = 0.3
    start = time.perf_counter()
    results = await asyncio.gather(*(run(sandbox) for _ in range(6)))
    assert time.perf_counter() - start >= 0.9
    assert server.peak == 2
    assert max(result.wall_s for result in results) < 0.6
    await sandbox.close()


async def test_a_cancelled_call_ends_its_request_and_its_session(
    server: RunCodeServer, sandbox: HttpSandbox
) -> None:
    session = await sandbox.session()
    server.delay_s = 30.0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session.run("1"), 0.3)
    assert await asyncio.to_thread(server.hung_up.wait, 5)
    assert "a call was cancelled" in (await session.run("1")).error
    server.delay_s = 0.0
    assert (await run(sandbox, "1")).stdout == "1\n"


@pytest.mark.parametrize("whole", [False, True])
async def test_closing_ends_a_call_that_runs(
    server: RunCodeServer, sandbox: HttpSandbox, whole: bool
) -> None:
    session = await sandbox.session()
    server.delay_s = 30.0
    call = asyncio.create_task(session.run("1"))
    await asyncio.sleep(0.3)
    await asyncio.wait_for(sandbox.close() if whole else session.close(), 2)
    result = await asyncio.wait_for(call, 2)
    assert (result.status, result.error) == ("killed", "This session is over: it was closed.")
    await session.close()
    assert (await session.run("1")).status == "killed"
    assert await asyncio.to_thread(server.hung_up.wait, 5)


def test_one_sandbox_serves_several_event_loops(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, timeout_s=20.0)

    async def once() -> str:
        return (await run(sandbox, "1 + 1")).stdout

    async def at_once() -> list[str]:
        loops = (asyncio.to_thread(lambda: asyncio.run(once())) for _ in range(3))
        return await asyncio.gather(*loops, once())

    assert asyncio.run(once()) == asyncio.run(once()) == "2\n"
    assert asyncio.run(at_once()) == ["2\n"] * 4
    assert len(server.requests) == 1 + 6
    asyncio.run(sandbox.close())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.filterwarnings("error::ResourceWarning")
def test_nothing_is_left_open(server: RunCodeServer) -> None:
    def sockets() -> int:
        gc.collect()
        targets = []
        for name in os.listdir("/proc/self/fd"):
            try:
                targets.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                continue
        return sum(target.startswith("socket:") for target in targets)

    def settled(expected: int) -> bool:
        deadline = time.monotonic() + 5  # the server closes its side a moment later
        while sockets() > expected and time.monotonic() < deadline:
            time.sleep(0.02)
        return sockets() <= expected

    before = sockets()
    sandbox = HttpSandbox(server.url, timeout_s=20.0)

    async def use(close: bool) -> None:
        inside = sockets()
        await sandbox.start()
        server.finish(0, stdout="x")
        await asyncio.gather(*(run(sandbox) for _ in range(20)))
        server.body = b"{}"
        await asyncio.gather(*(run(sandbox) for _ in range(5)), return_exceptions=True)
        server.body, server.endless = None, True
        await run(sandbox)
        server.endless, server.delay_s = False, 30.0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run(sandbox), 0.2)
        server.delay_s = 0.0
        assert await asyncio.to_thread(settled, inside)
        if close:
            await sandbox.close()

    asyncio.run(use(close=False))
    assert settled(before)
    asyncio.run(use(close=True))
    assert settled(before)


# The parts


def test_the_last_expression_keeps_its_lines() -> None:
    changed = assign_last_expression("x = 1\n(x +\n 1)  # é\n")
    assert changed == "x = 1\n_ = ((x +\n 1))  # é\n"
    for code in ("x = 1", "", "x = (", "if x:\n  x", "'\ud800'", "\0", "(" * 5000, "-" * 90_000):
        assert assign_last_expression(code) is None


@pytest.mark.filterwarnings("error")
def test_a_warning_about_the_code_is_not_ours() -> None:
    assert assign_last_expression("'\\d'") == "_ = ('\\d')"
    assert assign_last_expression("1 is 1") == "_ = (1 is 1)"


def test_a_long_chain_is_split_in_linear_time() -> None:
    link = "Traceback (most recent call last):\nE\n\nDuring handling of the above exception, "
    link += "another exception occurred:\n\n"
    stderr = "first\n" + link * 20_000 + "Traceback (most recent call last):\nE: 1\n"
    start = time.perf_counter()
    before, traceback = split_traceback(Answer(1, stderr=stderr))
    assert before == "first\n" and traceback.endswith("E: 1")
    assert time.perf_counter() - start < 1


def test_a_traceback_that_was_handled_stays_in_the_output() -> None:
    stderr = "Traceback (most recent call last):\nE: 1\n"
    for code in (0, 2, -9, None):
        assert split_traceback(Answer(code, stderr=stderr)) == (stderr, "")
    assert split_traceback(Answer(1, stderr="x" + stderr)) == ("x" + stderr, "")


def test_the_request_is_json(tmp_path: Path) -> None:
    server = server_module.Server("http://host", {'"': "YQ=="}, memory_mb=1, max_concurrency=1)
    body = json.loads(b"".join(server._body('print("é")', 1.0)))
    assert body["code"] == 'print("é")' and body["files"] == {'"': "YQ=="}
