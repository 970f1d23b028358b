"""What a jail must refuse, tried in one of its sessions before any other code gets there.

The code below is ours, so its report can be believed.
"""

from __future__ import annotations

import json
import os

from retrain.sandbox.base import SandboxUnavailable, Session

_ATTEMPTS = """
import ctypes, json, os, socket

def lasting(call):
    fd = call()
    os.close(fd)

attempts = {
    "read /etc/passwd": lambda: lasting(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "read another process": lambda: lasting(lambda: os.open("/proc/1/cmdline", os.O_RDONLY)),
    "list /": lambda: os.listdir("/"),
    "write to the standard library": lambda: lasting(lambda: os.open(os.__file__, os.O_WRONLY)),
    "write to shared memory": lambda: (
        lasting(lambda: os.open("/dev/shm/retrain-selftest", os.O_WRONLY | os.O_CREAT, 0o600)),
        os.unlink("/dev/shm/retrain-selftest")),
    "change a file's mode": lambda: os.chmod(os.__file__, os.stat(os.__file__).st_mode),
    "start a process": lambda: os.fork() or os._exit(0),
    "run a program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "send a signal": lambda: os.kill(os.getppid(), 0),
    "open a network socket": lambda: socket.socket(socket.AF_INET),
    "open a Unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "make a file in memory": lambda: lasting(lambda: os.memfd_create("x")),
}
if NUMBERS:
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *arguments):
        if libc.syscall(number, *arguments) < 0:
            raise OSError(ctypes.get_errno(), "refused")
    attempts["trace a process"] = lambda: call(NUMBERS[0], 16, os.getppid(), 0, 0)
    attempts["make a namespace"] = lambda: call(NUMBERS[1], 0x10000000)
succeeded = []
for name, attempt in attempts.items():
    try:
        attempt()
        succeeded.append(name)
    except OSError:
        pass
print(json.dumps(succeeded))
"""
_PTRACE_UNSHARE = {"x86_64": (101, 272), "aarch64": (117, 97)}


async def breaches(session: Session) -> list[str]:
    """What code in this session, which ends, could do and must not; empty for a jail that holds.

    Raises:
        SandboxUnavailable: the attempts themselves did not run.
    """
    numbers = _PTRACE_UNSHARE.get(os.uname().machine, ())
    result = await session.run(f"NUMBERS = {numbers!r}\n{_ATTEMPTS}")
    await session.close()
    try:
        found = json.loads(result.stdout)
    except ValueError:
        said = result.error or result.stdout
        raise SandboxUnavailable(f"jail: its self-test did not run: {said}") from None
    return [str(name) for name in found]
