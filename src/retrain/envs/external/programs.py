"""The host's end of a fork server: start it, start programs by it, hear of their ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain.types import InfrastructureError, UserError

IMPORT_S = 300.0
"""How long importing the function's module may take."""

_CLOSE_S = 5.0
"""To end the fork server itself, beyond what its programs are given."""

_BEGIN = "import sys; sys.path.insert(0, {directory!r}); from inside.server import main; main()"


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """Its exit code; the signal that killed it, negative."""
    output: str = ""
    """The last 64 KiB that it printed."""
    reward: float | None = None
    metadata: Mapping[str, float] = field(default_factory=dict)
    """What its function returned."""
    fault: str | None = None
    """Why it could not be started, or what is wrong with what its function returned."""


class Running:
    """A program that was asked for.

    Args:
        number: among those of its fork server.
    """

    def __init__(self, server: ForkServerProcess, number: int) -> None:
        self._server = server
        self.number = number
        self.pid: int | None = None
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        """Raises InfrastructureError where the fork server is lost, or there is no room for
        another process."""

    def end(self) -> None:
        """Ask for its end: SIGTERM to its process group, SIGKILL after a while."""
        if not self.ended.done():
            self._server.send({"end": self.number})


class ForkServerProcess:
    """One fork server, on the event loop that started it.

    It ends when this process does, however that happens, and all programs with it.

    Args:
        function: `pkg.module:name` or `/path/to/file.py:name`; None where commands are run.
        preload: import it once, before any program.
        directory: that programs run in.
        variables: the environment of all programs.
        kill_after_s: between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        *,
        function: str | None,
        preload: bool,
        directory: Path,
        variables: Mapping[str, str],
        kill_after_s: float,
    ) -> None:
        self._setup = {
            "function": function,
            "preload": preload,
            "directory": str(directory),
            "kill_after_s": kill_after_s,
            "path": [str(directory), *sys.path],
        }
        self._variables = dict(variables)
        self._kill_after_s = kill_after_s
        self._numbers = itertools.count()
        self._running: dict[int, Running] = {}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self.lost = ""
        """Why it is no longer there; empty while it is."""

    async def start(self) -> None:
        """
        Raises:
            UserError: the function cannot be used.
            InfrastructureError: it did not start.
        """
        begin = _BEGIN.format(directory=str(Path(__file__).parent))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", begin),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=self._said,
                env=self._variables,
                start_new_session=True,
            )
            self.send(self._setup)
            async with asyncio.timeout(IMPORT_S):
                answer = await _read(self._process.stdout)
        except TimeoutError:
            await self.close()
            raise UserError(
                f"environment.function: {self._setup['function']} was not imported within "
                f"{IMPORT_S:g} s",
                "Import less, or leave work for the function itself.",
            ) from None
        except (OSError, EOFError) as error:
            await self.close()
            raise InfrastructureError(
                f"the fork server of programs did not start: {error} {self._last_words()}"
            ) from error
        except BaseException:
            await self.close()
            raise
        if "unusable" in answer:
            await self.close()
            raise UserError(
                f"environment.function: {self._setup['function']} cannot be used: "
                f"{answer['unusable']}",
                "It is imported in a process of its own, in environment.working_dir.",
            )
        self._listening = asyncio.create_task(self._listen())

    def launch(
        self,
        *,
        command: Sequence[str] | None,
        task: Mapping[str, Any],
        variables: Mapping[str, str],
    ) -> Running:
        """Start a program; whoever gets it ends it.

        Args:
            command: None calls the function with `task`.
            variables: added to those of all programs.

        Raises:
            InfrastructureError: the fork server is lost.
        """
        if self.lost:
            raise InfrastructureError(self.lost)
        running = Running(self, next(self._numbers))
        self._running[running.number] = running
        given = None if command is None else list(command)
        call = {"number": running.number, "command": given, "task": task, "variables": variables}
        self.send(call)
        return running

    def send(self, message: Mapping[str, Any]) -> None:
        """It arrives unless the fork server is lost."""
        assert self._process is not None and self._process.stdin is not None
        if self.lost or self._process.stdin.is_closing():
            return
        data = json.dumps(message).encode()
        self._process.stdin.write(len(data).to_bytes(4, "big") + data)

    async def close(self) -> None:
        """End it and every program, and wait until they are gone."""
        process = self._process
        if process is None:
            self._said.close()
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(self._kill_after_s + _CLOSE_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._listening is not None:
            await asyncio.gather(self._listening, return_exceptions=True)
        with contextlib.suppress(OSError):
            await process.stdin.wait_closed()
        self._said.close()

    async def _listen(self) -> None:
        process = self._process
        assert process is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._hear(await _read(process.stdout))
        code = await process.wait()
        if code != 0:  # or it has ended them itself
            for running in self._running.values():
                _kill_group(running.pid)
        self.lost = f"the fork server of programs has ended ({code}) {self._last_words()}".strip()
        for running in self._running.values():
            if not running.ended.done():
                running.ended.set_exception(InfrastructureError(self.lost))
                running.ended.exception()  # it may be that nobody waits for it
        self._running.clear()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "pid" in message:
            self._running[message["number"]].pid = message["pid"]
            return
        running = self._running.pop(message["number"])
        if running.ended.done():
            return
        if "failed" in message:
            running.ended.set_exception(
                InfrastructureError(f"no program could be started: {message['failed']}")
            )
            running.ended.exception()
            return
        result = message["result"] or {}
        running.ended.set_result(
            Ended(
                message["code"],
                message["output"],
                result.get("reward"),
                result.get("metadata", {}),
                result.get("fault"),
            )
        )

    def _last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        if self._said.closed:
            return ""
        said = self._said.fileno()
        end = os.pread(said, 2000, max(0, os.fstat(said).st_size - 2000))
        return end.decode("utf-8", "replace").strip()


async def _read(stream: asyncio.StreamReader | None) -> Any:
    """
    Raises:
        EOFError: there is no further message.
    """
    assert stream is not None
    length = int.from_bytes(await stream.readexactly(4), "big")
    return json.loads(await stream.readexactly(length))


def _kill_group(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
