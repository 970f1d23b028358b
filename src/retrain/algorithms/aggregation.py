"""How per-token losses become one number: weights fixed on the global batch before it is split.

The loss is `(per_token * weights).sum()` over all micro-batches, so how the batch is cut never
changes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def token_weights(
    token_counts: Sequence[int],
    rollout_ids: Sequence[str],
    how: Aggregation,
    *,
    constant_length: int | None = None,
) -> list[float]:
    """The weight of each trained token of each sample, [N].

    - `token_mean` (DAPO, arXiv:2503.14476): every trained token of the batch counts the same.
    - `sequence_mean` (GRPO, arXiv:2402.03300): the mean over rollouts of each one's token mean.
    - `sequence_sum`: the mean over rollouts of each one's token sum.
    - `constant` (Dr. GRPO, arXiv:2503.20783): that sum over `constant_length`, the same for all.

    A rollout is all samples of its id; one without trained tokens is not counted.

    Args:
        token_counts: trained tokens of each sample [N].
        rollout_ids: which rollout each belongs to [N].
        constant_length: tokens that `constant` divides by; the others have no use for it.

    Raises:
        ValueError: no such aggregation, or `constant` without a `constant_length` above 0.
    """
    of_rollout: dict[str, int] = {}
    for count, rollout in zip(token_counts, rollout_ids, strict=True):
        of_rollout[rollout] = of_rollout.get(rollout, 0) + count
    training = sum(1 for count in of_rollout.values() if count)
    match how:
        case "token_mean":
            divisors = [sum(token_counts)] * len(token_counts)
        case "sequence_mean":
            divisors = [of_rollout[rollout] * training for rollout in rollout_ids]
        case "sequence_sum":
            divisors = [training] * len(token_counts)
        case "constant":
            if constant_length is None or constant_length < 1:
                raise ValueError(f"constant needs a constant_length above 0, not {constant_length}")
            divisors = [training * constant_length] * len(token_counts)
        case _:
            raise ValueError(
                f"aggregation {how!r}: there are token_mean, sequence_mean, sequence_sum, constant"
            )
    return [1.0 / divisor if divisor else 0.0 for divisor in divisors]
