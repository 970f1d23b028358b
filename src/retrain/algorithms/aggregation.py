"""How per-token losses become one number: weights fixed on the global batch before it is split.

The loss is `(per_token * weights).sum()` over all micro-batches, so how the batch is cut never
changes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(
    token_counts: Sequence[int], rollout_ids: Sequence[str], how: Aggregation
) -> list[float]:
    """The weight of each trained token of each sample, [N].

    `token_mean` (DAPO): every trained token of the batch counts the same. `sequence_mean` (GRPO):
    the mean over rollouts of each one's token mean; a rollout is all samples of its id.

    Args:
        token_counts: trained tokens of each sample [N].
        rollout_ids: which rollout each belongs to [N].
    """
    if how == "token_mean":
        total = sum(token_counts)
        return [1.0 / total if total else 0.0] * len(token_counts)
    of_rollout: dict[str, int] = {}
    for count, rollout in zip(token_counts, rollout_ids, strict=True):
        of_rollout[rollout] = of_rollout.get(rollout, 0) + count
    training = sum(1 for count in of_rollout.values() if count)
    return [
        1.0 / (of_rollout[rollout] * training) if of_rollout[rollout] else 0.0
        for rollout in rollout_ids
    ]
