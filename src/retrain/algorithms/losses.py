"""Per-token losses [B, T]; whoever calls multiplies by the batch's weights and sums."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347), [B, T].

    `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with
    `ratio = exp(logprobs - old_logprobs)`; separate bounds as in DAPO (arXiv:2503.14476).
    Positions outside `mask` are zero. The metrics are sums over the mask: `clipped` tokens and
    the `ratio`.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.where(mask, -torch.minimum(unclipped, clipped), torch.zeros_like(ratio))
    with torch.no_grad():
        metrics = {
            "clipped": ((clipped < unclipped) & mask).sum().to(torch.float64),
            "ratio": torch.where(mask, ratio, torch.zeros_like(ratio)).sum().to(torch.float64),
        }
    return loss, metrics


def cross_entropy(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the masked tokens, [B, T]."""
    return torch.where(mask, -logprobs, torch.zeros_like(logprobs))
