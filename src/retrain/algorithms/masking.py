"""Masked tensors and sequences: what the other modules share.

A mask is bool [B, T], true where a token trains. Between such tokens there may be holes (what a
tool wrote), and outside the mask there may be anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` inside the mask, zero outside, [B, T]; nothing outside reaches a gradient."""
    return torch.where(mask, values, torch.zeros_like(values))


def sequence_sum(values: Tensor, mask: Tensor, sequences: Tensor | None) -> Tensor:
    """Sum over the mask tokens of each row's sequence, [B, T] -> [B, 1].

    Args:
        sequences: rows with one number [B] are one sequence (the segments of a rollout, say); None
            makes each row its own.
    """
    rows = masked(values, mask).sum(dim=1)
    if sequences is None:
        return rows.unsqueeze(1)
    numbers, place = torch.unique(sequences, return_inverse=True)
    sums = rows.new_zeros(numbers.numel()).index_add(0, place, rows)
    return sums[place].unsqueeze(1)


def sequence_mean(values: Tensor, mask: Tensor, sequences: Tensor | None) -> Tensor:
    """Mean over the mask tokens of each row's sequence, [B, T] -> [B, 1]; 0 where it has none."""
    counts = sequence_sum(torch.ones_like(values), mask, sequences)
    return sequence_sum(values, mask, sequences) / counts.clamp(min=1)


def mask_first(mask: Tensor) -> Tensor:
    """Indices [B, T] that bring each row's mask tokens to its front, in order."""
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
