"""What servers are to load, version by version, and what they must then answer."""

from __future__ import annotations

import math
import random
import shutil
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from retrain.engines.base import SamplingParams
from retrain.types import UserError

PROBE_TOKENS = 48
"""Of the probe's prompt, at most: more than a block of a prefix cache, so that one kept from
earlier weights shows."""

PROBE_PARAMS = SamplingParams(max_new_tokens=16, temperature=0.7)
"""Not 1, so that a server that gives log-probabilities before temperature is found out."""

KEPT = 2
"""Versions left on disk."""


class Source(Protocol):
    """The policy that trains, as servers need it."""

    adapter: bool
    """Whether what changes is a LoRA adapter, which servers load beside the base model."""

    def advice(self, first: bool) -> str:
        """What to do where a server does not serve what it was given, the first time or later."""
        ...

    def serve_on_cpu(self) -> None:
        """The servers are builds for CPUs."""
        ...

    def write(self, directory: Path) -> None:
        """Write what changes, as it is now: the whole model, or the adapter."""
        ...

    def write_base(self, directory: Path) -> Path | str:
        """What a server is to be started with below an adapter; written only if no place has it."""
        ...

    def logprobs(self, token_ids: Sequence[int], temperature: float) -> array[float]:
        """Log-probability of each token given those before it [T]; 0.0 for the first."""
        ...


@dataclass(frozen=True)
class Version:
    """One state of the policy on disk."""

    number: int
    path: Path


@dataclass(frozen=True)
class Expected:
    """What the policy gives for a sequence of tokens; compared from `start` on."""

    token_ids: Sequence[int]
    start: int
    logprobs: array[float]

    def gap(self, found: Sequence[float]) -> float:
        """Most nats between what was found for the tokens from `start` on and what is expected."""
        pairs = zip(self.logprobs[self.start :], found, strict=True)
        gaps = [abs(a - b) for a, b in pairs]
        return math.inf if any(map(math.isnan, gaps)) else max(gaps, default=0.0)


class Weights:
    """The versions on disk, the newest KEPT of them.

    Args:
        vocab_size: of the tokenizer, for the probe's prompt.
        context_limit: of the model; the probe takes half of it at most.
    """

    def __init__(self, source: Source, vocab_size: int, context_limit: int) -> None:
        self.source = source
        numbers, length = random.Random("probe"), min(PROBE_TOKENS, context_limit // 2)
        self.prompt = [numbers.randrange(vocab_size) for _ in range(length)]
        self.expected: Expected | None = None
        """Of the newest version, at temperature 1: what a server that comes back is asked for.
        None until a server was probed."""
        self._root: Path | None = None
        self._written: list[Version] = []
        self._held: list[Path] = []
        self._base: Path | str | None = None
        self._writing = threading.Lock()

    def fit(self, context_limit: int) -> None:
        """Leave half of a context for what is made of the probe's prompt."""
        del self.prompt[max(1, context_limit // 2) :]

    def put_in(self, root: Path) -> None:
        """Where versions are to be written; what an earlier run left there goes."""
        shutil.rmtree(root, ignore_errors=True)
        self._root = root

    @property
    def newest(self) -> Version:
        return self._written[-1]

    def write(self, number: int) -> None:
        """Write the policy as it is now. Each version has a path of its own, since servers keep
        what they have loaded by its path.

        Raises:
            UserError: the disk is full or not writable.
        """
        assert self._root is not None
        path = self._root / f"v{number:08d}"
        with self._writing:
            try:
                shutil.rmtree(path, ignore_errors=True)
                self.source.write(path)
            except OSError as error:
                shutil.rmtree(path, ignore_errors=True)
                raise UserError(
                    f"the weights for the engine cannot be written to {path}: {error}",
                    "Free some space, or name another place as engine.weights_dir.",
                ) from error
            self._written = [v for v in self._written if v.path != path] + [Version(number, path)]
            if self.expected is not None:
                _, self.expected = self.expect(self.expected.token_ids[self.expected.start :])
            for old in self._written[:-KEPT]:
                if old.path not in self._held:
                    shutil.rmtree(old.path, ignore_errors=True)
                    self._written.remove(old)

    @contextmanager
    def held(self, version: Version) -> Iterator[None]:
        """Leave a version on disk, however many come after it."""
        self._held.append(version.path)
        try:
            yield
        finally:
            self._held.remove(version.path)

    def base(self) -> Path | str:
        """What servers are started with below an adapter; written once."""
        assert self._root is not None
        with self._writing:
            if self._base is None:
                self._base = self.source.write_base(self._root / "base")
        return self._base

    def expect(self, sampled: Sequence[int]) -> tuple[Expected, Expected]:
        """What the policy gives for the probe's prompt and what a server made of it: at the probe's
        temperature, and at 1."""
        sequence = [*self.prompt, *sampled]
        start = len(self.prompt)
        probed, plain = (
            Expected(sequence, start, self.source.logprobs(sequence, temperature))
            for temperature in (PROBE_PARAMS.temperature, 1.0)
        )
        return probed, plain

    def clear(self) -> None:
        """Remove everything that was written."""
        with self._writing:
            if self._root is not None:
                shutil.rmtree(self._root, ignore_errors=True)
            self._written.clear()
