"""What runs behind both dialects: a small model that really generates.

Everything here belongs to one event loop. A request is sampled a few tokens at a time, so that
between them it can be paused, aborted, slowed down, or given other weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from engine_servers.knobs import Knobs
from engine_servers.weights import (
    Adapter,
    Weights,
    adapter_rank,
    load_adapter,
    load_tokenizer,
    load_weights,
)
from retrain.engines.base import GenerateRequest, SamplingParams
from retrain.types import InfrastructureError

CHUNK = 16
"""Tokens sampled at a time where none is waited for."""

BLOCK = 16
"""Tokens that a prefix cache recognises a prompt by; shorter prompts are never cached."""

Reason = Literal["eos", "stop_token", "stop_string", "length", "abort"]


@dataclass(eq=False)
class Job:
    """One continuation, as far as it got."""

    prompt: list[int]
    max_new: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()
    skip_special_tokens: bool = True
    adapter: Adapter | None = None
    reads_cache: bool = True
    id: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Reason | None = None
    matched: str | int | None = None
    weights: Weights | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is aborted."""


class Backend:
    """
    Args:
        context_limit: most tokens of a sequence; the model's own if None.
        cache_prefixes: keep a prefix cache, which is stale after a reload until it is reset.
        lora_rank: the largest of an adapter; 0 takes none.
    """

    def __init__(
        self,
        directory: Path,
        knobs: Knobs,
        *,
        context_limit: int | None = None,
        cache_prefixes: bool = True,
        lora_rank: int = 64,
    ) -> None:
        self.directory = directory
        self.knobs = knobs
        self.tokenizer = load_tokenizer(directory)
        self.current = load_weights(directory)
        self.context_limit = context_limit or self.current.engine.context_limit
        self.adapters: dict[str, Adapter] = {}
        self.paused: Literal["no", "new", "all"] = "no"
        self.in_flight: dict[Job, None] = {}
        self.lora_rank = lora_rank
        self._cache_prefixes = cache_prefixes
        self._cached: dict[tuple[object, ...], Weights] = {}
        self._made = [self.current]
        self._sampling = 0
        self._serial = itertools.count()
        self._changed = asyncio.Condition()

    @property
    def vocab_size(self) -> int:
        return int(self.current.model.get_output_embeddings().weight.shape[0])

    @property
    def eos(self) -> frozenset[int]:
        ids = self.current.model.config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    def text(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        decoded: str = self.tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return decoded

    async def generate(self, job: Job) -> Job:
        """Sample until the job ends, which it does with a `reason`."""
        await self._until(lambda: self.paused == "no")
        job.weights = self._look_up(job)
        session = f"job {next(self._serial)}"
        self.in_flight[job] = None
        try:
            while job.reason is None:
                await self._until(lambda: self.paused != "all" or job.stopped.is_set())
                if job.stopped.is_set():
                    job.reason = "abort"
                else:
                    before = len(job.token_ids)
                    await self._sample(job, session)
                    delay_s = self.knobs.delay_s * (len(job.token_ids) - before)
                    if delay_s:
                        await _wait(job.stopped, delay_s)
        finally:
            del self.in_flight[job]
            await job.weights.engine.end_session(session)
            await self._notify()
        return job

    async def _sample(self, job: Job, session: str) -> None:
        """A few more tokens, which end with the first that ends the job."""
        weights = job.weights
        assert weights is not None
        done = len(job.token_ids)
        room = min(job.max_new, self.context_limit - len(job.prompt)) - done
        if room <= 0:
            job.reason = "length"
            return
        params = SamplingParams(
            max_new_tokens=min(room, 1 if self.knobs.delay_s else CHUNK),
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k if 0 < job.top_k < self.vocab_size else 0,
            stop_token_ids=tuple(job.stop_token_ids | job.eos),
        )
        asked = GenerateRequest(
            job.prompt + job.token_ids, params, job.seed % 2**64 + (done << 64), session
        )
        self._sampling += 1
        try:
            got = await weights.engine.generate(asked)
        except InfrastructureError:
            if job.weights is weights:
                raise
            return  # it was closed when the job was given others
        finally:
            self._sampling -= 1
            if self.paused == "all":
                await self._notify()
        for token, logprob in zip(got.token_ids, got.logprobs, strict=True):
            job.token_ids.append(token)
            job.logprobs.append(logprob)
            self._check_end(job)
            if job.reason is not None:
                return

    def _check_end(self, job: Job) -> None:
        last = job.token_ids[-1]
        if last in job.eos:
            job.reason, job.matched = "eos", last
        elif last in job.stop_token_ids:
            job.reason, job.matched = "stop_token", last
        elif job.stop:
            said = self.text(job.token_ids, skip_special_tokens=job.skip_special_tokens)
            if (found := next((text for text in job.stop if text in said), None)) is not None:
                job.reason, job.matched = "stop_string", found
        if job.reason is None and len(job.token_ids) >= job.max_new:
            job.reason = "length"

    def _look_up(self, job: Job) -> Weights:
        """The weights that answer a prompt: where its beginning is cached, those that it was
        computed with."""
        weights = self.current
        if job.adapter is not None:
            weights = self.adapters.get(job.adapter.name, job.adapter).weights
        if not (self._cache_prefixes and job.reads_cache) or len(job.prompt) < BLOCK:
            return weights
        adapter = None if job.adapter is None else (job.adapter.name, job.adapter.path)
        return self._cached.setdefault((adapter, *job.prompt[:BLOCK]), weights)

    async def score(self, token_ids: list[int], weights: Weights) -> array[float]:
        """Log-probability of each token at temperature 1 [T]; 0.0 for the first."""
        return await weights.engine.score(token_ids)

    async def likeliest(
        self, token_ids: list[int], weights: Weights, k: int
    ) -> list[list[tuple[int, float]]]:
        """The `k` likeliest tokens at each place but the first, with their log-probabilities at
        temperature 1."""

        def run() -> list[list[tuple[int, float]]]:
            with torch.no_grad():
                logits = weights.model(torch.tensor([token_ids])).logits[0, :-1]
            values, ids = logits.float().log_softmax(-1).topk(k)
            rows = zip(ids.tolist(), values.tolist(), strict=True)
            return [list(zip(*row, strict=True)) for row in rows]

        return await asyncio.to_thread(run)

    def abort(self, *, id: str | None = None) -> int:
        """End one job, or all, with what they have; how many that were."""
        jobs = [job for job in self.in_flight if id is None or job.id == id]
        for job in jobs:
            job.stopped.set()
        return len(jobs)

    async def pause(self, mode: Literal["new", "all"]) -> None:
        """Hold back new jobs, or those in flight too."""
        self.paused = mode
        await self._notify()
        if mode == "all":
            await self._until(lambda: self._sampling == 0)

    async def drain(self) -> None:
        """Return when no job is in flight."""
        await self._notify()
        await self._until(lambda: not self.in_flight)

    async def resume(self) -> None:
        self.paused = "no"
        await self._notify()

    async def reload(self, directory: Path) -> None:
        """Other weights for what comes; jobs in flight and cached prompts keep the old ones."""
        if self.knobs.ignores_reload:
            return
        head_of = self.current.model if self.knobs.keeps_head else None
        new = load_weights(directory, head_of=head_of)
        self._made.append(new)
        self.current = new
        for name, adapter in list(self.adapters.items()):
            self._put_adapter(name, adapter.path)

    async def reset_cache(self, *, running: bool) -> bool:
        """Forget cached prompts, which succeeds while none is in use, or if those `running`
        begin again."""
        if self.in_flight and not running:
            return False
        self._cached.clear()
        for job in self.in_flight:
            job.weights = self._look_up(job)
        await self._retire()
        return True

    async def _retire(self) -> None:
        """Close the engines of weights that nothing will be answered by."""
        used = {self.current, *self._cached.values()}
        used |= {adapter.weights for adapter in self.adapters.values()}
        used |= {job.weights for job in self.in_flight if job.weights is not None}
        retired = [weights for weights in self._made if weights not in used]
        self._made = [weights for weights in self._made if weights in used]
        for weights in retired:
            await weights.engine.close()

    def add_adapter(self, name: str, path: str) -> None:
        """
        Raises:
            OSError, ValueError: there is none, or it is none that this server takes.
        """
        if not self.lora_rank:
            raise ValueError("LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if (rank := adapter_rank(Path(path))) > self.lora_rank:
            raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {self.lora_rank}.")
        if name in self.adapters and self.knobs.ignores_reload:
            return
        self._put_adapter(name, path)

    def _put_adapter(self, name: str, path: str) -> None:
        weights = load_adapter(self.current, Path(path))
        self._made.append(weights)
        self.adapters[name] = Adapter(name, path, weights)

    async def close(self) -> None:
        for weights in self._made:
            await weights.engine.close()

    async def _until(self, predicate: Callable[[], bool]) -> None:
        if predicate():
            return
        async with self._changed:
            await self._changed.wait_for(predicate)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
