"""What all rollouts share: the policy's HTTP server, and the fork server of the programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from retrain.envs.external.given import absolute, check_command, inherited
from retrain.envs.external.programs import ForkServerProcess
from retrain.gateway.ask import Ask, Reply
from retrain.gateway.seats import Seat, Seats
from retrain.gateway.server import GatewayServer
from retrain.gateway.session import Session
from retrain.gateway.variables import variables as gateway_variables
from retrain.types import UserError


class Service:
    """Starts with the first rollout; a fork server that is lost is started again.

    Args: as those of `ExternalEnvironment`.

    Raises:
        UserError: there is no such program, file, directory or variable.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] | None = None,
        function: str | None = None,
        preload: bool = True,
        working_dir: str | None = None,
        env: Mapping[str, str | None] | None = None,
        kill_after_s: float = 5.0,
    ) -> None:
        if (command is None) == (function is None):
            raise UserError("environment: give exactly one of command and function", "Do.")
        self.directory = Path(working_dir or ".").resolve()
        if not self.directory.is_dir():
            raise UserError(
                f"environment.working_dir: there is no directory {self.directory}", "Make it."
            )
        self.command = None if command is None else list(command)
        self.function = None if function is None else absolute(function)
        self.name = str(function) if command is None else " ".join(command)
        """As the user wrote it."""
        self.preload = preload
        self.variables = inherited(env or {})
        self.kill_after_s = kill_after_s
        self.program: str | None = None
        """Where the command's program is."""
        if self.command is not None:
            path = self.variables.get("PATH")
            self.program = check_command(self.command, self.directory, path)
        self._seats = Seats()
        self._gateway: GatewayServer | None = None
        self._programs: ForkServerProcess | None = None
        self._lock = asyncio.Lock()

    async def started(self) -> ForkServerProcess:
        """
        Raises:
            UserError: the function cannot be used.
            InfrastructureError: the fork server did not start.
        """
        async with self._lock:
            if self._gateway is None:
                gateway = GatewayServer(self._seats)
                await gateway.start()
                self._gateway = gateway
            if self._programs is not None and self._programs.lost:
                await self._programs.close()
                self._programs = None
            if self._programs is None:
                self._programs = await self._fork_server(self._gateway.url, preload=self.preload)
            return self._programs

    async def check(self) -> None:
        """Find out whether there is the function; nothing is left running.

        Raises:
            UserError, InfrastructureError: as `started`.
        """
        if self.function is not None:
            programs = await self._fork_server("http://127.0.0.1:9", preload=True)
            await programs.close()

    async def _fork_server(self, url: str, *, preload: bool) -> ForkServerProcess:
        """While a module is imported there is no session: a client that it makes then asks nobody
        else, and is refused."""
        found = self.variables
        if self.function is not None:
            found = found | gateway_variables(url, None, "no-session-yet")
        programs = ForkServerProcess(
            function=self.function,
            preload=preload,
            directory=self.directory,
            variables=found,
            kill_after_s=self.kill_after_s,
        )
        await programs.start()
        return programs

    @asynccontextmanager
    async def seat(self, session: Session) -> AsyncIterator[tuple[str, Seat]]:
        """The server's URL, and a place at it that lasts as long as this. What is asked for at the
        end is not answered any more: nobody is there to read it."""
        assert self._gateway is not None
        visit = _Visit(session)
        seat = self._seats.open(visit)
        try:
            yield self._gateway.url, seat
        finally:
            self._seats.close(seat.name)
            await visit.end()

    async def close(self) -> None:
        """The programs first: what they ask meanwhile is answered."""
        async with self._lock:
            programs, self._programs = self._programs, None
            gateway, self._gateway = self._gateway, None
            if programs is not None:
                await programs.close()
            if gateway is not None:
                await gateway.close()


class _Visit:
    """A session that knows what it is asked for at the moment."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._under_way: set[asyncio.Task[Any]] = set()

    async def answer(self, ask: Ask) -> Reply:
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            return await self._session.answer(ask)
        finally:
            self._under_way.discard(task)

    def undelivered(self, reply: Reply) -> None:
        self._session.undelivered(reply)

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        self._session.note(reward, metadata)

    async def end(self) -> None:
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
