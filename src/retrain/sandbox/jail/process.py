"""The host's end of a zygote: start it, ask it for sessions, notice when it or one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from retrain.sandbox.base import SandboxUnavailable
from retrain.sandbox.jail.inside.wire import (
    ENDED,
    FAILED,
    FILES_PREFIX,
    REPLY,
    SPAWN,
    SPAWNED,
    STARTED,
    UNUSABLE,
)

_START_S, _SPAWN_S, _CLOSE_S = 60.0, 10.0, 5.0
_DESCRIPTORS = 65_536
"""Wanted as this process's limit: a session takes three."""

_BEGIN = (
    "import os, sys; os.register_at_fork = lambda **hooks: None; "
    "sys.path.insert(0, {directory!r}); "
    "from inside.zygote import main; main({control}, {host}, {setup})"
)
"""Without hooks at a fork: the zygote has one thread, so none has anything to mend, and what those
of `threading` and `random` touch is a third of the time and memory of a fork."""

_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    # Huge pages for what is allocated with malloc: a fork copies fewer page tables.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class ZygoteFailed(Exception):
    """The zygote says why it cannot work here."""


class Listener(Protocol):
    """What a session wants to know."""

    def on_end(self, status: int) -> None:
        """Its process has ended; `status` is what waitpid says."""

    def on_loss(self, reason: str) -> None:
        """The zygote has ended, and every session with it."""


