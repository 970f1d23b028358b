"""The in-process engine: samples from the module that the learner trains, or from a copy of it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import queue
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.exact import changes_rotary_tables
from retrain.engines.sampling import Uniforms
from retrain.engines.scheduler import Job, Outcome, Scheduler
from retrain.engines.stops import StopRules
from retrain.models.forward import architecture_setting, unwrap
from retrain.models.scores import selected_logprobs
from retrain.types import InfrastructureError, UserError

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""In a row, without a request completed in between."""

CLOSE_S = 30.0
"""How long `close` waits for the decode thread; one that hangs is left behind."""

T = TypeVar("T")


class TorchEngine:
    """Continuous batching over any causal language model of transformers.

    The module is used in place: it reads the learner's weights, so `update_weights` copies
    nothing and only voids the caches. Whoever trains the module must not do so while requests
    are in flight. The engine puts it in evaluation mode when it starts to generate and leaves
    it there: a learner calls `model.train()` at the start of its own update if it needs
    dropout or gradient checkpointing. With `own_weights` the two never touch the same module, and
    the learner may work while requests are in flight. Decoding runs in one thread, started by the
    first call.

    When decoding fails, everything but the weights is made anew, and the requests under way are
    issued again with their own seeds, up to MAX_RESTARTS times in a row; then they fail.

    Args:
        model: a causal language model, PEFT-wrapped or not, on any one device.
        tokenizer: needed for stop strings only.
        max_slots: most sequences decoded, or kept for a waiting session, at once.
        context_limit: most tokens of a sequence; the model's `max_position_embeddings` if None.
        num_threads: CPU threads of the decode thread's operations; torch's own choice if None.
            One is best for tiny models, whose steps are too short to share.
        version: the policy version of the weights as they are now.
        deterministic: what a request gets depends on its own tokens and seed alone, to the bit,
            whatever its company and however long its session's tools took. True fails at the first
            request where that cannot be had (`engines.exact`), None then does without; on a CPU
            only. Sessions keep their slots until `end_session`, and prefixes that rows share are
            read by each.
        own_weights: sample from a copy of the parameters that train, as they were at the last
            `update_weights`; frozen parameters and buffers are shared with the module.

    Raises:
        UserError: `context_limit` is missing and the architecture names none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        max_slots: int = 128,
        context_limit: int | None = None,
        num_threads: int | None = None,
        version: int = 0,
        deterministic: bool | None = False,
        own_weights: bool = False,
    ) -> None:
        self._context_limit = context_limit or architecture_setting(
            model, "max_position_embeddings"
        )
        if not self._context_limit:
            raise UserError(
                f"{type(unwrap(model)).__name__} names no context limit",
                "pass context_limit=... to TorchEngine",
            )
        self._model = _sharing_copy(model) if own_weights else model
        self._followed = _trained_pairs(self._model, model) if own_weights else []
        self._num_threads = num_threads
        self._vocab_size: int = unwrap(model).get_output_embeddings().weight.shape[0]
        self._rules = StopRules(tokenizer, self._vocab_size)
        self._max_slots = max_slots
        self._deterministic = deterministic
        self._prepared = False
        self._scheduler = self._make_scheduler(version, exact=deterministic is not False)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._arrived: list[Job] = []
        self._in_flight: dict[Job, None] = {}
        """In the order of arrival; the decode thread's own."""
        self._restarts = 0
        self._restarts_in_a_row = 0
        self._prefilled_before = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def context_limit(self) -> int:
        return int(self._context_limit)

    def _make_scheduler(self, version: int, *, exact: bool) -> Scheduler:
        limit = self.context_limit
        return Scheduler(self._model, self._max_slots, limit, version, exact=exact)

    async def prepare(self) -> bool:
        """Find out how the model is run, before the first request does; whether the engine is
        deterministic.

        Raises:
            UserError: it was asked to be, and cannot.
        """

        def run() -> bool:
            try:
                self._scheduler.prepare()
            except UserError as error:
                if self._deterministic is not None:
                    raise
                logger.info("%s", error)
                self._scheduler = self._make_scheduler(self._scheduler.version, exact=False)
                self._scheduler.prepare()
            return self._scheduler.exact

        exact = await self._in_thread(run)
        self._prepared = True
        return exact

    async def start(self, directory: Path) -> str | None:
        """Nothing: the engine leaves nothing behind, and is there at once."""
        return None

    @property
    def most_sessions(self) -> int | None:
        """How many sessions may be under way without waiting for each other's slots to come free;
        None where those that wait for their tools give way."""
        return self._scheduler.max_slots if self._scheduler.exact else None

    @property
    def version(self) -> int:
        """Of the policy, as it is sampled from now."""
        return self._scheduler.version

    @property
    def prefilled_tokens(self) -> int:
        """Context tokens run in prefill calls so far; copied and cached ones do not count."""
        return self._prefilled_before + self._scheduler.prefilled_tokens

    @property
    def measured(self) -> Mapping[str, float]:
        """Nothing: weights are there at once."""
        return {}

    @property
    def restarts(self) -> int:
        """How often decoding failed and began again."""
        return self._restarts

    async def generate(self, request: GenerateRequest) -> Completion:
        """Sample one continuation; see `Engine.generate`.

        Raises:
            UserError: an empty prompt, a token id outside the vocabulary, sampling parameters
                that make no sense, or logits that are not finite.
            InfrastructureError: decoding failed again and again; its cause is chained.
        """
        self._check(request)
        params = request.params
        rule = self._rules.rule(params.stop, params.stop_token_ids)
        if len(request.prompt_ids) >= self.context_limit:
            return Completion(array("i"), array("f"), array("i"), "context")
        if self._deterministic is not False and not self._prepared:
            await self.prepare()
        loop = asyncio.get_running_loop()
        job = Job(request, rule, loop.create_future(), loop)
        # What is asked for in the same turn of the event loop is admitted together: a group
        # then shares its prefill.
        self._arrived.append(job)
        if len(self._arrived) == 1:
            loop.call_soon(self._hand_over)
        try:
            return await job.future
        except asyncio.CancelledError:
            job.cancelled = True
            if not self._closed:
                self._post(lambda: self._cancel(job))
            raise

    def _check(self, request: GenerateRequest) -> None:
        prompt, params = request.prompt_ids, request.params
        if not prompt:
            raise UserError("the prompt has no tokens", "give at least one, such as a start token")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise UserError(
                f"the prompt has token ids outside the vocabulary of {self._vocab_size}",
                "use the model's own tokenizer",
            )
        if params.max_new_tokens < 1 or params.temperature < 0 or params.top_k < 0:
            raise UserError(
                f"sampling parameters out of range: {params}",
                "max_new_tokens is at least 1; temperature and top_k are not negative",
            )
        if not 0 < params.top_p <= 1:
            raise UserError(f"top_p is {params.top_p}", "use a value above 0 and up to 1")

    def _hand_over(self) -> None:
        jobs, self._arrived = self._arrived, []
        try:
            self._post(lambda: self._submit(jobs))
        except InfrastructureError as error:
            for job in jobs:
                _settle(job.future, error)

    async def score(self, token_ids: list[int], temperature: float = 1.0) -> array[float]:
        """Log-probability of each token given those before it [T]; 0.0 for the first."""

        def run() -> array[float]:
            if self._model.training:
                self._model.eval()
            device = next(self._model.parameters()).device
            ids = torch.tensor([token_ids], device=device)
            mask = torch.ones_like(ids, dtype=torch.bool)
            mask[:, 0] = False
            lengths = torch.tensor([len(token_ids)], device=device)
            logprobs = selected_logprobs(self._model, ids, lengths, mask, temperature)
            return array("f", logprobs[0].tolist())

        return await self._in_thread(run) if token_ids else array("f")

    async def end_session(self, session: str) -> None:
        await self._in_thread(lambda: self._scheduler.end_session(session))

    async def update_weights(self, version: int) -> None:
        """The module's weights are now those of `version`: caches are void, copies are renewed.

        A request in flight goes on under the new weights; its tokens carry their own versions.
        """

        def run() -> None:
            for own, learners in self._followed:
                own.copy_(learners)
            try:
                self._scheduler.set_version(version)
            except Exception as error:
                self._recover(error)

        await self._in_thread(run)

    async def close(self) -> None:
        """Stop the decode thread; requests in flight fail with InfrastructureError."""
        self._closed = True
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_S)
            self._thread = None

    async def _in_thread(self, run: Callable[[], T]) -> T:
        """Call between two decode steps, where nothing else touches the model."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                result: T | BaseException = run()
            except BaseException as error:
                result = error
            _post_to(loop, lambda: _settle(future, result))

        self._post(call)
        return await future

    def _post(self, command: Callable[[], None]) -> None:
        if self._closed:
            raise InfrastructureError("the engine is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
            self._thread.start()
        self._inbox.put(command)

    def _decode(self) -> None:
        """The thread's main function.

        Inference mode is a tenth faster than `no_grad`, but what a forward pass leaves in the
        module under it cannot take part in the learner's backward pass. Rotary tables that
        change with the context are such a thing.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # of this thread only
        changing = changes_rotary_tables(self._model)
        # The order matters: inference_mode(False) switches gradients on.
        with torch.inference_mode(not changing), torch.no_grad():
            self._work()

    def _work(self) -> None:
        """Commands between steps, steps while there is work."""
        while True:
            try:
                while not self._scheduler.busy or not self._inbox.empty():
                    command = self._inbox.get()
                    if command is None:
                        self._fail(InfrastructureError("the engine was closed"))
                        return
                    command()
                self._deliver(self._scheduler.advance())
            except BaseException as error:
                self._recover(error)

    def _submit(self, jobs: list[Job]) -> None:
        self._in_flight |= dict.fromkeys(job for job in jobs if not job.cancelled)
        self._scheduler.submit(jobs)

    def _cancel(self, job: Job) -> None:
        self._in_flight.pop(job, None)
        self._scheduler.cancel(job)

    def _recover(self, error: BaseException) -> None:
        """Begin again with nothing cached, and issue what is under way again, or give it up."""
        before = self._scheduler
        self._prefilled_before += before.prefilled_tokens
        self._scheduler = self._make_scheduler(before.version, exact=before.exact)
        cause = f"decoding failed: {type(error).__name__}: {error}"
        if isinstance(error, UserError):
            self._fail(error)
        elif self._restarts_in_a_row == MAX_RESTARTS:
            failure = InfrastructureError(f"{cause} (after {MAX_RESTARTS} restarts)")
            failure.__cause__ = error
            self._fail(failure)
        else:
            self._restarts += 1
            self._restarts_in_a_row += 1
            jobs = [job for job in self._in_flight if not job.cancelled]
            logger.warning(
                "%s; the engine restarts, %d requests are issued again", cause, len(jobs)
            )
            for job in jobs:
                job.slot = None
                job.uniforms = Uniforms(job.request.seed)
            self._scheduler.submit(jobs)

    def _fail(self, error: Exception) -> None:
        self._deliver([(job, error) for job in self._in_flight])

    def _deliver(self, outcomes: list[Outcome]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = defaultdict(list)
        for job, result in outcomes:
            by_loop[job.loop].append((job, result))
            self._in_flight.pop(job, None)
            if isinstance(result, Completion):
                self._restarts_in_a_row = 0
        for loop, ended in by_loop.items():

            def settle(ended: list[Outcome] = ended) -> None:
                for job, result in ended:
                    _settle(job.future, result)

            _post_to(loop, settle)


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A module of its own over the same tensors, but for the parameters that train; and for the
    buffers, where a forward pass changes them."""
    shared: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    if not changes_rotary_tables(model):
        shared += model.buffers()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()


def _trained_pairs(copied: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(the copy's, the model's) of each parameter that trains."""
    pairs = zip(copied.parameters(), model.parameters(), strict=True)
    return [(own, theirs) for own, theirs in pairs if theirs.requires_grad]


def _settle(future: asyncio.Future[T], result: T | BaseException) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def _post_to(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # a closed loop has nobody left to tell
        loop.call_soon_threadsafe(callback)
