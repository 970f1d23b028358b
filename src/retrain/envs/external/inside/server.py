"""Starts programs, each in a process group of its own, and ends them.

It reads messages from its standard input and writes messages to its standard output. It ends when
its input does, however the process at the other end died, and all that it started ends with it. A
function is imported before the first program starts: a program is then a fork, not an import.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .function import (
    Function,
    Unusable,
    call,
    exit_code,
    load,
    print_exception,
    use_sdks_once,
)
from .system import (
    adopt_orphans,
    children,
    end_with_parent,
    raise_descriptor_limit,
    read_message,
    restore_descriptor_limit,
    write_message,
)

KEPT_BYTES = 65_536
"""Of the end of what a program prints."""

_READ_BYTES, _READS = 65_536, 64
"""Of a pipe, at once; and how often after the end of a program."""

_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


class Program:
    """One that runs. `output` and `result` are the ends of pipes that are read here."""

    def __init__(self, number: int, pid: int, output: int, result: int) -> None:
        self.number = number
        self.pid = pid
        self.pipes = {output: bytearray(), result: bytearray()}
        self.printed = self.pipes[output]
        self.returned = self.pipes[result]
        self.ending = False
        self.kill_at: float | None = None

    def signal(self, number: int) -> None:
        """To its whole group, or, where that is not made yet, to itself."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def hear(self, pipe: int) -> bytes | None:
        """What is there; nothing where nothing will come, None where nothing has."""
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return None
        kept = self.pipes[pipe]
        kept += data
        del kept[:-KEPT_BYTES]
        return data

    def result(self) -> Any:
        """What its function returned; None where it did not."""
        with contextlib.suppress(ValueError):
            return json.loads(self.returned)
        return None