class ZygoteProcess:
    """One zygote, on the event loop that started it.

    It ends by itself when this process ends, however that happens.
    """

    def __init__(self, command: Sequence[str], setup: Mapping[str, Any], concurrency: int) -> None:
        """
        Args:
            command: what to put before the interpreter's own command line (bubblewrap's).
            setup: what the zygote reads, see `jail.sandbox`.
            concurrency: most calls of its sessions that run at once.
        """
        self.gate = asyncio.Semaphore(concurrency)
        self.lost = ""
        """Why it is no longer there; empty while it is."""
        self._identities = itertools.count()
        self._spawning: dict[int, asyncio.Future[int]] = {}
        self._sessions: dict[int, Listener] = {}
        self._started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        _raise_descriptor_limit()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._said = os.fdopen(os.memfd_create("zygote"), "rb")
        host, setup_fd = os.pidfd_open(os.getpid()), _in_memory(json.dumps(setup))
        begin = _BEGIN.format(
            directory=str(Path(__file__).parent),
            control=theirs.fileno(),
            host=host,
            setup=setup_fd,
        )
        try:
            self._popen = subprocess.Popen(
                [*command, sys.executable, "-s", "-S", "-X", "utf8", "-c", begin],
                env=_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=(theirs.fileno(), host, setup_fd),
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(host)
            os.close(setup_fd)
        self._left_behind: list[str] = []
        """The zygote's directory of files, for when it cannot remove it itself."""
        weakref.finalize(self, _abandon, self._control, self._popen, self._left_behind)
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._on_message)

    async def started(self) -> dict[str, Any]:
        """What the zygote says of itself once it is ready.

        Raises:
            ZygoteFailed: what keeps it from working.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self._started), _START_S)
        except TimeoutError:
            raise ZygoteFailed(f"it was not ready after {_START_S:g} s") from None

    async def spawn(self, channel: socket.socket, output: int, session: Listener) -> int:
        """Fork a session, and return its pidfd.

        Raises:
            SandboxUnavailable: it could not.
        """
        identity = next(self._identities)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._spawning[identity] = future
        self._sessions[identity] = session
        try:
            async with asyncio.timeout(_SPAWN_S):
                await self._send(SPAWN.pack(identity), [channel.fileno(), output])
                return await future
        except BaseException as error:
            self._sessions.pop(identity, None)
            if future.done() and not future.cancelled() and future.exception() is None:
                os.close(future.result())
            if isinstance(error, TimeoutError):
                raise SandboxUnavailable(f"jail: no session after {_SPAWN_S:g} s") from None
            raise
        finally:
            self._spawning.pop(identity, None)

    async def close(self) -> None:
        """End it and its sessions, and wait until they are gone."""
        self._lose("it was closed")
        deadline = asyncio.get_running_loop().time() + _CLOSE_S
        while self._popen.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                self._popen.kill()
            await asyncio.sleep(0.002)
        self._said.close()
        _remove(self._left_behind)

    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        said = self._said.fileno()
        end = os.pread(said, 2000, max(0, os.fstat(said).st_size - 2000))
        return end.decode("utf-8", "replace").strip()

    async def _send(self, message: bytes, fds: list[int]) -> None:
        while True:
            if self.lost:
                raise SandboxUnavailable(f"jail: {self.lost}")
            try:
                socket.send_fds(self._control, [message], fds)
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:  # descriptors under way: the zygote is slow
                    raise SandboxUnavailable(f"jail: {error}") from error
                await asyncio.sleep(0.001)

    def _on_message(self) -> None:
        while not self.lost:
            try:
                message, fds, _, _ = socket.recv_fds(
                    self._control, 65_536, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"its socket failed: {error}")
                return
            if not message:
                self._lose(f"the zygote ended unexpectedly. {self.last_words()}")
                return
            if message[:1] in (STARTED, UNUSABLE):
                self._on_start(message)
            else:
                kind, identity, value = REPLY.unpack(message)
                self._on_reply(kind, identity, value, fds)

    def _on_start(self, message: bytes) -> None:
        if self._started.done():
            return
        answer = json.loads(message[1:])
        if message[:1] == STARTED:
            self._started.set_result(answer)
            self._left_behind.append(answer["temporary"])
        else:
            self._started.set_exception(ZygoteFailed(f"{answer['kind']}: {answer['reason']}"))

    def _on_reply(self, kind: bytes, identity: int, value: int, fds: list[int]) -> None:
        if kind == ENDED:
            session = self._sessions.pop(identity, None)
            if session is not None:
                session.on_end(value)
            return
        future = self._spawning.get(identity)
        if future is None or future.done():
            for fd in fds:  # nobody waits for it any more
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)
        elif kind == SPAWNED and fds:
            future.set_result(fds[0])
        elif kind == SPAWNED:
            future.set_exception(SandboxUnavailable("jail: too many open files"))
        elif kind == FAILED:
            self._sessions.pop(identity, None)
            future.set_exception(SandboxUnavailable(f"jail: no new process: {os.strerror(value)}"))

    def _lose(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = reason
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        _hang_up(self._control)
        if not self._started.done():
            self._started.set_exception(ZygoteFailed(reason))
            self._started.exception()
        for future in self._spawning.values():
            if not future.done():
                future.set_exception(SandboxUnavailable(f"jail: {reason}"))
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.on_loss(reason)


def _in_memory(text: str) -> int:
    """The descriptor of a file in memory that holds `text`."""
    fd = os.memfd_create("setup")
    with open(os.dup(fd), "w", encoding="utf-8") as file:
        file.write(text)
    return fd


def _environment() -> dict[str, str]:
    """The zygote's: fixed, and what the loader needs to find the interpreter's libraries."""
    search = os.environ.get("LD_LIBRARY_PATH")
    return {**_ENVIRONMENT, **({"LD_LIBRARY_PATH": search} if search else {})}


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _hang_up(control: socket.socket) -> None:
    """Also for copies of the socket that processes forked from this one may hold."""
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()


def _remove(directories: list[str]) -> None:
    for directory in directories:
        if Path(directory).name.startswith(FILES_PREFIX):
            shutil.rmtree(directory, ignore_errors=True)


def _abandon(
    control: socket.socket, popen: subprocess.Popen[bytes], left_behind: list[str]
) -> None:
    """Let go of a zygote that nobody closed; it ends when its socket does."""
    _hang_up(control)
    try:
        popen.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
    _remove(left_behind)
