"""What a teacher is: a model that says how likely tokens are, given those before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Top:
    """A teacher's most likely tokens at each position of a sequence, given those before it.

    Row t speaks of token t. A row that says nothing, as row 0, which has no predictor, has ids -1
    and log-probabilities -inf.
    """

    ids: np.ndarray
    """int32 [T, K], the likeliest first."""
    logprobs: np.ndarray
    """float32 [T, K], of the whole distribution (they do not sum to one over K)."""

    @classmethod
    def empty(cls, length: int, k: int) -> Top:
        """Rows that say nothing."""
        return cls(
            np.full((length, k), -1, dtype=np.int32),
            np.full((length, k), -np.inf, dtype=np.float32),
        )


class Teacher(Protocol):
    """Token ids are those of the teacher's own tokenizer.

    Log-probabilities are those of the distribution at `temperature`; 0 counts as 1.
    """

    @property
    def context_limit(self) -> int | None:
        """Most tokens of a sequence; None where the teacher does not say, or was not prepared."""
        ...

    async def prepare(self, temperature: float = 1.0) -> None:
        """Find out, before the first request, whether the teacher can do what is asked of it.

        Raises:
            UserError: it cannot.
        """
        ...

    async def score(
        self, token_ids: Sequence[int], temperature: float = 1.0, *, start: int = 1
    ) -> array[float]:
        """Log-probability of each token from `start` on, given all before it [T]; 0.0 before.

        Raises:
            InfrastructureError: it failed, retries included.
            UserError: the sequence is longer than the teacher's context, or it cannot score at
                this temperature.
        """
        ...

    async def top(
        self, token_ids: Sequence[int], k: int, temperature: float = 1.0, *, start: int = 1
    ) -> Top:
        """The likeliest `k` tokens at each position from `start` on; rows before say nothing.

        Raises:
            InfrastructureError, UserError: as `score`.
        """
        ...

    async def close(self) -> None: ...