class ForkServer:
    """
    Args:
        calls, answers: where messages come from and go to.
        setup: `function` (None where commands are run), `preload`, `directory`, `kill_after_s`.

    Raises:
        Unusable: there is no such function.
    """

    def __init__(self, calls: int, answers: int, setup: Mapping[str, Any]) -> None:
        self._calls, self._answers, self._setup = calls, answers, setup
        self._function: Function | None = None
        if setup["function"] is not None and setup["preload"]:
            self._function = load(setup["function"])
            use_sdks_once()
            gc.collect()
            gc.freeze()
        self._soft_limit = raise_descriptor_limit()
        self._programs: dict[int, Program] = {}
        """By process id."""
        self._selector = selectors.DefaultSelector()
        self._woken, self._waking = socket.socketpair()
        for end in (self._woken, self._waking):
            end.setblocking(False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_signal)
        self._selector.register(calls, selectors.EVENT_READ, self._on_call)

    def serve(self) -> None:
        """Until the calls end."""
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                self._wait()

    def close(self) -> None:
        """End every program, and what programs have left behind."""
        self._selector.unregister(self._calls)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._answers)
        for program in self._programs.values():
            self._end(program)
        while self._programs:
            with contextlib.suppress(EOFError):
                self._wait()
        while left := children():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
            self._reap()

    def _wait(self) -> None:
        times = [p.kill_at for p in self._programs.values() if p.kill_at is not None]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in self._selector.select(timeout):
            if self._selector.get_map().get(key.fileobj) == key:  # not gone by an earlier one
                key.data(key.fileobj)
        for program in self._programs.values():
            if program.kill_at is not None and program.kill_at <= time.monotonic():
                program.kill_at = None
                program.signal(signal.SIGKILL)

    def _on_call(self, _: Any) -> None:
        asked = read_message(self._calls)
        if "end" in asked:
            for program in self._programs.values():
                if program.number == asked["end"]:
                    self._end(program)
            return
        try:
            self._start(asked)
        except OSError as error:
            write_message(self._answers, {"number": asked["number"], "failed": str(error)})

    def _on_signal(self, _: Any) -> None:
        heard = self._woken.recv(4096)
        self._reap()
        if signal.SIGTERM in heard:
            raise EOFError

    def _end(self, program: Program) -> None:
        """SIGTERM now, SIGKILL where that has not helped in time."""
        if not program.ending:
            program.ending = True
            program.kill_at = time.monotonic() + self._setup["kill_after_s"]
            program.signal(signal.SIGTERM)

    def _start(self, asked: Mapping[str, Any]) -> None:
        """
        Raises:
            OSError: there is no room for another process.
        """
        ends = [*os.pipe(), *os.pipe()]
        output, printed, result, returned = ends
        try:
            pid = self._fork(asked, printed, returned)
        except OSError:
            for end in ends:
                os.close(end)
            raise
        os.close(printed)
        os.close(returned)
        program = Program(asked["number"], pid, output, result)
        self._programs[pid] = program
        for pipe in program.pipes:
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, self._hearer(program))
        write_message(self._answers, {"number": program.number, "pid": pid})

    def _fork(self, asked: Mapping[str, Any], printed: int, returned: int) -> int:
        """Signals wait meanwhile: until it has its own ways, the child would tell them this one."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(asked, printed, returned)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _hearer(self, program: Program) -> Callable[[int], None]:
        def hear(pipe: int) -> None:
            if program.hear(pipe) == b"":
                self._selector.unregister(pipe)

        return hear

    def _reap(self) -> None:
        """Take every process that has ended: programs, and orphans of theirs."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            program = self._programs.pop(pid, None)
            if program is not None:
                self._finish(program, os.waitstatus_to_exitcode(status))

    def _finish(self, program: Program, code: int) -> None:
        """What is left of its group ends with it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(program.pid, signal.SIGKILL)
        for pipe in program.pipes:
            for _ in range(_READS):
                if not program.hear(pipe):
                    break
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
            os.close(pipe)
        ended = {"number": program.number, "code": code, "result": program.result()}
        ended["output"] = program.printed.decode("utf-8", "replace")
        write_message(self._answers, ended)

    def _become(self, asked: Mapping[str, Any], printed: int, returned: int) -> NoReturn:
        """In the child: the program."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.setsid()
            end_with_parent(signal.SIGKILL)
            self._let_go()
            restore_descriptor_limit(self._soft_limit)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os.close(printed)
            os.environ.update(asked["variables"])
            if asked["command"] is not None:
                self._execute(asked["command"], returned)
            code = self._call(asked["task"], returned)
        except BaseException as error:
            print_exception(error)
        finally:
            os._exit(code)

    def _execute(self, command: list[str], returned: int) -> NoReturn:
        try:
            os.chdir(self._setup["directory"])
            os.execvp(command[0], command)
        except OSError as error:
            _give(returned, {"fault": f"{error.strerror}: {error.filename}"})
            os._exit(127)

    def _call(self, task: dict[str, Any], returned: int) -> int:
        """The exit code."""
        atexit._clear()  # those that the import registered are not this process's
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            function = self._function or load(self._setup["function"])
            _give(returned, call(function, task))
            return 0
        except SystemExit as error:
            return exit_code(error)
        except Unusable as error:
            _give(returned, {"fault": str(error)})
            return 1
        except BaseException as error:
            print_exception(error)
            return 1
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()

    def _let_go(self) -> None:
        """Of what the child has of its parent's."""
        for program in self._programs.values():
            for pipe in program.pipes:
                os.close(pipe)
        self._selector.close()
        self._woken.close()
        self._waking.close()
        os.close(self._calls)
        os.close(self._answers)


def _give(pipe: int, result: dict[str, Any]) -> None:
    data = json.dumps(result).encode()
    if len(data) > KEPT_BYTES:
        data = json.dumps({"fault": f"it returned {len(data)} bytes of numbers"}).encode()
    os.write(pipe, data)


def main() -> None:
    adopt_orphans()
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (0, 1))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    setup = read_message(calls)
    sys.path[:] = setup["path"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "inside"]:
        del sys.modules[name]
    try:
        if setup["function"] is not None:
            os.chdir(setup["directory"])
        server = ForkServer(calls, answers, setup)
    except (Unusable, OSError) as error:
        write_message(answers, {"unusable": str(error)})
        return
    write_message(answers, {"ready": True})
    try:
        server.serve()
    finally:
        server.close()
