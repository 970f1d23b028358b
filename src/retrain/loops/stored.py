"""What teachers said of traces, kept in a file, so that no trace is asked about twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from retrain.loops.guidance import (
    Teaching,
    attach_top,
    leave_out_untaught,
    numbers,
    share_untaught,
    taught,
)
from retrain.types import InfrastructureError, Sample, UserError

T = TypeVar("T")

FILE = "teachers.sqlite"
"""In the run directory, where no other is named."""

_PATIENCE_S = 60.0
"""For another process to let go of the file."""


class StoredTops:
    """Gives samples their teachers' likeliest tokens, from the file or from the teachers.

    Args:
        identity: of the teachers; what others said is not taken for theirs.
        path: an SQLite file, made where there is none; it has to be set before the first use.
        vocab_size: of the policy.
        keep_untaught: whether tokens that no teacher speaks of train too.
    """

    def __init__(
        self,
        teachers: Teaching,
        *,
        identity: str,
        k: int,
        temperature: float,
        vocab_size: int,
        keep_untaught: bool,
        path: Path | None = None,
    ) -> None:
        self.teachers = teachers
        self.path = path
        self._identity = f"{identity} {k} {temperature!r}"
        self._k = k
        self._temperature = temperature
        self._vocab_size = vocab_size
        self._keep_untaught = keep_untaught

    async def attach(self, samples: Sequence[Sample]) -> None:
        """Fill in the samples' teacher columns; tokens without a teacher's word are then left out
        of what trains, unless they train on.

        Raises:
            UserError: the file cannot be used, or no teacher speaks of any of them.
        """
        keys = [self._key(sample) for sample in samples]
        found = await self._use(lambda file: _read(file, keys))
        missing: dict[str, Sample] = {}
        for key, sample in zip(keys, samples, strict=True):
            if key not in found:
                missing.setdefault(key, sample)
        if missing:
            found |= await self._ask(missing)
        for key, sample in zip(keys, samples, strict=True):
            _unpack(sample, found.get(key, b""), self._k)
            sample.teacher_temperature = self._temperature
        if share_untaught(samples) == 1:
            raise UserError(
                "no teacher speaks of any token of a whole batch",
                "See whether the traces fit the teachers' context and vocabulary.",
            )
        if not self._keep_untaught:
            leave_out_untaught(samples)

    async def _ask(self, missing: dict[str, Sample]) -> dict[str, bytes]:
        """Those of which a teacher spoke are kept; a failure may be asked about again."""
        asked = list(missing.values())
        try:
            await attach_top(self.teachers, asked, self._k, self._temperature, self._vocab_size)
        except InfrastructureError as error:
            raise UserError(
                f"the teachers failed for a whole batch of traces: {error}",
                "Repair what failed, then continue with --resume.",
            ) from error
        answers = {key: _packed(one) for key, one in missing.items() if taught(one).any()}
        await self._use(lambda file: _write(file, answers))
        return answers

    def _key(self, sample: Sample) -> str:
        """Of what is asked, and of whom."""
        digest = hashlib.sha256(self._identity.encode())
        digest.update(np.int64(len(sample)).tobytes())
        digest.update(numbers(sample.token_ids).astype(np.int32).tobytes())
        digest.update(numbers(sample.loss_mask).astype(np.uint8).tobytes())
        return digest.hexdigest()

    async def _use(self, act: Callable[[sqlite3.Connection], T]) -> T:
        path = self.path
        assert path is not None

        def use() -> T:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE_S)) as file, file:
                    file.execute("CREATE TABLE IF NOT EXISTS tops (key PRIMARY KEY, top)")
                    return act(file)
            except (sqlite3.Error, OSError) as error:
                raise UserError(
                    f"distillation.cache: {path} cannot be used: {error}",
                    "Name another file, or remove this one.",
                ) from error

        return await asyncio.to_thread(use)


def _read(file: sqlite3.Connection, keys: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for key in dict.fromkeys(keys):
        row = file.execute("SELECT top FROM tops WHERE key = ?", (key,)).fetchone()
        if row is not None:
            found[key] = bytes(row[0])
    return found


def _write(file: sqlite3.Connection, answers: dict[str, bytes]) -> None:
    file.executemany("INSERT OR IGNORE INTO tops VALUES (?, ?)", answers.items())


def _packed(sample: Sample) -> bytes:
    """int32 ids and fp32 log-probabilities of the tokens that train, [M, K] each."""
    assert sample.teacher_top_ids is not None and sample.teacher_top_logprobs is not None
    trains = numbers(sample.loss_mask).astype(np.bool_)
    shape = (len(sample), sample.teacher_top_k)
    ids = numbers(sample.teacher_top_ids).reshape(shape)[trains].astype(np.int32)
    logprobs = numbers(sample.teacher_top_logprobs).reshape(shape)[trains].astype(np.float32)
    return ids.tobytes() + logprobs.tobytes()


def _unpack(sample: Sample, packed: bytes, k: int) -> None:
    """Into the sample's columns; nothing of tokens that do not train, or where there is nothing."""
    trains = numbers(sample.loss_mask).astype(np.bool_)
    ids = np.full((len(sample), k), -1, dtype=np.int32)
    logprobs = np.full((len(sample), k), np.nan, dtype=np.float32)
    if packed:
        middle = len(packed) // 2
        ids[trains] = np.frombuffer(packed[:middle], dtype=np.int32).reshape(-1, k)
        logprobs[trains] = np.frombuffer(packed[middle:], dtype=np.float32).reshape(-1, k)
    sample.teacher_top_ids = array("i", ids.tobytes())
    sample.teacher_top_logprobs = array("f", logprobs.tobytes())
    sample.teacher_top_k = k
