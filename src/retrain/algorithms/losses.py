"""Per-token losses [B, T]; whoever calls multiplies by the batch's weights and sums.

Each policy loss takes `(logprobs, old_logprobs, advantages, mask)`: log-probabilities of the tokens
now and at the start of the update, advantages, and a bool mask, all [B, T]. It returns the loss,
zero outside the mask whatever stands there, and metrics that are sums over the mask:

- `ratio`: of probabilities, now over old; in `gspo` that of the token's sequence.
- `clipped_low`, `clipped_high`: tokens whose ratio is below or above the bounds, where that takes
  the gradient from them (in `cispo`: bounds their weight).
- `approx_kl`: `(ratio - 1) - log(ratio)` of each token's own ratio, an estimate of KL(old, now).

Where `sequences` [B] is an argument, rows with one number are one sequence (the segments of a
rollout, say), and all of its rows must be in the call; None makes each row its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrain.algorithms.masking import masked, sequence_mean

MAX_LOG_RATIO = 20.0
"""Ratios are cut at e^20, 4.9e8, and have no gradient beyond: an overflow to infinity would make
the gradient NaN even where clipping removes it."""

Metrics = dict[str, Tensor]


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347), [B, T].

    `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with
    `ratio = exp(logprobs - old_logprobs)`; separate bounds as in DAPO (arXiv:2503.14476). With
    `dual_clip` the loss of a negative advantage is at most `-dual_clip * A` (Ye et al. 2019,
    arXiv:1912.09729), and a metric `clipped_dual` counts where that acts.

    Raises:
        ValueError: a `dual_clip` that is not above 1.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    advantages = masked(advantages, mask)
    ratio = _exp(log_ratio)
    loss, low, high = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = _metrics(log_ratio, ratio, mask, low, high)
    if dual_clip is not None:
        if dual_clip <= 1:
            raise ValueError(f"dual_clip is {dual_clip}: it must be above 1")
        bound = -dual_clip * advantages
        acts = (advantages < 0) & (loss > bound)
        loss = torch.where(acts, bound, loss)
        metrics["clipped_dual"] = _count(acts, mask)
    return masked(loss, mask), metrics


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate on the ratio of the sequence (GSPO, Zheng et al. 2025,
    arXiv:2507.18071), [B, T].

    The sequence's ratio is the geometric mean of its tokens', `s = exp(mean(logprobs - old))`. Each
    token has the value s with its own gradient, `s * d logprob` (GSPO-token), so advantages may
    differ within a sequence; where they do not, the mean over its tokens is the paper's objective.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    advantages = masked(advantages, mask)
    mean = sequence_mean(log_ratio, mask, sequences).detach()
    own = masked(logprobs, mask)
    ratio = _exp(own - own.detach() + mean)
    loss, low, high = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    return masked(loss, mask), _metrics(log_ratio, ratio, mask, low, high)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
) -> tuple[Tensor, Metrics]:
    """REINFORCE with a bounded importance weight (CISPO, MiniMax 2025, arXiv:2506.13585), [B, T].

    `-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs`, sg stopping the gradient: every
    token keeps one. Without `clip_low` the weight has no lower bound.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    advantages = masked(advantages, mask)
    ratio = _exp(log_ratio).detach()
    lowest = 0.0 if clip_low is None else 1 - clip_low
    weight = ratio.clamp(lowest, 1 + clip_high)
    loss = -weight * advantages * masked(logprobs, mask)
    return loss, _metrics(log_ratio, ratio, mask, ratio < lowest, ratio > 1 + clip_high)


def gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The geometric mean of a sequence's clipped ratios (GMPO, Zhao et al. 2025,
    arXiv:2507.20673), [B, T].

    Bounds are on each token's log ratio, from above where A > 0 and from below where A < 0; the
    loss `-A * exp(mean(bounded log ratio))` stands on every mask token of the sequence, so the mean
    over sequences of their token means is the paper's objective.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    advantages = masked(advantages, mask)
    bounded = torch.where(
        advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low)
    )
    loss = -advantages * _exp(sequence_mean(bounded, mask, sequences))
    low = (log_ratio < -clip_low) & (advantages < 0)
    high = (log_ratio > clip_high) & (advantages > 0)
    return masked(loss, mask), _metrics(log_ratio, _exp(log_ratio), mask, low, high)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> tuple[Tensor, Metrics]:
    """A soft gate in place of a clip (SAPO, Gao et al. 2025, arXiv:2511.20347), [B, T].

    `-(4 / tau) * sigmoid(tau * (ratio - 1)) * A`, tau by the sign of the advantage: the gradient is
    that of `-ratio * A` at a ratio of 1 and fades on both sides. Nothing is ever `clipped`.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    advantages = masked(advantages, mask)
    ratio = _exp(log_ratio)
    tau = torch.where(
        advantages > 0,
        torch.full_like(ratio, temperature_positive),
        torch.full_like(ratio, temperature_negative),
    )
    loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages
    return masked(loss, mask), _metrics(log_ratio, ratio, mask)


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Metrics]:
    """The plain policy gradient, `-A * logprobs` (Williams 1992; for reasoning GPG, Chu et al.
    2025, arXiv:2504.02546), [B, T].

    `old_logprobs` serve the metrics only; nothing is ever `clipped`.
    """
    log_ratio = masked(logprobs - old_logprobs, mask)
    loss = -masked(advantages, mask) * masked(logprobs, mask)
    return loss, _metrics(log_ratio, _exp(log_ratio), mask)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
) -> tuple[Tensor, Metrics]:
    """The critic's squared error with PPO's value clipping (arXiv:1707.06347 as implemented by its
    authors), [B, T].

    `0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`; without `clip` half the
    squared error. Zero outside the mask. The metric `value_clipped` sums the mask tokens whose
    clipped error is the larger.
    """
    values, returns = masked(values, mask), masked(returns, mask)
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, {"value_clipped": _count(torch.zeros_like(mask), mask)}
    old_values = masked(old_values, mask)
    near_old = torch.clamp(values, old_values - clip, old_values + clip)
    clipped_error = (near_old - returns).square()
    loss = 0.5 * torch.maximum(error, clipped_error)
    return loss, {"value_clipped": _count(clipped_error > error, mask)}


def cross_entropy(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the masked tokens, [B, T]."""
    return -masked(logprobs, mask)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's loss, and where its lower and upper bound act, [B, T] each."""
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, low, high


def _metrics(
    log_ratio: Tensor,
    ratio: Tensor,
    mask: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Metrics:
    never = torch.zeros_like(mask)
    with torch.no_grad():
        return {
            "ratio": _total(ratio, mask),
            "clipped_low": _count(never if low is None else low, mask),
            "clipped_high": _count(never if high is None else high, mask),
            "approx_kl": _total(_exp(log_ratio) - 1 - log_ratio, mask),
        }


def _total(values: Tensor, mask: Tensor) -> Tensor:
    return masked(values, mask).sum().to(torch.float64)


def _count(where: Tensor, mask: Tensor) -> Tensor:
    return (where & mask).sum().to(torch.float64)
