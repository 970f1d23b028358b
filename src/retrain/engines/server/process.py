"""A server in a process of its own, which ends with the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.engines.server.keeper import GRACE_S
from retrain.types import UserError

KEEPER = Path(__file__).with_name("keeper.py")

SHOWN_LINES, SHOWN_CHARS = 2, 300
"""Of the end of a log, and of a line of it, in an error."""

_RAISED = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): .+")

_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""They speak of the environment of this interpreter, not of the server's."""

_ASK = """
import importlib.metadata as m, importlib.util, json, sys
names = {d.metadata["Name"] for d in m.distributions()}
found = importlib.util.find_spec(sys.argv[1]) is not None
print(json.dumps({"found": found, "cpu": f"{sys.argv[1]}-cpu" in names}))
"""


class ServerProcess:
    """
    Args:
        command: what to run.
        variables: added to the environment of this process.
        log: where standard output and error go, behind what is there.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._command = list(command)
        self._variables = dict(variables)
        self.log = log
        self._begun_at = 0
        self._keeper: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; that it can be reached is for the caller to find out."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._begun_at = log.tell()
            self._keeper = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(KEEPER), *self._command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._variables),
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._keeper is not None and self._keeper.returncode is None

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self._keeper is not None
        return await self._keeper.wait()

    async def stop(self) -> None:
        """End it and whatever it started."""
        keeper = self._keeper
        if keeper is None or keeper.returncode is not None:
            return
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            async with asyncio.timeout(GRACE_S + 5.0):
                await keeper.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                keeper.kill()
            await keeper.wait()

    def cause(self) -> str:
        """What its log says of why it ended, for an error: the first exception since it was
        started, which later ones follow from, and the last lines."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._begun_at)
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raised = next((found[0] for line in lines if (found := _RAISED.search(line))), None)
        shown = [raised] if raised is not None else []
        shown += [line for line in lines[-SHOWN_LINES:] if raised is None or raised not in line]
        return " / ".join(line[:SHOWN_CHARS] for line in shown)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, without what speaks of its own Python, and `variables`."""
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    return inherited | dict(variables)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def has_module(python: str, module: str, variables: Mapping[str, str]) -> bool:
    """Look into another Python environment; whether its build of the module is one for CPUs.

    Raises:
        UserError: there is no such interpreter, or it lacks the module.
    """
    next_step = f"Give the interpreter of an environment that {module} is installed in."
    try:
        asked = await asyncio.create_subprocess_exec(
            *(python, "-c", _ASK, module),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(variables),
        )
    except OSError as error:
        raise UserError(
            f"engine.python: {python} cannot be run: {error.strerror}", next_step
        ) from None
    said, complaint = await asked.communicate()
    try:
        answer: Any = json.loads(said)
    except ValueError:
        shown = " ".join(complaint.decode(errors="replace").split())[-200:]
        raise UserError(
            f"engine.python: {python} is no Python interpreter: {shown}", next_step
        ) from None
    if not answer["found"]:
        raise UserError(f"engine.python: {python} has no module {module}", next_step)
    return bool(answer["cpu"])
