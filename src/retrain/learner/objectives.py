"""What each kind of training gives the learner as its per-token loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrain.algorithms import (
    KLEstimator,
    cross_entropy,
    kl,
    sampled_reverse_kl,
    top_forward_kl,
    top_reverse_kl,
)
from retrain.learner.batch import Batch


@dataclass(frozen=True)
class Predictions:
    """What the learner's model says of a batch; 0 outside its mask."""

    logprobs: Tensor
    """[B, T]"""
    entropy: Tensor
    """[B, T], in nats."""
    candidates: Tensor | None = None
    """[B, T, K + 1], of the batch's `teacher_top_ids` and of all other tokens together; None where
    the batch has none."""


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

    What a teacher says of the sampled tokens changes their advantages, each by its own reverse KL
    to that denominator; where it gives its likeliest tokens, the KL over these is a loss beside.
    """

    loss: PolicyLoss
    correction: Correction | None = None
    kl_estimator: KLEstimator = "k3"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    teacher_coefficient: float = 0.0

    @property
    def trains_everything(self) -> bool:
        """Whether tokens without an advantage have a gradient too."""
        return max(self.kl_coefficient, self.entropy_coefficient, self.teacher_coefficient) > 0

    def __call__(self, predictions: Predictions, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs, mask = predictions.logprobs, batch.mask
        known = ~torch.isnan(batch.old_logprobs)
        old = torch.where(known, batch.old_logprobs, logprobs.detach())
        advantages, taught = self._taught(old, batch)
        loss, metrics = self.loss(logprobs, old, advantages, mask, batch.sequences)
        metrics |= taught
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
        if self.teacher_coefficient and batch.teacher_top_logprobs is not None:
            distance, told = _teacher_distance(predictions, batch, top_reverse_kl)
            loss = loss + self.teacher_coefficient * distance
            metrics |= told
        return loss, metrics

    def _taught(self, old: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """The advantages with what a teacher says of each token."""
        said = batch.teacher_logprobs
        if said is None or not self.teacher_coefficient:
            return batch.advantages, {}
        distance = sampled_reverse_kl(old, said, batch.mask)
        speaks = batch.mask & ~torch.isnan(said)
        metrics = {"teacher_kl": distance.sum(), "teacher_tokens": speaks.sum()}
        return batch.advantages - self.teacher_coefficient * distance, metrics


def sft_loss(predictions: Predictions, batch: Batch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the targets."""
    return cross_entropy(predictions.logprobs, batch.mask), {}


@dataclass(frozen=True)
class LogitsObjective:
    """The forward KL from teachers' likeliest tokens, mixed with the loss of SFT.

    Args:
        cross_entropy: the share of the latter; the KL has the rest.
    """

    cross_entropy: float = 0.0

    def __call__(self, predictions: Predictions, batch: Batch) -> tuple[Tensor, Metrics]:
        distance, metrics = _teacher_distance(predictions, batch, top_forward_kl)
        loss = (1 - self.cross_entropy) * distance
        if self.cross_entropy:
            loss = loss + self.cross_entropy * cross_entropy(predictions.logprobs, batch.mask)
        return loss, metrics


def _teacher_distance(
    predictions: Predictions, batch: Batch, divergence: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Metrics]:
    """[B, T], zero where a teacher gives no tokens."""
    own, said = predictions.candidates, batch.teacher_top_logprobs
    if own is None or said is None:
        nothing = torch.zeros_like(predictions.logprobs)
        return nothing, {"teacher_kl": nothing.sum(), "teacher_tokens": nothing.sum()}
    speaks = batch.mask & (said > -torch.inf).any(-1)
    distance = torch.where(speaks, divergence(own, said), 0.0)
    return distance, {"teacher_kl": distance.detach().sum(), "teacher_tokens": speaks.sum()}
