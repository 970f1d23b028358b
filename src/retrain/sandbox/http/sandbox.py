"""HTTP: code runs on a server that speaks SandboxFusion's `POST /run_code`.

Each call is one request and a fresh process there, so nothing lasts from call to call. How well
the code is contained is the server's business; what it answers is taken as a claim: bounded,
checked for its form, and never trusted.

https://github.com/bytedance/SandboxFusion
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakSet

from retrain.sandbox.base import (
    ALIVE,
    OUT_OF_MEMORY,
    OVER_AFTER,
    Capabilities,
    Result,
    Status,
    check_limits,
    out_of_time,
    over,
)
from retrain.sandbox.files import read_files
from retrain.sandbox.http.answer import Answer, split_traceback
from retrain.sandbox.http.server import (
    MAX_ANSWER_BYTES,
    Server,
    TooLarge,
    Unreachable,
    WrongProtocol,
    printable,
)
from retrain.sandbox.last_expression import assign_last_expression
from retrain.sandbox.output import cut_middle
from retrain.types import UserError

MAX_CODE_CHARS = 100_000
_START_S = 60.0
"""Running time of the self-test at least: packages are slow to import for the first time."""

_SHOW = "__import__('sys').displayhook(_)"
"""The prompt's own way to show a value, which takes no part in what the code names `print`."""

_SELF_TEST = """\
import importlib, os
print("ready", 6 * 7)
for name in {files}:
    print("file" if os.path.isfile(name) else "no file", name)
for name in {packages}:
    try:
        importlib.import_module(name)
        print("package", name, flush=True)
    except BaseException as error:
        print("no package", name, type(error).__name__ + ":", error, flush=True)
"""


