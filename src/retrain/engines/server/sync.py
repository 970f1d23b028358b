"""Weights into servers, and proof that they serve them."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from retrain.engines.server.dialect import (
    ADAPTER,
    CONTROL_S,
    PROBE_S,
    Ask,
    Dialect,
    Malformed,
)
from retrain.engines.server.http import Refused, Unreachable
from retrain.engines.server.replica import Replica
from retrain.engines.server.weights import PROBE_PARAMS, Expected, Weights
from retrain.types import UserError

T = TypeVar("T")


class Sync:
    """
    Args:
        context_limit: most tokens of a sequence.
        tolerance: most nats between a server's log-probability of a probe's token and the policy's.
        load_timeout_s: of loading weights.
    """

    def __init__(
        self,
        dialect: Dialect,
        weights: Weights,
        *,
        context_limit: int,
        tolerance: float,
        load_timeout_s: float,
    ) -> None:
        self._dialect = dialect
        self._weights = weights
        self.context_limit = context_limit
        self._tolerance = tolerance
        self._load_timeout_s = load_timeout_s
        self.version = -1
        """Of the policy, as servers are to serve it; -1 before they have any weights."""
        self.gap = 0.0
        """Most nats between servers and policy since `version` was set."""

    @property
    def adapter(self) -> bool:
        return self._weights.source.adapter

    def model(self, replica: Replica) -> str:
        """The name that the policy has at a server."""
        return ADAPTER if self.adapter else replica.model

    async def launch(self, replica: Replica, log: Path) -> None:
        """Start a server with the newest weights."""
        newest = self._weights.newest
        with self._weights.held(newest):
            model = await asyncio.to_thread(self._weights.base) if self.adapter else newest.path
            await replica.launch(model, self.context_limit, log)
            if self.adapter:
                await self.give(replica)
            else:
                replica.version = newest.number

    @property
    def _first(self) -> bool:
        """Whether no server has shown yet that it serves the policy."""
        return self._weights.expected is None

    async def give(self, replica: Replica) -> None:
        """Interrupt a server, have it load the newest weights, and let it go on."""
        newest = self._weights.newest
        load = self._dialect.load_adapter if self.adapter else self._dialect.load
        with self._weights.held(newest), replica.loads():
            server = replica.server
            try:
                await self._dialect.pause(server)
                await replica.settle()
                await load(server, newest.path, newest.number, self._load_timeout_s)
                await self._dialect.resume(server)
            except BaseException:
                replica.version = None  # nobody knows what it has now
                with contextlib.suppress(Unreachable, Refused, TimeoutError):
                    async with asyncio.timeout(PROBE_S):
                        await self._dialect.resume(server)
                raise
        replica.version = newest.number

    async def compare(self, replica: Replica) -> None:
        """Have the server sample, and hold its log-probabilities against the policy's, which must
        not be changing meanwhile."""
        prompt = self._weights.prompt
        ask = Ask(
            model=self.model(replica),
            token_ids=prompt,
            params=PROBE_PARAMS,
            max_tokens=min(PROBE_PARAMS.max_new_tokens, self.context_limit - len(prompt)),
            seed=self.version,
        )
        answer = await _in_time(replica, self._dialect.generate(replica.server, ask))
        if not answer.token_ids:
            raise Malformed(f"{replica.name} sampled nothing for the probe ({answer.reason})")
        probed, plain = await asyncio.to_thread(self._weights.expect, answer.token_ids)
        self._check(replica, probed.gap(answer.logprobs))
        self._weights.expected = plain

    async def verify(self, replica: Replica) -> None:
        """See that a server serves the newest weights, whatever the policy is by now; one that
        does not is given them once more."""
        expected = self._weights.expected
        if (
            expected is None
            or expected.gap(await self._score(replica, expected)) <= self._tolerance
        ):
            return
        await replica.cut_off()  # it is being asked under weights that it should not have
        await self.give(replica)
        self._check(replica, expected.gap(await self._score(replica, expected)))

    async def _score(self, replica: Replica, expected: Expected) -> array[float]:
        work = self._dialect.score(replica.server, self.model(replica), expected.token_ids)
        return (await _in_time(replica, work))[expected.start :]

    def _check(self, replica: Replica, gap: float) -> None:
        self.gap = max(self.gap, gap)
        if not gap <= self._tolerance:
            raise UserError(
                f"{replica.name} does not serve version {self.version} of the policy: on a probe "
                f"its log-probabilities differ by up to {gap:.2g} nats (engine.probe_tolerance "
                f"{self._tolerance:g})",
                self._weights.source.advice(self._first),
            )


async def _in_time(replica: Replica, work: Awaitable[T]) -> T:
    """
    Raises:
        Unreachable: no answer for long.
    """
    try:
        async with asyncio.timeout(CONTROL_S):
            return await work
    except TimeoutError:
        raise Unreachable(f"{replica.name}: no answer to a probe in {CONTROL_S:g} s") from None
