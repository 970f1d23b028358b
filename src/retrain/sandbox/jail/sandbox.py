"""The jail: full Python on Linux, confined by the kernel's own means, with nothing to install.

A warm zygote forks one process per session. Landlock leaves it a few directories to read, a
seccomp allow-list the system calls that Python needs; it has no network, no capability, no
environment, and by default nothing to write to. It is stopped between calls and killed after.

https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.sandbox.base import Capabilities, SandboxUnavailable, check_limits
from retrain.sandbox.files import read_files
from retrain.sandbox.jail.bubblewrap import bubblewrap_command
from retrain.sandbox.jail.paths import Readable, readable_paths
from retrain.sandbox.jail.process import ZygoteFailed, ZygoteProcess
from retrain.sandbox.jail.selftest import breaches
from retrain.sandbox.jail.session import JailSession
from retrain.sandbox.per_loop import PerLoop
from retrain.types import UserError

PACKAGES = ("numpy", "sympy")
"""Loaded before the first session, and importable in it, unless the config says otherwise."""

_OUTPUT_BYTES_PER_CHAR = 64
_MIN_OUTPUT_BYTES = 2**20
_SELF_TEST_S = 30.0

_log = logging.getLogger(__name__)


class JailSandbox:
    """Sessions forked from one zygote per event loop.

    Sessions start alike: `random` and NumPy's legacy generator are seeded, and strings hash to
    the same numbers in every run.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 5.0,
        memory_mb: int = 256,
        max_output_chars: int = 4000,
        packages: Sequence[str] = PACKAGES,
        files: Mapping[str, str] | None = None,
        writable: bool = False,
        stateful: bool = True,
        max_concurrency: int = 64,
        bubblewrap: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            timeout_s: running time of one call; waiting for its turn is not counted.
            memory_mb: what a session may allocate, beyond what is loaded before it starts.
            max_output_chars: most characters kept of what one call prints, half of them from its
                start and half from its end.
            packages: import names of third-party packages to load beforehand; they and what they
                depend on can be imported.
            files: name in the sandbox to a local path; code starts in the directory that holds
                them.
            writable: give each session a file system of its own in memory, as large as
                `memory_mb`. Needs mount namespaces.
            stateful: keep a session over a rollout's calls.
            max_concurrency: most calls that run at once; further ones wait their turn.
            bubblewrap: run the zygote inside `bwrap`, which hides the rest of the file system
                and of the machine's processes.
            seed: of the generators named above.

        Raises:
            UserError: a file that cannot be read, or a number that cannot be.
        """
        check_limits(
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            max_output_chars=max_output_chars,
            max_concurrency=max_concurrency,
        )
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self.packages = tuple(packages)
        self.writable = writable
        self.stateful = stateful
        self.max_concurrency = max_concurrency
        self.bubblewrap = bubblewrap
        self.seed = seed
        self._files = read_files(files or {})
        self._isolation = "Landlock, a seccomp allow-list, no capabilities, no network"
        self._zygotes = PerLoop(lambda: asyncio.create_task(self._launch()))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            stateful=True,
            full_python=True,
            packages=self.packages,
            files=True,
            writable=self.writable,
            isolation=self._isolation,
        )

    async def start(self) -> None:
        await self._zygote()

    async def session(self) -> JailSession:
        return await self._open(await self._zygote())

    async def close(self) -> None:
        task = self._zygotes.pop()
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await task.result().close()

    async def _open(self, zygote: ZygoteProcess, *, for_self_test: bool = False) -> JailSession:
        session = JailSession(
            zygote,
            timeout_s=_SELF_TEST_S if for_self_test else self.timeout_s,
            max_output_chars=_MIN_OUTPUT_BYTES if for_self_test else self.max_output_chars,
            output_bytes=self._output_bytes,
        )
        await session.open()
        return session

    @property
    def _output_bytes(self) -> int:
        return max(_MIN_OUTPUT_BYTES, _OUTPUT_BYTES_PER_CHAR * self.max_output_chars)

    async def _zygote(self) -> ZygoteProcess:
        """This loop's, started by whoever asks first, and again when it is lost."""
        task = self._zygotes.get()
        if task.done() and not _usable(task):
            if not task.cancelled() and task.exception() is None:
                _log.warning("the jail was lost (%s); starting another", task.result().lost)
            self._zygotes.pop()
            task = self._zygotes.get()
        return await asyncio.shield(task)

    async def _launch(self) -> ZygoteProcess:
        if sys.platform != "linux":
            raise UserError("the jail works on Linux only", "use sandbox type: monty")
        readable = readable_paths(self.packages)
        command = bubblewrap_command(readable) if self.bubblewrap else []
        try:
            zygote = ZygoteProcess(command, self._setup(readable), self.max_concurrency)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):
                raise UserError(
                    f"the jail does not work here: {error}", "retrain doctor says what does"
                ) from error
            raise SandboxUnavailable(f"jail: it could not start: {error}") from error
        try:
            said = await zygote.started()
            found = await breaches(await self._open(zygote, for_self_test=True))
        except ZygoteFailed as error:
            await zygote.close()
            raise UserError(
                f"the jail does not work here: {error}", "retrain doctor says what does"
            ) from error
        except BaseException:
            await zygote.close()
            raise
        if found:
            await zygote.close()
            raise UserError(
                f"the jail does not hold here: code in it could {'; '.join(found)}",
                "retrain doctor says which sandbox does",
            )
        self._isolation = _describe(said, self.writable, self.bubblewrap)
        return zygote

    def _setup(self, readable: Readable) -> dict[str, Any]:
        """What the zygote reads when it starts."""
        return {
            "path": readable.path,
            "readable": readable.readable,
            "listable": readable.listable,
            "importable": readable.importable,
            "packages": self.packages,
            "files": {name: base64.b64encode(data).decode() for name, data in self._files.items()},
            "workplace": readable.workplace,
            "memory_mb": self.memory_mb,
            "output_bytes": self._output_bytes,
            "writable": self.writable,
            "seed": self.seed,
        }


def _usable(task: asyncio.Task[ZygoteProcess]) -> bool:
    return not task.cancelled() and task.exception() is None and not task.result().lost


def _describe(said: Mapping[str, Any], writable: bool, bubblewrap: bool) -> str:
    parts = [
        f"Landlock ABI {said['landlock']}",
        "a seccomp allow-list",
        f"user id {said['uid']} without capabilities",
        "no network",
        "a file system of its own in memory" if writable else "nothing to write to",
    ]
    return ", ".join([*(["bubblewrap"] if bubblewrap else []), *parts])
