"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from retrain.algorithms.masking import mask_first, masked


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] of each row's mask tokens (Schulman et al. 2015,
    arXiv:1506.02438).

    `delta_t = r_t + gamma * V_(t+1) - V_t` and `A_t = delta_t + gamma * lam * A_(t+1)`, where t+1
    is the next token of the mask: values are carried across what a tool wrote, and no discount
    falls there. After a row's last mask token the value is 0, so a row must be a whole rollout.
    Returns are `A + V`, what the critic regresses on. Both are zero outside the mask, carry no
    gradient, and are not whitened.

    Args:
        rewards: [B, T]; those outside the mask do not count.
        values: the critic's [B, T], V_t being the value of the state that token t is chosen in.
    """
    with torch.no_grad():
        order = mask_first(mask)
        reward = masked(rewards, mask).gather(1, order)
        value = masked(values, mask).gather(1, order)
        following = torch.cat((value[:, 1:], torch.zeros_like(value[:, :1])), dim=1)
        advantage = reward + gamma * following - value
        longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
        for t in range(longest - 2, -1, -1):
            advantage[:, t] += gamma * lam * advantage[:, t + 1]
        advantages = torch.zeros_like(advantage).scatter(1, order, advantage)
        return advantages, advantages + masked(values, mask)
