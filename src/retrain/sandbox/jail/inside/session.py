"""A session: a process forked from the zygote that locks itself in, then runs code."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from . import kernel
from .interpreter import Interpreter, bounded
from .wire import READY, REFUSED, REQUEST, RESPONSE, STATUSES

_SOCKET, _RULESET, _QUESTIONS = 3, 4, 5
"""Descriptors of a session while it locks itself in; 0 is empty, 1 and 2 are its output."""

_SPARE_BYTES = 16 * 2**20
"""Beyond `memory_mb`, for telling that memory ran out."""
_MAX_INODES = 4096

_exit = os._exit


@dataclass(frozen=True)
class Confinement:
    """What every session of a zygote is held to."""

    zygote: int
    """Its process id."""
    ruleset: int
    landlock: int
    """The descriptor of the Landlock ruleset, and the kernel's version of Landlock."""
    mapped_bytes: int
    """Address space in use before any code runs."""
    memory_bytes: int
    output_bytes: int
    """Most that a session may write to one file: its output is one."""
    directory: str
    """Where code starts."""
    writable: bool
    """Whether a file system of the session's own is mounted there."""
    files: dict[str, bytes]
    """What that file system holds at first."""
    rules: tuple[tuple[str, int], ...]
    """The ruleset's rules: those of such a session are these and its file system."""
    seccomp: bytes
    """The filter; made once, since making it takes longer than a fork."""
    asks: bytes
    """The filter before it, which asks at the zygote about each new thread."""


def run_session(
    confinement: Confinement, interpreter: Interpreter, channel: int, output: int, questions: int
) -> NoReturn:
    """
    Args:
        channel: descriptor of the socket that requests come by.
        output: descriptor of the file that standard output goes to.
        questions: descriptor of the socket by which the zygote is given the listener that the
            thread filter asks at.
    """
    try:
        _take_descriptors(channel, output, questions, confinement.ruleset)
        requests = socket.socket(fileno=_SOCKET)
        try:
            _lock_in(confinement)
        except Exception as error:
            requests.sendall(REFUSED + str(error).encode("utf-8", "replace"))
            _exit(1)
        requests.sendall(READY)
        _serve(requests, interpreter)
    finally:
        _exit(0)


def _take_descriptors(channel: int, output: int, questions: int, ruleset: int) -> None:
    """Put the descriptors where they belong, and close every other one."""
    empty = os.open("/dev/null", os.O_RDONLY)
    given = (empty, output, output, channel, ruleset, questions)
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in given]
    for target, fd in enumerate(above):
        os.dup2(fd, target, inheritable=False)
    kernel.close_from(len(given))


def _lock_in(confinement: Confinement) -> None:
    """In an order in which no step takes away what a later one needs."""
    ruleset = _RULESET
    if confinement.writable:
        _own_file_system(confinement)
        own = (confinement.directory, kernel.WRITABLE)
        ruleset = kernel.landlock_ruleset(confinement.landlock, (*confinement.rules, own))
        kernel.drop_capabilities()
    kernel.die_with_parent(confinement.zygote)
    kernel.small_pages()
    os.chdir(confinement.directory)
    kernel.not_dumpable()
    kernel.no_new_privileges()
    kernel.landlock_enter(ruleset, confinement.landlock)
    listener = kernel.seccomp_filter(confinement.asks, listener=True)
    with socket.socket(fileno=_QUESTIONS) as zygote:
        socket.send_fds(zygote, [b"q"], [listener])
    kernel.close_from(_RULESET)
    _limit(confinement)
    kernel.seccomp_filter(confinement.seccomp)


def _own_file_system(confinement: Confinement) -> None:
    """One in memory that this process alone sees, bounded in bytes and inodes; it goes with it."""
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
    except PermissionError:
        user, group = os.getuid(), os.getgid()
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    kernel.mount(b"none", b"/", b"", kernel.MS_REC | kernel.MS_PRIVATE)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    options = f"size={confinement.memory_bytes},nr_inodes={_MAX_INODES},mode=0700".encode()
    kernel.mount(b"tmpfs", confinement.directory.encode(), b"tmpfs", flags, options)
    place_files(confinement.files, confinement.directory)


def place_files(files: dict[str, bytes], directory: str) -> None:
    for name, content in files.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _limit(confinement: Confinement) -> None:
    budget = confinement.mapped_bytes + confinement.memory_bytes
    file_size = confinement.memory_bytes if confinement.writable else confinement.output_bytes
    for kind, soft, hard in (
        (resource.RLIMIT_AS, budget, budget + _SPARE_BYTES),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_SIGPENDING, 64, 64),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_RTPRIO, 0, 0),
    ):
        highest = resource.getrlimit(kind)[1]
        if highest == resource.RLIM_INFINITY:
            highest = hard
        resource.setrlimit(kind, (min(soft, highest), min(hard, highest)))


def _serve(channel: socket.socket, interpreter: Interpreter) -> None:
    """Answer requests until the host hangs up."""
    stream = channel.makefile("rb")
    while header := stream.read(REQUEST.size):
        nonce, length = REQUEST.unpack(header)
        code = stream.read(length).decode("utf-8")
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
        sys.stdout = sys.stderr = _output()
        status, error = interpreter.run(code)
        if status == "memory":
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        text = bounded(error).encode("utf-8", "replace")
        channel.sendall(RESPONSE.pack(nonce, STATUSES.index(status), len(text)) + text)


def _output() -> io.TextIOWrapper:
    """Standard output without a buffer: what was printed before a time-out is there."""
    raw: Any = io.FileIO(1, "w", closefd=False)
    return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
