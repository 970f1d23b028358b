"""The jail's own promises: one zygote, sessions that leave nothing behind, what may be read."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from retrain.sandbox import JailSandbox, SandboxUnavailable, make_sandbox
from retrain.sandbox.jail.session import JailSession
from retrain.types import UserError
from sandboxes import descendants, is_running, need_jail, open_descriptors


@pytest.fixture
async def sandbox() -> AsyncIterator[JailSandbox]:
    need_jail()
    sandbox = JailSandbox(timeout_s=5.0, packages=())
    yield sandbox
    await sandbox.close()


async def say(session: JailSession, code: str) -> str:
    """What code prints; the test fails when it does not end well."""
    result = await session.run(code)
    assert result.status == "ok", result
    return result.stdout.rstrip("\n")


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def zygote_of(sandbox: JailSandbox) -> int:
    """The parent of its sessions."""
    session = await sandbox.session()
    parent = int(await say(session, "import os\nos.getppid()"))
    await session.close()
    return parent


async def pid_of(session: JailSession) -> int:
    return int(await say(session, "import os\nos.getpid()"))


# What is left behind


async def test_a_closed_session_leaves_no_process_and_no_descriptor(sandbox: JailSandbox) -> None:
    await sandbox.start()
    before = open_descriptors()
    sessions = [await sandbox.session() for _ in range(5)]
    processes = [await pid_of(session) for session in sessions]
    assert all(map(is_running, processes))
    assert open_descriptors() == before + 3 * 5
    for session in sessions:
        await session.close()
    assert open_descriptors() == before
    assert await eventually(lambda: not any(map(is_running, processes)))


async def test_a_closed_sandbox_leaves_nothing(sandbox: JailSandbox) -> None:
    gc.collect()
    before = open_descriptors()
    sessions = [await sandbox.session() for _ in range(3)]
    busy = asyncio.create_task(sessions[0].run("while True: pass"))
    await asyncio.sleep(0.1)
    zygote = await zygote_of(sandbox)
    assert await eventually(lambda: len(descendants(zygote)) == 3)
    below = [zygote, *descendants(zygote)]
    await sandbox.close()
    assert not any(map(is_running, below))
    with pytest.raises(SandboxUnavailable, match="closed"):
        await busy
    with pytest.raises(SandboxUnavailable, match="closed"):
        await sessions[1].run("1")
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "exit"])
async def test_nothing_outlives_the_host(end: str, tmp_path: Path) -> None:
    need_jail()
    data = tmp_path / "data.txt"
    data.write_text("x")
    script = tmp_path / "host.py"
    script.write_text(
        "import asyncio, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from retrain.sandbox import JailSandbox\n"
        "async def main():\n"
        f"    files = {{'data.txt': {str(data)!r}}}\n"
        "    sandbox = JailSandbox(packages=(), timeout_s=60, files=files)\n"
        "    idle, busy = await sandbox.session(), await sandbox.session()\n"
        "    place = await idle.run('import os\\nprint(os.getcwd())')\n"
        "    task = asyncio.create_task(busy.run('while True: pass'))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(place.stdout.strip(), flush=True)\n"
        f"    if {end!r} != 'exit': await task\n"
        "asyncio.run(main())\n"
    )
    host = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    place = await asyncio.to_thread(host.stdout.readline)
    below = descendants(host.pid)
    if end != "exit":
        assert len(below) == 3
        host.send_signal(signal.Signals[end])
    await asyncio.to_thread(host.wait, 10)
    host.stdout.close()
    assert await eventually(lambda: not any(map(is_running, below)))
    assert place.strip().startswith("/") and not Path(place.strip()).exists()


async def test_hundreds_of_sessions_leak_nothing(sandbox: JailSandbox) -> None:
    """300 sessions, some of which die; the zygote and this process stay as they were."""

    async def one(number: int) -> None:
        session = await sandbox.session()
        code = "import os; os._exit(1)" if number % 7 == 0 else f"{number} + 1"
        await session.run(code)
        await session.close()

    await asyncio.gather(*map(one, range(20)))
    zygote = await zygote_of(sandbox)
    assert await eventually(lambda: descendants(zygote) == [])
    before = open_descriptors(), zygote_descriptors(zygote)
    for start in range(0, 300, 20):
        await asyncio.gather(*map(one, range(start, start + 20)))
    assert await eventually(lambda: descendants(zygote) == [])
    assert await eventually(lambda: (open_descriptors(), zygote_descriptors(zygote)) == before)


def zygote_descriptors(zygote: int) -> int:
    """Only root may see them."""
    return len(os.listdir(f"/proc/{zygote}/fd")) if os.geteuid() == 0 else 0


# What can go wrong


async def test_a_zygote_that_dies_is_replaced(sandbox: JailSandbox) -> None:
    idle, busy = await sandbox.session(), await sandbox.session()
    processes = [await pid_of(idle), await pid_of(busy)]
    running = asyncio.create_task(busy.run("while True: pass"))
    await asyncio.sleep(0.1)
    os.kill(await zygote_of(sandbox), signal.SIGKILL)
    with pytest.raises(SandboxUnavailable, match="the zygote ended unexpectedly"):
        await running
    assert await eventually(lambda: not any(map(is_running, processes)))
    with pytest.raises(SandboxUnavailable, match="the zygote ended unexpectedly"):
        await idle.run("1")
    assert await say(await sandbox.session(), "1 + 1") == "2"


async def test_a_call_after_the_end_of_the_process_is_told_how_it_ended(
    sandbox: JailSandbox,
) -> None:
    session = await sandbox.session()
    process = await pid_of(session)
    os.kill(process, signal.SIGKILL)
    assert await eventually(lambda: not is_running(process))
    result = await session.run("1")
    assert (result.status, result.error) == ("killed", "The process was ended by SIGKILL.")


async def test_a_process_stands_still_between_calls(sandbox: JailSandbox) -> None:
    session = await sandbox.session()
    process = await pid_of(session)
    spin = (
        "import threading\ndef spin():\n  while True: pass\nthreading.Thread(target=spin).start()"
    )
    await session.run(spin)

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = cpu_ticks()
    await asyncio.sleep(0.3)
    assert cpu_ticks() <= before + 1
    assert await say(session, "1 + 1") == "2"


async def test_endings_are_told_apart(sandbox: JailSandbox) -> None:
    endings = {
        "import os\nos._exit(3)": ("exit", "The code ended the process with exit code 3."),
        "import ctypes\nctypes.string_at(0)": ("killed", "The process was ended by SIGSEGV."),
        "exit('bye')": ("exit", "SystemExit: bye"),
        "while True: print('x' * 1000)": (
            "output",
            "The code printed more than 1048576 bytes and was stopped.",
        ),
    }
    for code, expected in endings.items():
        session = await sandbox.session()
        result = await session.run(code)
        assert (result.status, result.error) == expected
        await session.close()


async def test_tracebacks_are_those_of_a_prompt(sandbox: JailSandbox) -> None:
    session = await sandbox.session()
    result = await session.run("def f(x):\n    return 1 / x\n\nf(0)")
    assert result.error == (
        "Traceback (most recent call last):\n"
        '  File "<python-1>", line 4, in <module>\n    f(0)\n'
        '  File "<python-1>", line 2, in f\n    return 1 / x\n           ~~^~~\n'
        "ZeroDivisionError: division by zero"
    )
    wrong = await session.run("def f(:\n  pass")
    assert wrong.error.startswith('  File "<python-2>", line 1\n')


async def test_an_answer_that_waits_while_the_host_was_busy_is_in_time(
    sandbox: JailSandbox,
) -> None:
    sandbox.timeout_s = 0.3
    session = await sandbox.session()
    running = asyncio.create_task(session.run("6 * 7"))
    await asyncio.sleep(0)
    time.sleep(0.6)  # nothing is read meanwhile, and then timer and answer come together
    assert (await running).stdout == "42\n"
    assert await say(session, "1 + 1") == "2"


async def test_calls_of_one_session_wait_for_one_another(sandbox: JailSandbox) -> None:
    session = await sandbox.session()
    results = await asyncio.gather(*(session.run(f"x = {n}\nx") for n in range(5)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(5)]


async def test_a_call_that_is_cancelled_before_its_turn_ends_the_session_too() -> None:
    need_jail()
    sandbox = JailSandbox(packages=(), max_concurrency=1, timeout_s=1.0)
    busy, waiting = await sandbox.session(), await sandbox.session()
    running = asyncio.create_task(busy.run("while True: pass"))
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting.run("1"), 0.1)
    assert (await waiting.run("1")).error == "This session is over: a call was cancelled."
    assert (await running).status == "timeout"
    await sandbox.close()


async def test_a_call_without_a_turn_is_the_sandboxs_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_jail()
    monkeypatch.setattr("retrain.sandbox.base.TURN_S", 0.1)
    sandbox = JailSandbox(packages=(), max_concurrency=1, timeout_s=1.0)
    busy, waiting = await sandbox.session(), await sandbox.session()
    running = asyncio.create_task(busy.run("while True: pass"))
    await asyncio.sleep(0.05)
    with pytest.raises(SandboxUnavailable, match=r"no turn .* raise sandbox.max_concurrency"):
        await waiting.run("1")
    assert (await running).status == "timeout"
    await sandbox.close()


async def test_too_many_open_files_is_the_sandboxs_failure(sandbox: JailSandbox) -> None:
    await sandbox.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
    try:
        with pytest.raises(SandboxUnavailable, match="open files"):
            await sandbox.session()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await say(await sandbox.session(), "1 + 1") == "2"


async def test_a_start_that_is_interrupted_leaves_nothing() -> None:
    need_jail()
    sandbox = make_sandbox("auto", packages=["sympy"])
    before = descendants(os.getpid())
    starting = asyncio.create_task(sandbox.start())
    await asyncio.sleep(0.1)
    assert len(descendants(os.getpid())) > len(before)
    starting.cancel()
    await asyncio.wait({starting})
    await sandbox.close()
    assert await eventually(lambda: len(descendants(os.getpid())) <= len(before))


async def test_a_copy_of_the_hosts_sockets_in_a_fork_keeps_nothing_alive(
    sandbox: JailSandbox,
) -> None:
    await sandbox.start()
    copy = os.fork()
    if copy == 0:
        time.sleep(30)
        os._exit(0)
    try:
        start = time.monotonic()
        await sandbox.close()
        assert time.monotonic() - start < 3  # it would be killed after 5
    finally:
        os.kill(copy, signal.SIGKILL)
        os.waitpid(copy, 0)


async def test_files_go_when_the_zygote_is_killed(tmp_path: Path) -> None:
    need_jail()
    (tmp_path / "a.txt").write_text("hello")
    sandbox = JailSandbox(packages=(), files={"a.txt": str(tmp_path / "a.txt")})
    session = await sandbox.session()
    place = Path(await say(session, "import os\nprint(os.getcwd())"))
    assert place.is_dir()
    os.kill(await zygote_of(sandbox), signal.SIGKILL)
    assert await say(await eventually_new(sandbox), "1 + 1") == "2"
    await sandbox.close()
    del session, sandbox
    gc.collect()
    assert not place.exists()


async def eventually_new(sandbox: JailSandbox) -> JailSession:
    """A session of the next zygote, once the loss of the first is known."""
    while True:
        try:
            return await sandbox.session()
        except SandboxUnavailable:
            await asyncio.sleep(0.05)


# What sessions are given


async def test_sessions_start_alike() -> None:
    need_jail()
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'))"
    seen = []
    for seed in (0, 0, 1):
        sandbox = JailSandbox(packages=("numpy",), seed=seed)
        seen += [await say(await sandbox.session(), code) for _ in range(2)]
        await sandbox.close()
    assert len(set(seen[:4])) == 1 and seen[4] == seen[5] != seen[0]


async def test_packages_are_the_given_ones_and_what_they_need() -> None:
    need_jail()
    sandbox = JailSandbox(packages=("sympy",))
    session = await sandbox.session()
    assert await say(session, "import sympy, mpmath\nsympy.factorint(84)") == "{2: 2, 3: 1, 7: 1}"
    assert (
        await say(session, "import sympy.crypto.crypto as c\nprint(c.__name__)")
        == "sympy.crypto.crypto"
    )
    refused = await session.run("import numpy")
    assert refused.error.endswith(
        "No module named 'numpy' (this Python has only: the standard library, sympy)"
    )
    await sandbox.close()
    with pytest.raises(UserError, match="no package 'nonesuch' here"):
        await JailSandbox(packages=("nonesuch",)).start()


async def test_files_can_be_read_and_not_written(tmp_path: Path) -> None:
    need_jail()
    (tmp_path / "a.txt").write_text("hello")
    sandbox = JailSandbox(packages=(), files={"a.txt": str(tmp_path / "a.txt")})
    session = await sandbox.session()
    assert await say(session, "open('a.txt').read()") == "'hello'"
    assert "PermissionError" in (await session.run("open('a.txt', 'w')")).error
    assert "PermissionError" in (await session.run("open('b.txt', 'w')")).error
    await sandbox.close()


async def test_a_writable_session_has_a_bounded_file_system_of_its_own(tmp_path: Path) -> None:
    need_jail(writable=True)
    (tmp_path / "a.txt").write_text("hello")
    sandbox = JailSandbox(
        packages=(), writable=True, memory_mb=32, files={"d/a.txt": str(tmp_path / "a.txt")}
    )
    first, second = await sandbox.session(), await sandbox.session()
    assert await say(first, "open('d/a.txt', 'a').write('!')\nopen('d/a.txt').read()") == "'hello!'"
    code = "import os, tempfile\nos.makedirs('x/y')\nf = tempfile.NamedTemporaryFile()\nf.name"
    place = Path((await say(first, code)).strip("'"))
    assert not place.exists()
    look = "import os\nopen('d/a.txt').read(), os.listdir('.')"
    assert await say(second, look) == "('hello', ['d'])"
    full = await second.run("open('big', 'wb').write(b'x' * (40 << 20))")
    assert full.status in ("error", "memory")
    chunks = (
        "n = 0\ntry:\n  while True:\n    open(f'f{n}', 'wb').write(b'x' * (1 << 20)); n += 1\n"
        "except OSError as e: print(n, e.strerror)"
    )
    third = await sandbox.session()
    count, _, reason = (await say(third, chunks)).partition(" ")
    assert int(count) <= 32 and reason == "No space left on device"
    many = (
        "n = 0\ntry:\n  while True:\n    open(f'{n}', 'w'); n += 1\nexcept OSError as e: print(n)"
    )
    assert int(await say(await sandbox.session(), many)) < 5000
    await sandbox.close()


async def test_inside_bubblewrap_the_rest_of_the_machine_is_not_there() -> None:
    if shutil.which("bwrap") is None:
        with pytest.raises(UserError, match="there is no bwrap here"):
            await JailSandbox(packages=(), bubblewrap=True).start()
        pytest.skip("there is no bwrap")
    need_jail(bubblewrap=True)
    plain, wrapped = JailSandbox(packages=()), JailSandbox(packages=("numpy",), bubblewrap=True)
    outside = str(Path(__file__).resolve())
    code = f"import os\nprint(os.path.exists({outside!r}), os.uname().nodename)"
    assert (await say(await plain.session(), code)).startswith("True ")
    assert await say(await wrapped.session(), code) == "False sandbox"
    assert await say(await wrapped.session(), "import numpy\nint(numpy.ones(3).sum())") == "3"
    await plain.close()
    await wrapped.close()


async def test_a_jail_that_does_not_hold_is_refused(
    sandbox: JailSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a self-test that tries something allowed, as if the kernel let it through."""
    from retrain.sandbox.jail import selftest

    leaky = selftest._ATTEMPTS.replace('"list /": lambda: os.listdir("/")', '"count": os.getpid')
    monkeypatch.setattr(selftest, "_ATTEMPTS", leaky)
    before = descendants(os.getpid())
    with pytest.raises(UserError, match="the jail does not hold here: code in it could count"):
        await sandbox.start()
    assert descendants(os.getpid()) == before
