"""What hostile code could do to the host's side of the jail, and to the sessions after it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from retrain.sandbox.base import Result, SandboxUnavailable
from retrain.sandbox.jail.sandbox import JailSandbox
from sandbox_attacks.machine import alive, children, kill, started, zygotes
from sandbox_attacks.poison import FINGERPRINT, POISON
from sandbox_attacks.talk import NONCE

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="the jail is for Linux"),
]

_FILL = """
import os
written = 0
try:
    for i in range(10**5):
        fd = os.open(f"f{i}", os.O_WRONLY | os.O_CREAT)
        if i > 50:
            os.close(fd)
            continue
        while os.write(fd, bytes(2**20)): written += 2**20
except OSError as error:
    print(type(error).__name__)
"""
_ASK = """
import threading
threading.stack_size(65536)
def ask():
    while True:
        try: threading.Thread(target=int).start()
        except RuntimeError: pass
for _ in range(6): threading.Thread(target=ask, daemon=True).start()
ask()
"""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def jail() -> AsyncIterator[JailSandbox]:
    sandbox = JailSandbox(timeout_s=1.0, memory_mb=96, max_output_chars=50_000)
    try:
        yield await started(sandbox)
    finally:
        await sandbox.close()


@pytest_asyncio.fixture(loop_scope="module")
async def own_jail() -> AsyncIterator[JailSandbox]:
    """One that a test may break; one call at a time."""
    sandbox = JailSandbox(timeout_s=1.0, memory_mb=96, packages=(), max_concurrency=1)
    try:
        yield await started(sandbox)
    finally:
        await sandbox.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def writable() -> AsyncIterator[JailSandbox]:
    sandbox = JailSandbox(timeout_s=2.0, memory_mb=48, packages=(), writable=True)
    try:
        yield await started(sandbox)
    finally:
        await sandbox.close()


async def once(sandbox: JailSandbox, code: str) -> Result:
    session = await sandbox.session()
    try:
        return await session.run(code)
    finally:
        await session.close()


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        await asyncio.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("name", POISON)
async def test_nothing_of_a_session_is_left_for_the_next(jail: JailSandbox, name: str) -> None:
    expected = json.loads((await once(jail, FINGERPRINT)).stdout)
    poisoned = await jail.session()
    neighbour = await jail.session()
    await poisoned.run(POISON[name])
    assert json.loads((await neighbour.run(FINGERPRINT)).stdout) == expected
    await poisoned.close()
    await neighbour.close()
    assert json.loads((await once(jail, FINGERPRINT)).stdout) == expected


async def test_the_zygote_killed_under_a_call(own_jail: JailSandbox) -> None:
    zygote = zygotes()[-1]
    running, waiting, stopped = [await own_jail.session() for _ in range(3)]
    await stopped.run("x = 1")
    processes = children(zygote)
    assert len(processes) == 3
    calls = [asyncio.create_task(s.run("while True: pass")) for s in (running, waiting)]
    await asyncio.sleep(0.1)
    kill(zygote)
    for outcome in await asyncio.gather(*calls, stopped.run("x"), return_exceptions=True):
        assert isinstance(outcome, SandboxUnavailable)
    assert (await once(own_jail, "6 * 7")).stdout == "42\n"
    await eventually(lambda: not any(map(alive, processes)))


async def test_the_host_waits_for_no_zygote_that_is_stopped(own_jail: JailSandbox) -> None:
    zygote = zygotes()[-1]
    session = await own_jail.session()
    os.kill(zygote, 19)
    try:
        result = await asyncio.wait_for(session.run("while True: pass"), 3)
        assert result.status == "timeout"
    finally:
        os.kill(zygote, 18)
    await session.close()
    assert (await once(own_jail, "1")).stdout == "1\n"


async def test_a_session_closed_while_its_call_waits_its_turn(own_jail: JailSandbox) -> None:
    first, second = await own_jail.session(), await own_jail.session()
    running = asyncio.create_task(first.run("import time; time.sleep(0.3)"))
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(second.run("1"))
    await asyncio.sleep(0.05)
    await second.close()
    assert (await running).status == "ok"
    assert (await waiting).status == "killed"
    await first.close()


async def test_a_session_closed_while_it_takes_no_code(own_jail: JailSandbox) -> None:
    """It answered with the right nonce, and has not read since."""
    session = await own_jail.session()
    assert (await session.run(f"import os\n{NONCE}say()\nwhile True: pass")).status == "ok"
    sending = asyncio.create_task(session.run("x = 1\n" * 60_000))
    await asyncio.sleep(0.2)
    await session.close()
    assert (await asyncio.wait_for(sending, 4)).status == "killed"
    assert (await once(own_jail, "1")).stdout == "1\n"


async def test_code_that_is_never_read_runs_out_of_time(own_jail: JailSandbox) -> None:
    session = await own_jail.session()
    await session.run(f"import os\n{NONCE}say()\nwhile True: pass")
    result = await asyncio.wait_for(session.run("x = 1\n" * 60_000), 4)
    assert result.status == "timeout"
    await session.close()


async def test_a_cancelled_call_leaves_no_process(own_jail: JailSandbox) -> None:
    session = await own_jail.session()
    running = asyncio.create_task(session.run("while True: pass"))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: not children(zygotes()[-1]))
    assert (await session.run("1")).status == "killed"
    assert (await once(own_jail, "1")).stdout == "1\n"


async def test_questions_to_the_zygote_keep_nobody_waiting(jail: JailSandbox) -> None:
    flooding = [await jail.session() for _ in range(4)]
    calls = [asyncio.create_task(session.run(_ASK)) for session in flooding]
    await asyncio.sleep(0.1)
    start = time.perf_counter()
    assert (
        await once(
            jail,
            "import threading\nt = threading.Thread(target=print, args=(5,))\nt.start(); t.join()",
        )
    ).stdout == "5\n"
    assert time.perf_counter() - start < 2.0
    assert {(await call).status for call in calls} == {"timeout"}
    for session in flooding:
        await session.close()


async def test_burning_sessions_all_stop_in_time(jail: JailSandbox) -> None:
    burn = (
        "import threading\nthreading.stack_size(65536)\ndef burn():\n  while True: pass\n"
        "for _ in range(12): threading.Thread(target=burn, daemon=True).start()\nburn()"
    )
    start = time.perf_counter()
    results = await asyncio.gather(*(once(jail, burn) for _ in range(6)))
    assert {result.status for result in results} == {"timeout"}
    assert time.perf_counter() - start < 4.0


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("x = 1\n" * 10**6, "error"),
        ("#" * 399_990, "ok"),
        ("print(1)\0print(2)", "error"),
        ("'\ud800'", "error"),
        ("\ufeff" * 9, "error"),
        ("# -*- coding: utf-7 -*-\n+AGkAbgB0-", "error"),
        ("\x0c\r\v\x1a", "error"),
        ("(" * 90_000, "error"),
        ("-" * 90_000 + "1", ("error", "memory", "killed")),
        ("a." * 90_000 + "b", ("error", "memory", "killed")),
        ("x = " + "[" * 199 + "]" * 199, "ok"),
        ("1 if 1 else " * 40_000 + "1", ("error", "memory", "killed")),
        ("9" * 399_990, "error"),
    ],
    ids=range(13),
)
async def test_code_as_no_one_writes_it(
    jail: JailSandbox, code: str, status: str | tuple[str, ...]
) -> None:
    result = await once(jail, code)
    assert result.status in ((status,) if isinstance(status, str) else status), result.error[-300:]


async def test_every_way_to_end_gives_back_descriptors_and_processes(jail: JailSandbox) -> None:
    zygote = zygotes()[0]

    def held() -> tuple[int, int]:
        theirs = Path(f"/proc/{zygote}/fd")
        return len(os.listdir("/proc/self/fd")), len(os.listdir(theirs)) if _may_list(theirs) else 0

    ends = (
        "1",
        "1/0",
        "raise SystemExit",
        "import os; os._exit(1)",
        "import os; os.close(3)",
        "import os; os.write(3, b'x' * 99)",
        "import ctypes; ctypes.string_at(0)",
        "x = [0] * 10**10",
        f"import os\n{NONCE}say()\nos.close(3)",
        "import threading; threading.Thread(target=int).start(); import os; os._exit(1)",
    )
    await once(jail, "1")
    await eventually(lambda: not children(zygote))
    before = held()
    for code in ends * 2:
        await once(jail, code)
    await eventually(lambda: not children(zygote) and held() == before)


def _may_list(path: Path) -> bool:
    return os.access(path, os.R_OK | os.X_OK)


async def test_a_file_that_is_given_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("given")
    sandbox = JailSandbox(
        timeout_s=2.0, packages=(), files={"data.txt": str(tmp_path / "data.txt")}
    )
    try:
        await started(sandbox)
        tried = """
