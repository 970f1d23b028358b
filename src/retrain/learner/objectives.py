"""What each kind of training gives the learner as its per-token loss."""

from __future__ import annotations

import torch
from torch import Tensor

from retrain.algorithms import cross_entropy, ppo_clip
from retrain.learner.batch import Batch
from retrain.learner.torch_learner import PerTokenLoss


def policy_loss(*, clip_low: float, clip_high: float) -> PerTokenLoss:
    """PPO's clipped surrogate.

    On the first update of a batch the ratio's denominator is the learner's own log-probability at
    that moment: the ratio is exactly one and its gradient that of the log-probability.
    """

    def loss(logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        known = ~torch.isnan(batch.old_logprobs)
        old = torch.where(known, batch.old_logprobs, logprobs.detach())
        return ppo_clip(
            logprobs,
            old,
            batch.advantages,
            batch.mask,
            clip_low=clip_low,
            clip_high=clip_high,
        )

    return loss


def sft_loss(logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the targets."""
    return cross_entropy(logprobs, batch.mask), {}
