"""One server: how it is started, whether it is well, and what is under way at it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from retrain.engines.server.dialect import (
    FULL,
    GENERATE,
    INTERRUPT,
    LORA,
    POLICY,
    Dialect,
    Facts,
    Launch,
    Malformed,
    healthy,
)
from retrain.engines.server.http import Refused, Server, Unreachable
from retrain.engines.server.process import ServerProcess, free_port, has_module
from retrain.types import UserError

POLL_S = 0.25
"""Between looks at a server that is starting."""

QUIET_S = 1.0
"""Of what was told to stop, what says nothing for so long has nothing to say."""

T = TypeVar("T")


class NotStarted(UserError):
    """A server that the run starts ended, or was not well in time."""


@dataclass
class Launcher:
    """How the run starts servers of its own.

    Args:
        python: interpreter of the environment that has the server.
        dtype: of weights and activations, as servers name it.
        lora_rank: None serves no adapters.
        args: further arguments of the command line.
        variables: added to the server's environment.
        start_timeout_s: until it has to be well.
    """

    dialect: Dialect
    python: str
    dtype: str
    lora_rank: int | None = None
    args: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600.0
    cpu: bool = field(default=False, init=False)
    """Whether the server's build is one for CPUs; known once `check` has looked."""

    async def check(self) -> bool:
        """Whether the interpreter's build of the server is one for CPUs.

        Raises:
            UserError: there is no such interpreter, or it has no such server.
        """
        self.cpu = await has_module(self.python, self.dialect.module, self.variables)
        return self.cpu

    async def start(
        self, model: Path | str, context_limit: int, log: Path
    ) -> tuple[Server, ServerProcess]:
        """A server that is well.

        Raises:
            NotStarted: it ended, or was not well in time; says what it wrote last.
        """
        port = free_port()
        launch = Launch(model, port, self.dtype, context_limit, self.lora_rank, self.cpu, self.args)
        variables = {**self.dialect.environment(), **self.variables}
        process = ServerProcess([self.python, *self.dialect.command(launch)], variables, log)
        server = Server(f"http://127.0.0.1:{port}")
        await process.start()
        try:
            async with asyncio.timeout(self.start_timeout_s):
                while not await healthy(server):
                    if not process.running:
                        raise NotStarted(
                            f"the {self.dialect.name} server did not start: "
                            f"{process.cause() or 'it wrote nothing'}",
                            f"Its log: {log}",
                        )
                    await asyncio.sleep(POLL_S)
                if not process.running:  # somebody else's server has taken the port
                    raise NotStarted(
                        f"the {self.dialect.name} server did not start: {process.cause()}",
                        f"Its log: {log}",
                    )
        except BaseException as error:
            await server.close()
            await process.stop()
            if isinstance(error, TimeoutError):
                raise NotStarted(
                    f"the {self.dialect.name} server was not well within "
                    f"{self.start_timeout_s:g} s (engine.start_timeout_s): {process.cause()}",
                    f"Its log: {log}",
                ) from None
            raise
        return server, process


class Replica:
    """
    Args:
        server: that runs already; None for one that `launcher` starts.
    """

    def __init__(self, *, server: Server | None = None, launcher: Launcher | None = None) -> None:
        self._server = server
        self.launcher = launcher
        self.process: ServerProcess | None = None
        self.model = POLICY
        """The name that requests call the model by."""
        self.version: int | None = None
        """Of the weights that it was last seen to have."""
        self.failures = 0
        """Since it last answered a request."""
        self.problem = ""
        """What went wrong last."""
        self.loading = False
        self.suspected = asyncio.Event()
        self._name = "a server that is being started"
        self._calls: set[asyncio.Task[Any]] = set()

    @property
    def server(self) -> Server:
        if self._server is None:
            raise Unreachable("the server is being started")
        return self._server

    @property
    def started(self) -> bool:
        return self._server is not None

    @property
    def name(self) -> str:
        """Its address; while it is down, the one that it had."""
        if self._server is not None:
            self._name = self._server.url
        return self._name

    async def meet(self, dialect: Dialect, *, adapter: bool) -> Facts:
        """What a server that runs already says of itself; it is asked for its own model from now
        on.

        Raises:
            UserError: it cannot be reached, or cannot do what training needs.
        """
        try:
            facts = await dialect.facts(self.server)
        except (Unreachable, Refused, Malformed) as error:
            raise UserError(
                f"engine.urls: {self.name} is no {dialect.name} server that can be used: {error}",
                f"retrain doctor --engine {self.name} says what it is.",
            ) from error
        if missing := facts.missing(GENERATE, INTERRUPT, LORA if adapter else FULL):
            raise UserError(
                f"engine.urls: {self.name} ({facts.server} {facts.version}) cannot do what "
                f"training needs: {'; '.join(missing)}",
                f"retrain doctor --engine {self.name} lists what it can.",
            )
        self.model = facts.model
        return facts

    @contextmanager
    def loads(self) -> Iterator[None]:
        """Meanwhile its signs of life do not count: the load has a time limit of its own."""
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    async def launch(self, model: Path | str, context_limit: int, log: Path) -> None:
        """Start the server, or start it anew.

        Raises:
            NotStarted: it does not start.
        """
        assert self.launcher is not None
        await self.stop()
        self._server, self.process = await self.launcher.start(model, context_limit, log)

    async def stop(self) -> None:
        """End the server if the run started it, and all calls to it."""
        await self.cut_off()
        self.version = None
        if self._server is not None:
            self._name = self._server.url
            await self._server.close()
        if self.launcher is not None:
            self._server = None
        if self.process is not None:
            await self.process.stop()
            self.process = None

    def doubt(self) -> None:
        """Nobody knows what weights it has: it is to be looked after."""
        self.version = None
        self.suspected.set()

    async def trouble(self, every_s: float) -> None:
        """Wait until there is reason to look: the process ended, a call failed, or it is time."""
        waits: list[asyncio.Task[Any]] = [asyncio.ensure_future(self.suspected.wait())]
        if self.process is not None:
            waits.append(asyncio.ensure_future(self.process.ended()))
        try:
            await asyncio.wait(waits, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    @property
    def gone(self) -> bool:
        """Whether its process has ended."""
        return self.process is not None and not self.process.running

    async def call(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What a call gives; None where `settle` or `cut_off` ended it with nothing."""
        task = asyncio.ensure_future(work)
        self._calls.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._calls.discard(task)
            task.cancel()
        if task.cancelled():
            return None
        return task.result()

    async def settle(self) -> None:
        """Let the calls under way say what they have; end those that say nothing, such as calls
        that the server had not received when it was paused."""
        while self._calls:
            done, _ = await asyncio.wait(
                set(self._calls), timeout=QUIET_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            await asyncio.sleep(0)  # for `call` to take it
        await self.cut_off()

    async def cut_off(self) -> None:
        """End all calls."""
        calls = set(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
