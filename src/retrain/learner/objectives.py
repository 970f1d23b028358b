"""What each kind of training gives the learner as its per-token loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrain.algorithms import KLEstimator, cross_entropy, kl
from retrain.learner.batch import Batch


@dataclass(frozen=True)
class Predictions:
    """What the learner's model says of a batch; 0 outside its mask."""

    logprobs: Tensor
    """[B, T]"""
    entropy: Tensor
    """[B, T], in nats."""


Metrics = dict[str, Tensor]
"""Sums over the masked tokens."""

Objective = Callable[[Predictions, Batch], tuple[Tensor, Metrics]]
"""Per-token loss [B, T] and metrics."""

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Metrics]]
"""(logprobs, old_logprobs, advantages, mask [B, T], sequences [B]) -> loss [B, T], metrics."""

Correction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(old_logprobs, behavior_logprobs, mask [B, T], sequences [B]) -> weights [B, T]."""


@dataclass(frozen=True)
class PolicyObjective:
    """A policy loss, weighted for what the engine really sampled from; KL and entropy beside it.

    On the first update of a batch the ratio's denominator is the learner's own log-probability at
    that moment: the ratio is exactly one and its gradient that of the log-probability.
    """

    loss: PolicyLoss
    correction: Correction | None = None
    kl_estimator: KLEstimator = "k3"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    @property
    def trains_everything(self) -> bool:
        """Whether tokens without an advantage have a gradient too."""
        return self.kl_coefficient > 0 or self.entropy_coefficient > 0

    def __call__(self, predictions: Predictions, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs, mask = predictions.logprobs, batch.mask
        known = ~torch.isnan(batch.old_logprobs)
        old = torch.where(known, batch.old_logprobs, logprobs.detach())
        loss, metrics = self.loss(logprobs, old, batch.advantages, mask, batch.sequences)
        if self.correction is not None:
            weights = self.correction(old, batch.behavior_logprobs, mask, batch.sequences)
            loss = loss * weights
            metrics["correction"] = torch.where(mask, weights, 0.0).sum()
        if bool((mask & ~torch.isnan(batch.ref_logprobs)).any()):
            distance = kl(logprobs, batch.ref_logprobs, mask, estimator=self.kl_estimator)
            metrics["kl"] = distance.detach().sum()
            if self.kl_coefficient:
                loss = loss + self.kl_coefficient * distance
        if self.entropy_coefficient:
            loss = loss - self.entropy_coefficient * predictions.entropy
        return loss, metrics


def sft_loss(predictions: Predictions, batch: Batch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the targets."""
    return cross_entropy(predictions.logprobs, batch.mask), {}
