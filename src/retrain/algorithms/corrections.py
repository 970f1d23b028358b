"""Weights for tokens that were sampled by something other than the learner's own policy.

An engine's log-probabilities differ from the learner's at the start of the update: other kernels,
other precision, or older weights. Multiplied into a per-token loss, the ratio corrects for that;
bounding it keeps the variance finite.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retrain.algorithms.masking import masked, sequence_sum

CorrectionLevel = Literal["token", "sequence"]


def tis(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: CorrectionLevel = "token",
    cap: float = 2.0,
    sequences: Tensor | None = None,
) -> Tensor:
    """Truncated importance weights `min(ratio, cap)`, [B, T] (Ionides 2008, "Truncated importance
    sampling"; for engine and learner Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training").

    The ratio is `exp(old - behavior)` of the token, or at sequence level the product over the
    sequence's mask tokens, on each of them. Zero outside the mask; no gradient.

    Args:
        old_logprobs: the learner's at the start of the update [B, T].
        behavior_logprobs: the engine's [B, T].
        sequences: rows with one number [B] are one sequence; None makes each row its own. All rows
            of a sequence must be in the call.
    """
    ratio = _ratio(old_logprobs, behavior_logprobs, mask, level, sequences)
    return masked(ratio.clamp(max=cap), mask)


def mis(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: CorrectionLevel = "token",
    cap: float = 2.0,
    sequences: Tensor | None = None,
) -> Tensor:
    """Masked importance weights: `ratio` where it is at most `cap`, else 0, [B, T] (Liu, Li et al.
    2025, "When speed kills stability").

    What is beyond the cap does not train: a token, or at sequence level the whole sequence.
    Arguments and ratio as in `tis`.
    """
    ratio = _ratio(old_logprobs, behavior_logprobs, mask, level, sequences)
    return masked(ratio.masked_fill(ratio > cap, 0.0), mask)


def _ratio(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    level: CorrectionLevel,
    sequences: Tensor | None,
) -> Tensor:
    """Learner over engine, detached, [B, T]; anything outside the mask."""
    with torch.no_grad():
        log_ratio = old_logprobs - behavior_logprobs
        match level:
            case "token":
                return log_ratio.exp()
            case "sequence":
                return sequence_sum(log_ratio, mask, sequences).exp().expand_as(log_ratio)
            case _:
                raise ValueError(f"level {level!r}: there are token and sequence")