import os
for attempt in (lambda: open("data.txt", "r+"), lambda: os.unlink("data.txt"),
                lambda: os.rename("data.txt", "x"), lambda: os.chmod("data.txt", 0),
                lambda: open("new", "w"), lambda: os.truncate("data.txt", 0),
                lambda: os.rmdir(os.getcwd()), lambda: os.symlink("data.txt", "link")):
    try: attempt(); print("BREACH")
    except OSError: pass
"""
        assert (await once(sandbox, tried)).stdout == ""
        read = await once(sandbox, "import os; print(os.listdir('.'), open('data.txt').read())")
        assert read.stdout == "['data.txt'] given\n"
    finally:
        await sandbox.close()
    assert (tmp_path / "data.txt").read_text() == "given"


async def test_a_full_file_system_is_the_sessions_own(writable: JailSandbox) -> None:
    outside = _names_outside()
    session, neighbour = await writable.session(), await writable.session()
    filled = await session.run(_FILL)
    assert (filled.status, filled.stdout) == ("ok", "OSError\n")
    assert (await session.run("written <= 48 * 2**20, len(os.listdir('.')) <= 4096")).stdout == (
        "(True, True)\n"
    )
    assert _names_outside() == outside
    made = "open('a', 'w').write('b'); import os; os.listdir('.')"
    assert (await neighbour.run(made)).stdout == "['a']\n"
    await session.close()
    assert (await once(writable, "import os; os.listdir('.')")).stdout == "[]\n"
    await neighbour.close()


async def test_no_link_device_or_mode_in_a_writable_session(writable: JailSandbox) -> None:
    tried = """
import os, socket
open("a", "w").close()
for attempt in (lambda: os.symlink("/etc/passwd", "b"), lambda: os.link("a", "c"),
                lambda: os.mkfifo("d"), lambda: os.mknod("e", 0o20666, os.makedev(1, 1)),
                lambda: os.chmod("a", 0o4777), lambda: os.setxattr("a", "user.x", b"1"),
                lambda: os.execv("a", ["a"]), lambda: os.fork(), lambda: os.chroot("."),
                lambda: os.rename("a", "../a"), lambda: open("../x", "w"),
                lambda: open("/etc/passwd"), lambda: os.listdir("/"),
                lambda: os.rmdir(os.getcwd()), lambda: os.open("/proc/self/mem", os.O_RDWR)):
    try: print("BREACH", attempt())
    except OSError: pass
"""
    result = await once(writable, tried)
    assert (result.status, result.stdout) == ("ok", "")


def _names_outside() -> list[list[str]]:
    places = ("/tmp", "/var/tmp", "/mnt", "/srv")
    return [
        sorted(n for n in os.listdir(p) if n[:1] in "af" and n[1:].isdigit())
        for p in places
        if os.path.isdir(p)
    ]
