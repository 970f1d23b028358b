"""A policy engine over one or more inference servers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.server.dialect import (
    Answer,
    Ask,
    Dialect,
    Interrupted,
    Malformed,
)
from retrain.engines.server.http import Refused, Unreachable
from retrain.engines.server.replica import Replica
from retrain.engines.server.router import Router
from retrain.engines.server.sampled import Sampled, seed_after
from retrain.engines.server.supervisor import Supervisor
from retrain.engines.server.sync import Sync
from retrain.engines.server.weights import Weights
from retrain.engines.stops import StopRules
from retrain.types import InfrastructureError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ATTEMPTS = 5
"""At one request, each of which some server failed."""


AGAIN_S = 0.1
"""Before a request that a server ended by itself is sent again; it doubles each time."""


class ServerEngine:
    """Samples from servers that are given the policy's weights version by version.

    Requests go to the least busy server that is ready, those of a group to the same one. When new
    weights come, what is under way is interrupted: servers give what they have, take the weights,
    forget what they had cached, and the requests go on from there; each token carries the version
    it was sampled under. After every update, and whenever a server comes back, what it gives for a
    probe is held against the policy's own log-probabilities.

    A server that fails or hangs is started again if the run started it, or waited for; it is given
    the newest weights before it is used, and what was under way at it is asked of another.

    Args:
        weights: what the servers are to load.
        context_limit: most tokens of a sequence, prompt and completion together.
        tokenizer: finds stop strings that lie across an interruption.
        tolerance: most nats between a server's log-probability of a probe's token and the policy's.
        most_each: requests at one server at the same time.
        load_timeout_s: of loading weights.
        health_timeout_s: a server that gives no sign of life for this long, three times in a row,
            hangs.
        max_restarts: of one server, with no request answered in between.
    """

    def __init__(
        self,
        dialect: Dialect,
        replicas: Sequence[Replica],
        weights: Weights,
        *,
        context_limit: int,
        tokenizer: Any,
        vocab_size: int,
        tolerance: float,
        most_each: int = 256,
        load_timeout_s: float = 600.0,
        health_timeout_s: float = 10.0,
        max_restarts: int = 3,
        weights_dir: Path | None = None,
    ) -> None:
        self._dialect = dialect
        self._replicas = list(replicas)
        self._weights = weights
        self._rules = StopRules(tokenizer, vocab_size)
        self._weights_dir = weights_dir
        self._sync = Sync(
            dialect,
            weights,
            context_limit=context_limit,
            tolerance=tolerance,
            load_timeout_s=load_timeout_s,
        )
        self._router = Router(len(self._replicas), most_each)
        self._supervisor = Supervisor(
            self._replicas, self._router, self._bring_up, health_timeout_s, max_restarts
        )
        self._directory: Path | None = None
        self._begun = False
        self._update_s = 0.0
        self._closed = False
        self._updating = asyncio.Lock()
        self._at_work: set[asyncio.Task[None]] = set()

    @property
    def context_limit(self) -> int:
        return self._sync.context_limit

    @property
    def version(self) -> int:
        """Of the policy, as it is sampled from now; -1 before the servers have any weights."""
        return self._sync.version

    @property
    def most_sessions(self) -> int | None:
        return None

    @property
    def restarts(self) -> int:
        """How often a server was started again, or came back."""
        return self._supervisor.restarts

    @property
    def measured(self) -> Mapping[str, float]:
        """`probe_gap`: most nats between servers and policy; `update_s`: how long it took."""
        return {"probe_gap": self._sync.gap, "update_s": self._update_s}

    async def prepare(self) -> bool:
        """Look whether servers can be started, or ask those that run already what they can do;
        False, since none is deterministic.

        Raises:
            UserError: one cannot be started or reached, or lacks what is needed.
        """
        launchers = [r.launcher for r in self._replicas if r.launcher is not None]
        await asyncio.gather(*(self._meet(r) for r in self._replicas if r.launcher is None))
        if any(await asyncio.gather(*(launcher.check() for launcher in launchers))):
            self._weights.source.serve_on_cpu()
        return False

    async def _meet(self, replica: Replica) -> None:
        facts = await replica.meet(self._dialect, adapter=self._sync.adapter)
        if facts.context_limit is not None:
            self._sync.context_limit = min(self._sync.context_limit, facts.context_limit)
            self._weights.fit(self._sync.context_limit)

    async def start(self, directory: Path) -> str | None:
        """Where logs, and weights on their way to the servers, are kept.

        Raises:
            UserError: the directory for weights does not exist.
        """
        path = directory.resolve()  # servers may have another working directory
        self._directory = path / "engine"
        root = self._directory / "weights"
        if self._weights_dir is not None:  # which other runs may share, of the same name too
            mark = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
            root = self._weights_dir.resolve() / f"{path.name}-{mark}"
            if not self._weights_dir.is_dir():
                raise UserError(
                    f"engine.weights_dir: there is no directory {self._weights_dir}",
                    "Make it, or leave the key out.",
                )
        self._weights.put_in(root)
        if any(replica.launcher is not None for replica in self._replicas):
            return f"starting {self._dialect.name}; its log: {self._log(0)}"
        return None

    async def generate(self, request: GenerateRequest) -> Completion:
        """Sample one continuation; see `Engine.generate`.

        Raises:
            UserError: an empty prompt, parameters that the server refuses, or servers that do not
                serve the policy's weights.
            InfrastructureError: servers failed again and again, or there are none left.
        """
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise UserError("the prompt has no tokens", "give at least one, such as a start token")
        room = self._sync.context_limit - len(prompt)
        if room < 1:
            return Completion(array("i"), array("f"), array("i"), "context")
        limit = min(params.max_new_tokens, room)
        rule = self._rules.rule(params.stop, params.stop_token_ids)
        sampled = Sampled()
        for_nothing = 0
        while True:
            version, answer = await self._ask(request, sampled.token_ids, limit)
            reason = sampled.extend(answer, version, rule)
            if reason != "aborted":
                break
            if not answer.token_ids and version == self.version:
                for_nothing += 1
                if for_nothing == MAX_ATTEMPTS:
                    raise InfrastructureError(f"a server ended a request {for_nothing} times")
                await asyncio.sleep(AGAIN_S * 2**for_nothing)
            if len(sampled.token_ids) >= limit:
                reason = "length"
                break
        if reason == "length" and limit < params.max_new_tokens:
            reason = "context"
        return Completion(sampled.token_ids, sampled.logprobs, sampled.versions, reason)

    async def _ask(
        self, request: GenerateRequest, sampled: Sequence[int], limit: int
    ) -> tuple[int, Answer]:
        """What some server goes on with, and the version of its weights."""
        token_ids = [*request.prompt_ids, *sampled]
        seed = request.seed if not sampled else seed_after(request.seed, len(sampled))

        def ask(replica: Replica) -> Coroutine[Any, Any, Answer]:
            model, rest = self._sync.model(replica), limit - len(sampled)
            asked = Ask(model, token_ids, request.params, rest, seed)
            return self._dialect.generate(replica.server, asked)

        return await self._at_a_server(request.group, ask)

    async def _at_a_server(
        self, group: str | None, work: Callable[[Replica], Coroutine[Any, Any, T]]
    ) -> tuple[int, T]:
        """What a call gives, and the version that its server has; asked again of the next server
        that is ready while servers fail."""
        failed = 0
        while True:
            number = await self._router.admit(group)
            replica = self._replicas[number]
            version = replica.version
            try:
                if version is None:  # it went down since
                    self._router.set_ready(number, False)
                    continue
                found = await replica.call(work(replica))
            except Interrupted:
                continue
            except (Unreachable, Refused) as error:
                replica.problem = str(error)
                replica.suspected.set()
                if failed:  # the first time the server may merely have been started anew
                    self._refuse_client_errors(error)
                failed += 1
                if failed == MAX_ATTEMPTS:
                    raise InfrastructureError(f"{error} ({failed} attempts)") from error
                self._router.set_ready(number, False)
                continue
            finally:
                self._router.release(number)
            if found is not None:
                replica.failures = 0
                return version, found

    def _refuse_client_errors(self, error: Exception) -> None:
        """A request that the server does not take will not be taken the next time either."""
        if isinstance(error, Refused) and error.status < 500 and error.status not in (408, 429):
            raise UserError(
                f"the {self._dialect.name} server refused a request: {error}",
                "Check engine.context_limit, and that the server runs this model.",
            ) from error

    async def score(self, token_ids: list[int], temperature: float = 1.0) -> array[float]:
        """Log-probability of each token given those before it [T]; 0.0 for the first.

        Raises:
            UserError: a temperature that is not 1: servers know the scores of no other.
        """
        if temperature != 1.0:
            raise UserError(
                f"{self._dialect.name} servers score at temperature 1, not {temperature:g}",
                "score with temperature=1.0",
            )
        if len(token_ids) < 2:
            return array("f", [0.0] * len(token_ids))
        _, scored = await self._at_a_server(
            None,
            lambda replica: self._dialect.score(
                replica.server, self._sync.model(replica), token_ids
            ),
        )
        return scored

    async def end_session(self, session: str) -> None:
        """Nothing: servers forget by themselves."""

    async def update_weights(self, version: int) -> None:
        """Give every server the policy's weights as they are now, and see that it took them.

        The first time, servers of the run's own are started.

        Raises:
            UserError: a server refuses them, or gives other log-probabilities afterwards; or the
                disk is full or not writable.
            InfrastructureError: the engine was closed.
        """
        async with self._updating:
            if self._closed:
                raise InfrastructureError("the engine is closed")
            self._supervisor.check()
            started = time.perf_counter()
            await asyncio.to_thread(self._weights.write, version)
            self._sync.version, self._sync.gap = version, 0.0
            self._router.close()
            try:
                await self._together(self._update(n) for n in range(len(self._replicas)))
            finally:
                self._router.open()
            self._begun = True
            self._supervisor.watch()
            self._update_s = time.perf_counter() - started

    async def _together(self, work: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Do all of it; the first that fails ends the others, and `close` all."""
        tasks = [asyncio.ensure_future(one) for one in work]
        self._at_work.update(tasks)
        if self._closed:
            self._end_work()
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise InfrastructureError("the engine is closed") from None
        finally:
            for task in tasks:
                if not task.cancelling():  # once is enough: it may be letting its server go on
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._at_work.difference_update(tasks)

    def _end_work(self) -> None:
        for task in self._at_work:
            task.cancel()

    async def _update(self, number: int) -> None:
        """New weights for one server; one that cannot be reached gets them when it is back."""
        replica = self._replicas[number]
        if self._begun and replica.version is None:
            return  # it is down; the supervisor brings it up
        self._router.set_ready(number, False)
        try:
            if not self._begun and replica.launcher is not None:
                await self._sync.launch(replica, self._log(number))
            else:
                await self._sync.give(replica)
            await self._sync.compare(replica)
        except (Unreachable, Refused, Malformed) as error:
            replica.doubt()
            if not self._begun or isinstance(error, Malformed):
                raise UserError(
                    f"{replica.name} did not take the weights: {error}",
                    "Look at its log, and at what retrain doctor --engine says of it.",
                ) from error
            self._refuse_client_errors(error)
            logger.warning("%s did not take version %d: %s", replica.name, self.version, error)
            replica.problem = str(error)
        except BaseException:
            replica.doubt()
            raise
        else:
            self._router.set_ready(number, True)

    def _log(self, number: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{self._dialect.name}-{number}.log"

    async def _bring_up(self, number: int) -> None:
        """Make a server that failed usable again: started if need be, with the newest weights."""
        replica = self._replicas[number]
        if replica.launcher is not None and (replica.gone or not replica.started):
            await self._sync.launch(replica, self._log(number))
        while True:
            if replica.version != self._sync.version:
                await self._sync.give(replica)
            async with self._updating:
                if replica.version == self._sync.version:
                    await self._sync.verify(replica)
                    self._router.set_ready(number, True)
                    return

    async def close(self) -> None:
        """End the servers that the run started; requests in flight fail."""
        self._closed = True
        self._router.close()
        self._router.fail(InfrastructureError("the engine is closed"))
        self._end_work()
        await asyncio.gather(*self._at_work, return_exceptions=True)
        await self._supervisor.close()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))
        await asyncio.to_thread(self._weights.clear)