class HttpSandbox:
    """Runs code on a server, one request a call."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        memory_mb: int = 256,
        max_output_chars: int = 4000,
        packages: Sequence[str] = (),
        files: Mapping[str, str | Path] | None = None,
        stateful: bool = False,
        max_concurrency: int = 64,
    ) -> None:
        """
        Args:
            url: of the server, with or without `/run_code`. A user name and password in it are
                sent as basic authentication and never shown.
            timeout_s: running time of one call, in seconds; waiting for a connection and for
                the answer's way back come on top.
            memory_mb: memory of one call. Not every server heeds it.
            max_output_chars: most characters kept of what one call prints, and of an error; half
                of them from its start and half from its end.
            packages: what the code must be able to import; `start` tries.
            files: name in the working directory of the code, and the local file to send for it;
                read now, sent with every call.
            stateful: cannot be had here.
            max_concurrency: most requests at once, per event loop; others wait in line.

        Raises:
            UserError: a value that cannot be, or a file that cannot be read.
        """
        check_limits(
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            max_output_chars=max_output_chars,
            max_concurrency=max_concurrency,
        )
        if stateful:
            raise UserError(
                "sandbox type 'http' keeps no variables from call to call",
                "set sandbox.stateful: false, or use sandbox type: jail",
            )
        contents = read_files({name: str(local) for name, local in (files or {}).items()})
        encoded = {name: base64.b64encode(data).decode() for name, data in contents.items()}
        self._server = Server(url, encoded, memory_mb=memory_mb, max_concurrency=max_concurrency)
        self.stateful = False
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self.packages = tuple(packages)
        self.files = tuple(contents)
        self._sessions: WeakSet[HttpSession] = WeakSet()
        self._tested = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            stateful=False,
            full_python=True,
            packages=self.packages,
            files=True,
            writable=True,
            isolation=f"another machine's: whatever runs behind {self._server.shown}",
        )

    async def start(self) -> None:
        """Run a program there, once: it prints, looks for the files and imports the packages.

        Raises:
            UserError: no such server, or it lacks something that was asked for.
            SandboxUnavailable: it failed this time.
        """
        if self._tested:
            return
        async with self._server.starting:
            if not self._tested:
                await self._self_test()
                self._tested = True

    async def session(self) -> HttpSession:
        """A fresh session; the first one runs the self-test of `start`."""
        await self.start()
        session = HttpSession(self)
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """End every session. Calls in other event loops that still run are left to their end."""
        for session in list(self._sessions):
            await session.close()
        await self._server.close()

    async def run_once(self, code: str) -> Result:
        """Run code in a fresh process, when there is a slot for it.

        Raises:
            UserError: the server refused the request.
            SandboxUnavailable: it failed.
        """
        shown = assign_last_expression(code)
        program = code if shown is None else f"{shown}\n{_SHOW}"
        try:
            answer, wall_s = await self._server.run(program, self.timeout_s)
        except TooLarge as failure:  # the self-test passed, so it is the code
            return Result("error", error=f"SyntaxError: too much code: {failure}")
        status, stdout, error = self._judge(answer, self.timeout_s)
        return Result(
            status,
            cut_middle(stdout, self.max_output_chars),
            cut_middle(error, self.max_output_chars),
            wall_s,
            answer is None or len(stdout) > self.max_output_chars,
        )

    def _judge(self, answer: Answer | None, timeout_s: float) -> tuple[Status, str, str]:
        """How the program ended, what it printed and what went wrong."""
        if answer is None:
            return "output", "", f"The code printed more than {MAX_ANSWER_BYTES >> 20} MiB."
        stderr, traceback = split_traceback(answer)
        gap = "\n" if stderr and answer.stdout and not answer.stdout.endswith("\n") else ""
        stdout = answer.stdout + gap + stderr
        code = answer.return_code
        if code is None:
            return "timeout", stdout, out_of_time(timeout_s)
        if code == 0:
            return "ok", stdout, ""
        if answer.out_of_memory:
            return "memory", stdout, OUT_OF_MEMORY
        if traceback:
            return "error", stdout, traceback
        if answer.signal == "SIGKILL":
            why = f"as it is for using more memory than it may ({self.memory_mb} MB)"
            return "killed", stdout, f"The process was killed (SIGKILL), {why}."
        if answer.signal:
            return "killed", stdout, f"The process crashed ({answer.signal})."
        return "exit", stdout, f"SystemExit: {code}"

    async def _self_test(self) -> None:
        program = _SELF_TEST.format(files=list(self.files), packages=list(self.packages))
        timeout_s = max(_START_S, self.timeout_s)
        try:
            answer, _ = await self._server.run(program, timeout_s)
        except Unreachable as failure:
            raise UserError(
                f"sandbox.url: {failure}", "check the address, and that the server is up"
            ) from failure
        except (WrongProtocol, TooLarge) as failure:
            raise UserError(
                f"sandbox.url: {failure}",
                "give the address of a server that speaks SandboxFusion's POST /run_code",
            ) from failure
        _, stdout, error = self._judge(answer, timeout_s)
        lines = stdout.splitlines()
        if "ready 42" not in lines:
            raise UserError(
                f"sandbox.url: {self._server.shown} could not run a test program: "
                f"{printable(error or 'its output did not come back')}",
                "check the server, and that sandbox.memory_mb is enough for Python to start",
            )
        for name in self.files:
            if f"file {name}" not in lines:
                raise UserError(
                    f"sandbox.files: {self._server.shown} does not give '{name}' to the code",
                    "use a server that accepts files, or leave sandbox.files out",
                )
        for name in self.packages:
            if f"package {name}" not in lines:
                prefix = f"no package {name} "
                said = next((x.removeprefix(prefix) for x in lines if x.startswith(prefix)), error)
                raise UserError(
                    f"sandbox.packages: {self._server.shown} cannot import '{name}': "
                    f"{printable(said)}",
                    "install it there, take it off the list, or raise sandbox.memory_mb",
                )


class HttpSession:
    """Carries no state but whether it is over."""

    def __init__(self, sandbox: HttpSandbox) -> None:
        self._sandbox = sandbox
        self._over = ""
        """Why the session cannot run code any more; empty while it can."""
        self._call: asyncio.Task[Result] | None = None

    async def run(self, code: str) -> Result:
        """Run code; `stdout` ends with the repr of a final expression, as at the prompt."""
        if self._over:
            return over(self._over)
        if len(code) > MAX_CODE_CHARS:
            return Result("error", error=f"SyntaxError: more than {MAX_CODE_CHARS} characters")
        if any("\ud800" <= character <= "\udfff" for character in code):
            return Result("error", error="SyntaxError: the code holds half of a surrogate pair")
        self._call = asyncio.ensure_future(self._sandbox.run_once(code))
        try:
            result = await self._call
        except asyncio.CancelledError:
            if self._over and not _being_cancelled():
                return over(self._over)
            self._over = self._over or "a call was cancelled"
            raise
        except BaseException:
            self._over = self._over or "the sandbox failed"
            raise
        if result.status not in ALIVE:
            self._over = self._over or OVER_AFTER[result.status]
        return result

    async def close(self) -> None:
        """End the session, and the call that it may be in."""
        self._over = self._over or "it was closed"
        call = self._call
        if call is None or call.done() or call.get_loop() is not asyncio.get_running_loop():
            return
        call.cancel()
        await asyncio.wait({call})


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
