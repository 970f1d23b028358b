"""A teacher in the process: a frozen transformers model."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrain.models.forward import (
    architecture_setting,
    full_logits,
    head_logits,
    splits_exactly,
    unwrap,
)
from retrain.models.scores import LOGITS_PER_CHUNK, predictor_states, selected_logprobs
from retrain.teachers.base import Top
from retrain.types import InfrastructureError, UserError


@dataclass(frozen=True)
class _Job:
    token_ids: Sequence[int]
    start: int
    temperature: float
    k: int
    """0 asks for the tokens' own log-probabilities."""
    answer: Future[Any] = field(default_factory=Future)


class LocalTeacher:
    """Scores in a thread of its own; what waits together is run together.

    Requests that begin alike (the samples of a group, the turns of a conversation) share the
    computation of their common tokens where the model allows it. Logits exist a chunk at a time.

    Args:
        model: a causal LM; it is frozen and put in evaluation mode.
        batch_tokens: most tokens of one forward pass, padding included; a longer sequence goes
            alone.
        context_limit: most tokens of a sequence; the model's `max_position_embeddings` if None.
        vocab_size: ids from here on, which pad the embedding, are never among the likeliest.
        logits_per_chunk: most logits alive at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_tokens: int = 16_384,
        context_limit: int | None = None,
        vocab_size: int | None = None,
        logits_per_chunk: int = LOGITS_PER_CHUNK,
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._rows = int(unwrap(model).get_input_embeddings().weight.shape[0])
        self._vocab_size = min(vocab_size or self._rows, self._rows)
        self._batch_tokens = batch_tokens
        self._limit = context_limit or architecture_setting(model, "max_position_embeddings")
        self._logits_per_chunk = logits_per_chunk
        self._waiting: list[_Job] = []
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._closed = False

    @property
    def context_limit(self) -> int | None:
        return None if self._limit is None else int(self._limit)

    async def prepare(self, temperature: float = 1.0) -> None:
        """Nothing: it can be asked at once."""

    async def score(
        self, token_ids: Sequence[int], temperature: float = 1.0, *, start: int = 1
    ) -> array[float]:
        """See `Teacher.score`; in float32, or float64 for a float64 model."""
        if len(token_ids) <= max(start, 1):
            return array("d", bytes(8 * len(token_ids)))
        scored: array[float] = await self._ask(token_ids, start, temperature, 0)
        return scored

    async def top(
        self, token_ids: Sequence[int], k: int, temperature: float = 1.0, *, start: int = 1
    ) -> Top:
        """See `Teacher.top`.

        Raises:
            UserError: also where `k` is more than the vocabulary holds.
        """
        if not 0 < k <= self._vocab_size:
            raise UserError(
                f"the likeliest {k} tokens were asked of a teacher whose vocabulary has "
                f"{self._vocab_size}",
                "Ask for fewer.",
            )
        if len(token_ids) <= max(start, 1):
            return Top.empty(len(token_ids), k)
        found: Top = await self._ask(token_ids, start, temperature, k)
        return found

    async def close(self) -> None:
        """Requests that wait fail with InfrastructureError."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)

    async def _ask(self, token_ids: Sequence[int], start: int, temperature: float, k: int) -> Any:
        if self._limit is not None and len(token_ids) > self._limit:
            raise UserError(
                f"a sequence of {len(token_ids)} tokens is longer than the teacher's context of "
                f"{self._limit}",
                "Take a teacher with a longer context, or shorten the rollouts.",
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._rows:
            raise UserError(
                f"a sequence has token ids outside of the teacher's vocabulary of {self._rows}",
                "Score with ids of the teacher's own tokenizer.",
            )
        if self._closed:
            raise InfrastructureError("the teacher is closed")
        job = _Job(token_ids, max(start, 1), temperature or 1.0, k)
        with self._lock:
            self._waiting.append(job)
        # After all that this turn of the event loop asks for: they are batched.
        asyncio.get_running_loop().call_soon(self._start_thread)
        return await asyncio.wrap_future(job.answer)

    def _start_thread(self) -> None:
        if self._closed:
            for job in self._take_all():
                job.answer.set_exception(InfrastructureError("the teacher is closed"))
        else:
            self._thread.submit(self._work)

    def _work(self) -> None:
        """Answer the batch that the first in line is in; there is one call a request."""
        if batch := self._take_batch():
            self._answer(batch)

    def _answer(self, batch: Sequence[_Job]) -> None:
        try:
            with torch.no_grad():
                answers = self._run(batch)
        except Exception as error:
            if len(batch) > 1:  # memory, say: each may fit alone
                for job in batch:
                    self._answer([job])
                return
            failed = InfrastructureError(f"the teacher failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            batch[0].answer.set_exception(failed)
            return
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)

    def _take_all(self) -> list[_Job]:
        with self._lock:
            taken, self._waiting = self._waiting, []
        return [job for job in taken if job.answer.set_running_or_notify_cancel()]

    def _take_batch(self) -> list[_Job]:
        """The first in line, and those behind it that ask alike, as many as fit."""
        batch: list[_Job] = []
        left: list[_Job] = []
        width = 0
        with self._lock:
            for job in self._waiting:
                wide = max(width, len(job.token_ids))
                alike = not batch or (job.temperature, job.k) == (batch[0].temperature, batch[0].k)
                if not alike or (batch and wide * (len(batch) + 1) > self._batch_tokens):
                    left.append(job)
                elif job.answer.set_running_or_notify_cancel():
                    batch.append(job)
                    width = wide
            self._waiting = left
        return batch

    def _run(self, batch: Sequence[_Job]) -> list[Any]:
        device = next(self._model.parameters()).device
        lengths = [len(job.token_ids) for job in batch]
        table = np.zeros((len(batch), max(lengths)), dtype=np.int64)
        wanted = np.zeros(table.shape, dtype=bool)
        for row, job in enumerate(batch):
            table[row, : lengths[row]] = job.token_ids
            wanted[row, job.start : lengths[row]] = True
        ids = torch.from_numpy(table).to(device)
        mask = torch.from_numpy(wanted).to(device)
        if batch[0].k:
            return self._tops(ids, mask, batch, wanted)
        logprobs = selected_logprobs(
            self._model,
            ids,
            torch.tensor(lengths, device=device),
            mask,
            batch[0].temperature,
            logits_per_chunk=self._logits_per_chunk,
        )
        rows = logprobs.cpu().double().numpy()
        return [array("d", row[:size].tobytes()) for row, size in zip(rows, lengths, strict=True)]

    def _tops(
        self, ids: Tensor, mask: Tensor, batch: Sequence[_Job], wanted: np.ndarray
    ) -> list[Top]:
        k, temperature = batch[0].k, batch[0].temperature
        if splits_exactly(self._model):
            states = predictor_states(self._model, ids, mask)
            parts = torch.split(states, max(1, self._logits_per_chunk // self._rows))
            found = [self._likeliest(head_logits(self._model, p), k, temperature) for p in parts]
        else:
            rows, columns = mask.nonzero(as_tuple=True)
            logits = full_logits(self._model, ids)[rows, columns - 1]
            found = [self._likeliest(logits, k, temperature)]
        tops = [Top.empty(len(job.token_ids), k) for job in batch]
        ids_found = np.concatenate([tokens for tokens, _ in found])
        logprobs_found = np.concatenate([logprobs for _, logprobs in found])
        done = 0
        for row, (job, top) in enumerate(zip(batch, tops, strict=True)):
            size = int(wanted[row].sum())
            top.ids[job.start :] = ids_found[done : done + size]
            top.logprobs[job.start :] = logprobs_found[done : done + size]
            done += size
        return tops

    def _likeliest(
        self, logits: Tensor, k: int, temperature: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities [R, K] of logits [R, V]."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        scaled = wide / temperature
        values, tokens = scaled[:, : self._vocab_size].topk(k)
        logprobs = values - scaled.logsumexp(-1, keepdim=True)
        return tokens.int().cpu().numpy(), logprobs.float().cpu().numpy()
