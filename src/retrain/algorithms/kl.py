"""The penalty on leaving a reference policy, estimated from the sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from retrain.algorithms.masking import masked

KLEstimator = Literal["k1", "k2", "k3"]


def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Estimates of KL(policy, reference) at each token, [B, T] (Schulman 2020, "Approximating KL
    divergence"; k3 in GRPO, arXiv:2402.03300).

    With `d = logprobs - ref_logprobs`: k1 is `d`, unbiased but of any sign; k2 is `d^2 / 2`; k3 is
    `exp(-d) + d - 1`, unbiased and never negative. Zero outside the mask. As a loss, k2 has the
    gradient of the KL and k1 has one of expectation zero.

    Raises:
        ValueError: no such estimator.
    """
    difference = masked(logprobs - ref_logprobs, mask)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return (-difference).exp() + difference - 1
        case _:
            raise ValueError(f"estimator {estimator!r}: there are k1, k2, k3")
