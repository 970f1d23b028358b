"""What hostile code could harm: canaries, listeners, a victim; and a look at all of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from retrain.sandbox.jail.sandbox import JailSandbox
from sandboxes import need_jail

STRANGE_FILE = "retrain-attack"
"""What an attack names the files that it tries to make."""


class Machine:
    """Things of the test's own that everybody may touch, so that only the jail protects them."""

    def __init__(self) -> None:
        self.secret = f"SECRET-{secrets.token_hex(8)}"
        self.directory = Path(tempfile.mkdtemp(prefix="canaries-", dir="/var/tmp"))
        self.directory.chmod(0o777)
        self.canary = self.directory / "canary"
        self.canary.write_text(self.secret)
        self.canary.chmod(0o666)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = self._listener(str(self.directory / "socket"))
        (self.directory / "socket").chmod(0o777)
        self.abstract_name = f"\0{secrets.token_hex(8)}"
        self.abstract = self._listener(self.abstract_name)
        os.environ["ATTACK_TEST_TOKEN"] = self.secret
        self.victim = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1000)", self.secret]
        )
        self._before = self._look()

    def names(self) -> str:
        """Assignments that come before an attack's code: it may know all of this."""
        values = {
            "CANARY": str(self.canary),
            "DIRECTORY": str(self.directory),
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "UNIX": str(self.directory / "socket"),
            "ABSTRACT": self.abstract_name,
            "VICTIM": self.victim.pid,
            "HOST": os.getpid(),
            "HOME": str(Path.home()),
            "REPOSITORY": str(Path(__file__).parents[2]),
            "NOT_GIVEN": [pytest.__file__],
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def harm(self) -> str:
        """What has changed; empty when nothing has."""
        found = [
            f"{a} became {b}" for a, b in zip(self._before, self._look(), strict=True) if a != b
        ]
        for name in ("tcp", "udp", "unix", "abstract"):
            if _has_news(getattr(self, name)):
                found.append(f"somebody spoke to the {name} socket")
        if self.victim.poll() is not None:
            found.append(f"the victim ended with {self.victim.returncode}")
        for directory in ("/tmp", "/var/tmp", "/dev/shm", "/", "/run", str(Path.home()), "/mnt"):
            if os.path.exists(f"{directory}/{STRANGE_FILE}"):
                found.append(f"a file in {directory}")
        return "; ".join(found)

    def close(self) -> None:
        del os.environ["ATTACK_TEST_TOKEN"]
        self.victim.kill()
        self.victim.wait()
        for name in ("tcp", "udp", "unix", "abstract"):
            getattr(self, name).close()
        shutil.rmtree(self.directory)

    def _look(self) -> list[object]:
        entry = self.canary.stat()
        return [
            sorted(os.listdir(self.directory)),
            self.canary.read_text(),
            (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_nlink, entry.st_mtime_ns),
            os.listxattr(self.canary),
            field("State", self.victim.pid)[:1] in ("T", "t"),
            sorted(os.listdir(Path(os.__file__).parent)),
        ]

    @staticmethod
    def _listener(name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        return listener


def _has_news(listener: socket.socket) -> bool:
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(1)
        return True
    return False


def field(name: str, pid: int) -> str:
    """Of /proc/PID/status; empty when the process or the line is not there."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    return ""


def alive(pid: int) -> bool:
    """A zombie is not."""
    return field("State", pid)[:1] not in ("", "Z", "X")


def children(pid: int) -> set[int]:
    """Of its first thread, which is the one that forks."""
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return {child for child in map(int, listed.split()) if alive(child)}
    everyone = map(int, filter(str.isdigit, os.listdir("/proc")))
    return {other for other in everyone if field("PPid", other) == str(pid) and alive(other)}


def zygotes() -> list[int]:
    """Those of this process, in the order in which they were started."""
    found = []
    for pid in sorted(children(os.getpid())):
        with contextlib.suppress(OSError):
            if b"inside.zygote" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def processor_ticks(pid: int) -> int:
    """User and system time of all its threads, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def megabytes(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) // 1024 if text else 0


def shared_memory_mb() -> int:
    """All of this machine's."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return megabytes(line.partition(":")[2])
    return 0


def unix_sockets() -> int:
    """All of this machine's, a line for each."""
    return Path("/proc/net/unix").read_text().count("\n")


class Peaks:
    """The most that the sessions of a zygote held at once, watched from a thread."""

    def __init__(self, zygote: int) -> None:
        self._zygote = zygote
        self._done = threading.Event()
        self._start = (shared_memory_mb(), unix_sockets())
        self.resident_mb = self.shared_mb = self.processes = self.threads = self.sockets = 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.03):
            alive = children(self._zygote)
            self.processes = max(self.processes, len(alive))
            for pid in alive:
                self.resident_mb = max(self.resident_mb, megabytes(field("VmRSS", pid)))
                self.threads = max(self.threads, int(field("Threads", pid) or 0))
            self.shared_mb = max(self.shared_mb, shared_memory_mb() - self._start[0])
            self.sockets = max(self.sockets, unix_sockets() - self._start[1])


async def started(sandbox: JailSandbox) -> JailSandbox:
    """The sandbox, running; or the test is skipped where the kernel has no means for it."""
    if sandbox.writable:
        need_jail(writable=True)
    need_jail()
    await sandbox.start()
    return sandbox


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
