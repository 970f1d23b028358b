"""The zygote: a warm interpreter that forks a process for each session and reaps it.

It runs no code of the model's. It ends when the host hangs up or dies, and its sessions with it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from . import kernel
from .interpreter import Interpreter
from .seccomp import clone_filter, session_filter
from .session import (
    QUESTIONS,
    RULESET,
    SOCKET,
    Confinement,
    Sockets,
    place_files,
    prepare,
    run_session,
)
from .wire import ENDED, FAILED, FILES_PREFIX, REPLY, SPAWN, SPAWNED, STARTED, UNUSABLE

MAX_THREADS = 16
"""Of one session, its first included."""

_NOBODY = 65534
_MEBIBYTE = 2**20


class Allowed(importlib.abc.MetaPathFinder):
    """Finds the third-party packages that sessions may import, by specs made in advance.

    Their directory itself is closed to a session, so that it cannot see what else is installed.
    """

    def __init__(self, roots: dict[str, str]) -> None:
        self.specs = {}
        for name, root in roots.items():
            spec = importlib.machinery.PathFinder.find_spec(name, [root])
            if spec is not None:
                self.specs[name] = spec

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return self.specs.get(fullname)


class Zygote:
    """Made in the order in which privileges go: packages first, then the jail's own rules."""

    def __init__(self, control: socket.socket, host: int, setup: dict[str, Any]) -> None:
        """
        Args:
            control: the socket that the host speaks by.
            host: a pidfd of the host.
            setup: as the host writes it, see `jail.process`.
        """
        self._control = control
        self._host = host
        self._children: dict[int, tuple[int, int]] = {}
        """Pidfd to process id and session id."""
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[int, int], None]] = {}
        """Descriptor to what its events are for."""
        self._listeners, questions = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets = Sockets(questions)
        files = {name: base64.b64decode(data) for name, data in setup["files"].items()}
        writable = bool(setup["writable"])
        sys.meta_path.append(Allowed(setup["importable"]))
        for name in setup["packages"]:
            importlib.import_module(name)
        if not writable:
            _give_up_privileges(setup["readable"])
        self._temporary = ""
        if files and not writable:
            self._temporary = tempfile.mkdtemp(prefix=FILES_PREFIX)
            place_files(files, self._temporary)
        self._confinement = _confinement(setup, files, self._temporary)
        _warm_up()
        _seed(setup["seed"])
        self._interpreter = Interpreter(tuple(setup["packages"]))
        gc.collect()
        gc.freeze()
        prepare(self._confinement)

    def describe(self) -> dict[str, Any]:
        return {
            "landlock": self._confinement.landlock,
            "uid": os.geteuid(),
            "temporary": self._temporary,
        }

    def serve(self) -> None:
        """Until the host hangs up or dies."""
        self._watch(self._control.fileno(), self._on_control)
        self._watch(self._listeners.fileno(), self._on_listener)
        self._watch(self._host, self._on_host)
        try:
            while True:
                for fd, events in self._epoll.poll():
                    if fd in self._readers:
                        self._readers[fd](fd, events)
        except (EOFError, ConnectionError):
            return

    def close(self) -> None:
        """End every session and wait for it."""
        for process, _ in self._children.values():
            os.kill(process, signal.SIGKILL)
        for process, _ in self._children.values():
            os.waitpid(process, 0)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _watch(self, fd: int, reader: Callable[[int, int], None]) -> None:
        self._readers[fd] = reader
        self._epoll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        del self._readers[fd]
        self._epoll.unregister(fd)
        os.close(fd)

    def _on_host(self, fd: int, events: int) -> None:
        raise EOFError

    def _on_control(self, fd: int, events: int) -> None:
        message, fds, _, _ = socket.recv_fds(self._control, 64, 2, socket.MSG_CMSG_CLOEXEC)
        if not message:
            raise EOFError
        (session,) = SPAWN.unpack(message)
        try:
            self._spawn(session, *fds)
        except OSError as error:
            self._control.send(REPLY.pack(FAILED, session, error.errno or errno.EAGAIN))
        finally:
            for given in fds:
                os.close(given)

    def _spawn(self, session: int, channel: int, output: int) -> None:
        process = os.fork()
        if process == 0:
            run_session(self._confinement, self._interpreter, self._sockets, channel, output)
        try:
            pidfd = os.pidfd_open(process)
        except OSError:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        self._children[pidfd] = (process, session)
        self._watch(pidfd, self._on_end)
        socket.send_fds(self._control, [REPLY.pack(SPAWNED, session, process)], [pidfd])

    def _on_end(self, pidfd: int, events: int) -> None:
        process, session = self._children.pop(pidfd)
        _, status = os.waitpid(process, 0)
        self._forget(pidfd)
        self._control.send(REPLY.pack(ENDED, session, status))

    def _on_listener(self, fd: int, events: int) -> None:
        _, fds, _, _ = socket.recv_fds(self._listeners, 16, 1, socket.MSG_CMSG_CLOEXEC)
        for listener in fds:
            self._watch(listener, self._on_question)

    def _on_question(self, listener: int, events: int) -> None:
        """A session wants another thread, or has ended."""
        if not events & select.EPOLLIN:
            self._forget(listener)
            return
        with contextlib.suppress(OSError):  # the session has ended meanwhile
            identity, thread = kernel.read_question(listener)
            refused = errno.EAGAIN if _count_threads(thread) >= MAX_THREADS else 0
            kernel.answer_question(listener, identity, refused)


