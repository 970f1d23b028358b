"""The strongest executor that works here, found by trying."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from retrain.sandbox.base import Capabilities, Sandbox, SandboxUnavailable, Session
from retrain.sandbox.per_loop import PerLoop
from retrain.types import UserError

_log = logging.getLogger(__name__)


class AutoSandbox:
    """The first of several sandboxes whose start-up self-test passes.

    There is no plain subprocess among them: where none works, nothing runs.
    """

    def __init__(self, candidates: Mapping[str, Sandbox]) -> None:
        """
        Args:
            candidates: by name, strongest first; each can do all that is asked for.
        """
        self.candidates = candidates
        self.stateful = next(iter(candidates.values())).stateful
        self._chosen: Sandbox | None = None
        self._choosing = PerLoop(asyncio.Lock)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the one that was chosen; before `start`, of the strongest."""
        return (self._chosen or next(iter(self.candidates.values()))).capabilities

    async def start(self) -> None:
        await (await self._choose()).start()

    async def session(self) -> Session:
        return await (await self._choose()).session()

    async def close(self) -> None:
        """All of them: one may be starting still."""
        for sandbox in self.candidates.values():
            await sandbox.close()

    async def _choose(self) -> Sandbox:
        async with self._choosing.get():
            if self._chosen is None:
                self._chosen = await self._first_that_works()
            return self._chosen

    async def _first_that_works(self) -> Sandbox:
        reasons = []
        for name, sandbox in self.candidates.items():
            try:
                await _start(sandbox)
            except (UserError, SandboxUnavailable) as error:
                await sandbox.close()
                reasons.append(f"{name}: {' '.join(str(error).split())}")
                continue
            because = f" ({'; '.join(reasons)})" if reasons else ""
            _log.log(
                logging.WARNING if reasons else logging.INFO,
                "sandbox: %s%s. %s",
                name,
                because,
                sandbox.capabilities.isolation,
            )
            return sandbox
        raise UserError(
            f"no sandbox works here: {'; '.join(reasons)}",
            "run `retrain doctor`; code of the model never runs without one",
        )


async def _start(sandbox: Sandbox) -> None:
    """Twice, when it fails this time: a weaker one is for good."""
    try:
        await sandbox.start()
    except SandboxUnavailable:
        await sandbox.start()
