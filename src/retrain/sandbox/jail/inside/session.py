"""A session: a process forked from the zygote that locks itself in, then runs code."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass
from typing import NoReturn

from . import kernel
from .interpreter import Interpreter, bounded
from .wire import READY, REFUSED, REQUEST, RESPONSE, STATUSES

SOCKET, RULESET, QUESTIONS = 3, 4, 5
"""Descriptors of a session while it locks itself in; 0 is empty, 1 and 2 are its output. The
zygote keeps these numbers free, with the Landlock ruleset and the socket for listeners in
place."""

_SPARE_BYTES = 16 * 2**20
"""Beyond `memory_mb`, for telling that memory ran out."""
_MAX_INODES = 4096
_MAX_DESCRIPTORS = 64

_exit = os._exit


@dataclass(frozen=True)
class Confinement:
    """What every session of a zygote is held to."""

    zygote: int
    """Its process id."""
    landlock: int
    """The kernel's version of Landlock."""
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
    """What may be read: the ruleset that waits at RULESET, or, with a file system of the session's
    own, a part of it."""
    seccomp: bytes
    """The filter; made once, since making it takes longer than a fork."""
    asks: bytes
    """The filter before it, which asks at the zygote about each new thread."""


class Sockets:
    """Python's objects for the descriptors SOCKET and QUESTIONS, of which a session puts its own
    socket at the first."""

    def __init__(self, questions: socket.socket) -> None:
        nobody, self.requests = socket.socketpair()
        with nobody:
            self.requests = _at(SOCKET, self.requests)
        self.questions = _at(QUESTIONS, questions)


def _at(descriptor: int, made: socket.socket) -> socket.socket:
    with made:
        os.dup2(made.fileno(), descriptor, inheritable=False)
    return socket.socket(made.family, made.type, 0, descriptor)


def prepare(confinement: Confinement) -> None:
    """In the zygote, once: everything that sessions can inherit instead of doing it each."""
    kernel.huge_pages()
    kernel.small_pages()
    file_size = confinement.memory_bytes if confinement.writable else confinement.output_bytes
    for kind, limit in (
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_SIGPENDING, 64),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_RTPRIO, 0),
    ):
        _limit(kind, limit, limit)
    if not confinement.writable:
        os.chdir(confinement.directory)
        kernel.not_dumpable()
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    budget = mapped + confinement.memory_bytes
    _limit(resource.RLIMIT_AS, budget, budget + _SPARE_BYTES)


def _limit(kind: int, soft: int, hard: int) -> None:
    highest = resource.getrlimit(kind)[1]
    if highest == resource.RLIM_INFINITY:
        highest = hard
    resource.setrlimit(kind, (min(soft, highest), min(hard, highest)))


def run_session(
    confinement: Confinement,
    interpreter: Interpreter,
    sockets: Sockets,
    channel: int,
    output: int,
) -> NoReturn:
    """
    Args:
        sockets: made in the zygote: to make them takes as long as to lock in.
        channel: descriptor of the socket that requests come by.
        output: descriptor of the file that standard output goes to.
    """
    try:
        for given, target in ((output, 1), (output, 2), (channel, SOCKET)):
            os.dup2(given, target, inheritable=False)
        kernel.close_from(QUESTIONS + 1)
        try:
            _lock_in(confinement, sockets.questions)
        except Exception as error:
            sockets.requests.sendall(REFUSED + str(error).encode("utf-8", "replace"))
            _exit(1)
        sockets.requests.sendall(READY)
        _serve(sockets.requests, interpreter)
    finally:
        _exit(0)


def _lock_in(confinement: Confinement, questions: socket.socket) -> None:
    """In an order in which no step takes away what a later one needs."""
    ruleset = RULESET
    if confinement.writable:
        _own_file_system(confinement)
        own = (confinement.directory, kernel.WRITABLE)
        ruleset = kernel.landlock_ruleset(confinement.landlock, (*confinement.rules, own))
        os.chdir(confinement.directory)
        kernel.drop_capabilities()
        kernel.no_new_privileges()
        kernel.not_dumpable()
    kernel.die_with_parent(confinement.zygote)
    kernel.landlock_enter(ruleset, confinement.landlock)
    listener = kernel.seccomp_filter(confinement.asks, listener=True)
    socket.send_fds(questions, [b"q"], [listener])
    kernel.close_from(RULESET)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_DESCRIPTORS, _MAX_DESCRIPTORS))
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


def _serve(channel: socket.socket, interpreter: Interpreter) -> None:
    """Answer requests until the host hangs up."""
    while header := _receive(channel, REQUEST.size):
        nonce, length = REQUEST.unpack(header)
        status, error = interpreter.run(_receive(channel, length).decode("utf-8"))
        if status == "memory":
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        text = bounded(error).encode("utf-8", "replace")
        channel.sendall(RESPONSE.pack(nonce, STATUSES.index(status), len(text)) + text)


def _receive(channel: socket.socket, size: int) -> bytes:
    """That many bytes; none when the stream ends before."""
    data = b""
    while len(data) < size:
        piece = channel.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return data
