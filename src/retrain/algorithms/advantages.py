"""Advantages: what a rollout, a turn or a token is worth beside the others.

Those of a group take its rewards [G] and give each rollout one number; `turn_credit` gives one for
each turn, the rest one for each token [B, T].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrain.algorithms.gae import gae
from retrain.algorithms.masking import masked


def grpo(rewards: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards relative to their group, [G] -> [G] (GRPO, Shao et al. 2024, arXiv:2402.03300).

    `(r - mean) / (std + eps)` with the unbiased std; without `normalize_std` only the mean is
    taken off (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). A group of one, or of equal rewards,
    has advantages of zero.
    """
    if _teaches_nothing(rewards):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if not normalize_std:
        return centred
    scaled: Tensor = centred / (rewards.std(unbiased=True) + eps)
    return scaled


def rloo(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the others, [G] -> [G] (RLOO, Ahmadian et al. 2024,
    arXiv:2402.14740).

    `r_i - sum_(j != i) r_j / (G - 1)`. A group of one, or of equal rewards, has advantages of zero.
    """
    if _teaches_nothing(rewards):
        return torch.zeros_like(rewards)
    others = (rewards.sum() - rewards) / (rewards.numel() - 1)
    return rewards - others


def opo(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Rewards less their length-weighted mean, [G] -> [G] (OPO, Hao et al. 2025,
    arXiv:2505.23585).

    `r_i - sum_j l_j r_j / sum_j l_j`: the baseline of least variance if a gradient's squared norm
    grows with the rollout's length. A group of one, of equal rewards, or without a trained token
    has advantages of zero.

    Args:
        lengths: trained tokens of each rollout [G].
    """
    weights = lengths.to(rewards.dtype)
    total = weights.sum()
    if _teaches_nothing(rewards) or not total:
        return torch.zeros_like(rewards)
    return rewards - (weights * rewards).sum() / total


def turn_credit(
    step_rewards: Sequence[Tensor], *, normalize_std: bool = True, eps: float = 1e-6
) -> list[Tensor]:
    """An advantage for each turn of a group's rollouts, [S_i] each -> [S_i] each (GRPO with process
    supervision, Shao et al. 2024, arXiv:2402.03300, section 4.1.3).

    The rewards of all turns of all rollouts are normalised together, as `grpo` does; a turn's
    advantage is the sum of its own and its rollout's later ones.
    """
    if not step_rewards:
        return []
    normalised = grpo(torch.cat(list(step_rewards)), normalize_std=normalize_std, eps=eps)
    of_rollout = torch.split(normalised, [len(steps) for steps in step_rewards])
    return [steps.flip(0).cumsum(0).flip(0) for steps in of_rollout]


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted returns of the mask tokens, [B, T] -> [B, T] (REINFORCE++, Hu et al. 2025,
    arXiv:2501.03262).

    `A_t = r_t + gamma * A_(t+1)`, t+1 being the next token of the mask: what a tool wrote neither
    discounts nor has a return. Zero outside the mask. The paper's normalisation over the batch is
    `whiten`, a step of its own.

    Args:
        rewards: of each token, a KL penalty included; those outside the mask do not count.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


def reinforce_plus_plus_baseline(rewards: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """Rewards less their group's mean, whitened over the batch's tokens, [N] -> [N, T]
    (REINFORCE++ with baseline, Hu et al. 2025, arXiv:2501.03262).

    Args:
        rewards: one for each rollout [N]; a rollout without mask tokens still counts in its group.
        groups: which group each belongs to, integers [N].
        mask: [N, T].
    """
    centred = torch.zeros_like(rewards)
    for group in torch.unique(groups):
        members = groups == group
        centred[members] = grpo(rewards[members], normalize_std=False)
    return whiten(centred.unsqueeze(1).expand(mask.shape), mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Values of mean 0 and variance 1 over the mask, [B, T] -> [B, T]; zero outside.

    `(x - mean) * rsqrt(var + eps)` with the unbiased variance; without `shift_mean` the mean is
    added again, so that only the spread changes. Fewer than two tokens have no variance: it is
    taken as 0.
    """
    count = mask.sum()
    mean = masked(values, mask).sum() / count.clamp(min=1)
    centred = masked(values - mean, mask)
    # The rounding error of a mean would otherwise be blown up by 1 / sqrt(eps) among equal values.
    centred = masked(centred - centred.sum() / count.clamp(min=1), mask)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else masked(whitened + mean, mask)


def _teaches_nothing(rewards: Tensor) -> bool:
    """Fewer than two rewards, or all equal: exactly zero then, whatever the rounding."""
    return rewards.numel() < 2 or bool((rewards == rewards[0]).all())
