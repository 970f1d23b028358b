"""Samples to padded tensors: collate, and cut into micro-batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrain.algorithms import Aggregation, token_weights
from retrain.types import Sample


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors [B, T]; column t speaks of token t."""

    token_ids: Tensor
    lengths: Tensor
    """[B], tokens before the padding."""
    mask: Tensor
    """bool, where a token trains."""
    weights: Tensor
    """float64, zero outside the mask; over all the samples given they sum to 1."""
    advantages: Tensor
    behavior_logprobs: Tensor
    old_logprobs: Tensor
    """NaN where the learner has not computed them."""

    @property
    def num_trained(self) -> int:
        return int(self.mask.sum())


def micro_batches(
    samples: Sequence[Sample], *, token_budget: int, aggregation: Aggregation, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `token_budget` padded tokens, each with the indices of its samples.

    Weights come from all `samples` together, so the cut does not change the gradient. Samples that
    have none (no trained token, or advantages of zero throughout) are not run. The others are
    sorted by length; one that is longer than the budget gets a batch of its own.
    """
    counts = [sum(sample.loss_mask) for sample in samples]
    weights = token_weights(counts, [s.rollout_id for s in samples], aggregation)
    running = [i for i, sample in enumerate(samples) if counts[i] and _has_gradient(sample)]
    order = sorted(running, key=lambda i: -len(samples[i]))
    start = 0
    while start < len(order):
        width = len(samples[order[start]])
        rows = max(1, token_budget // width)
        chosen = order[start : start + rows]
        yield chosen, _collate([samples[i] for i in chosen], [weights[i] for i in chosen], device)
        start += rows


def _has_gradient(sample: Sample) -> bool:
    return sample.objective != "policy" or sample.advantages is None or any(sample.advantages)


def _collate(samples: Sequence[Sample], weights: Sequence[float], device: torch.device) -> Batch:
    lengths = [len(sample) for sample in samples]
    shape = (len(samples), max(lengths))
    token_ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.bool_)
    weight = np.zeros(shape, dtype=np.float64)
    advantages = np.zeros(shape, dtype=np.float64)
    behavior = np.zeros(shape, dtype=np.float32)
    old = np.full(shape, np.nan, dtype=np.float64)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        token_ids[row, :length] = _column(sample.token_ids)
        mask[row, :length] = _column(sample.loss_mask).astype(np.bool_)
        weight[row] = np.where(mask[row], weights[row], 0.0)
        if sample.advantages is not None:
            advantages[row, :length] = _column(sample.advantages)
        if sample.behavior_logprobs is not None:
            behavior[row, :length] = _column(sample.behavior_logprobs)
        if sample.old_logprobs is not None:
            old[row, :length] = _column(sample.old_logprobs)
    columns = (token_ids, np.asarray(lengths), mask, weight, advantages, behavior, old)
    return Batch(*(torch.from_numpy(c).to(device) for c in columns))


def _column(values: array[int] | array[float]) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    return np.frombuffer(values, dtype=np.dtype(values.typecode))