def _count_threads(thread: int) -> int:
    """Of the process that a thread belongs to; more than are allowed when it cannot be seen."""
    try:
        return os.stat(f"/proc/{thread}/task").st_nlink - 2
    except OSError:
        return MAX_THREADS


def _confinement(setup: dict[str, Any], files: dict[str, bytes], temporary: str) -> Confinement:
    rules = [(path, kernel.READABLE) for path in setup["readable"]]
    rules += [(path, kernel.READ_DIR) for path in setup["listable"]]
    rules.append(("/dev/null", kernel.READ_FILE | kernel.WRITE_FILE))
    if temporary:
        rules.append((temporary, kernel.READABLE))
    version, machine = kernel.landlock_version(), os.uname().machine
    ruleset = kernel.landlock_ruleset(version, rules)
    os.dup2(ruleset, RULESET, inheritable=False)
    os.close(ruleset)
    return Confinement(
        zygote=os.getpid(),
        landlock=version,
        memory_bytes=setup["memory_mb"] * _MEBIBYTE,
        output_bytes=setup["output_bytes"],
        directory=setup["workplace"] if setup["writable"] else temporary or "/",
        writable=setup["writable"],
        files=files,
        rules=tuple(rules),
        seccomp=session_filter(machine, writable=setup["writable"]),
        asks=clone_filter(machine),
    )


def _give_up_privileges(readable: list[str]) -> None:
    """Stop being root where what sessions read can be read without; drop every capability."""
    if os.geteuid() == 0 and _may_all_read(_NOBODY, readable):
        _become(_NOBODY)
    kernel.drop_capabilities()
    kernel.no_new_privileges()


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _may_all_read(user: int, paths: list[str]) -> bool:
    """Whether a user without groups can open every path that is there; tried in a child."""
    there = [path for path in paths if os.path.exists(path)]
    child = os.fork()
    if child == 0:
        try:
            _become(user)
            for path in there:
                os.close(os.open(path, os.O_RDONLY))
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(control_fd: int, host: int, setup_fd: int) -> None:
    os.environ.clear()
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with open(setup_fd, encoding="utf-8") as file:
        file.seek(0)
        setup = json.load(file)
    control_fd, host = _out_of_the_way(control_fd), _out_of_the_way(host)
    empty = _out_of_the_way(os.open(os.devnull, os.O_RDONLY))
    for reserved in (0, SOCKET, RULESET, QUESTIONS):
        os.dup2(empty, reserved, inheritable=False)
    os.close(empty)
    control = socket.socket(fileno=control_fd)
    sys.path[:] = setup["path"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "inside"]:
        del sys.modules[name]
    _raise_descriptor_limit()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # the first to go when the machine runs out of memory
    try:
        zygote = Zygote(control, host, setup)
    except Exception as error:
        reason = {"kind": type(error).__name__, "reason": str(error)}
        control.send(UNUSABLE + json.dumps(reason).encode())
        return
    control.send(STARTED + json.dumps(zygote.describe()).encode())
    try:
        zygote.serve()
    finally:
        zygote.close()


def _out_of_the_way(fd: int) -> int:
    """The same file at a descriptor above those that sessions use."""
    above = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return above


def _seed(seed: int) -> None:
    """Of `random` and of NumPy's legacy generator; a fork leaves them as they are."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _warm_up() -> None:
    """Do once what every session does first: it then writes to fewer pages of its own."""
    stdout, stderr = sys.stdout, sys.stderr
    interpreter = Interpreter(())
    for code in ("1 + 1", "def f(x):\n    return [x]\nprint(f(2))", "1 / 0", "import math") * 8:
        interpreter.run(code)
    sys.stdout, sys.stderr = stdout, stderr


def _raise_descriptor_limit() -> None:
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
