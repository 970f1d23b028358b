"""Advantages of a group's rewards: pure functions with keyword hyper-parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo(rewards: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards relative to their group, [G] -> [G] (GRPO, Shao et al. 2024, arXiv:2402.03300).

    `(r - mean) / (std + eps)` with the unbiased std; without `normalize_std` only the mean is
    taken off (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). A group of one, or of equal rewards,
    has advantages of zero.
    """
    centred = rewards - rewards.mean()
    if rewards.numel() < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    if not normalize_std:
        return centred
    scaled: Tensor = centred / (rewards.std(unbiased=True) + eps)
    return scaled
