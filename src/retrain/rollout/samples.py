"""The ledger to training samples: nothing is tokenised, nothing is guessed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from retrain.types import NO_VERSION, Objective, Rollout, Sample, Segment, Source


def to_samples(
    rollout: Rollout, objective: Objective = "policy", *, last_turn_only: bool = False
) -> list[Sample]:
    """One sample for each segment that has something to train on.

    `policy` trains the sampled tokens, `cross_entropy` the targets; a token that a fork shares
    with its parent trains in the parent only, so each trains once. With `last_turn_only` those of
    the rollout's last MODEL message are all that train. What follows a segment's last trained token
    is left out. Rollouts that are masked or not trainable give no samples.
    """
    if rollout.error is not None or not rollout.trainable:
        return []
    trained = Source.SAMPLED if objective == "policy" else Source.TARGET
    return list(_samples(rollout, int(trained), objective, last_turn_only))


def _samples(
    rollout: Rollout, trained: int, objective: Objective, last_turn_only: bool
) -> Iterator[Sample]:
    turn_of = {message: turn for turn, message in enumerate(rollout.model_messages)}
    last = len(turn_of) - 1
    for index, segment in enumerate(rollout.segments):
        mask = array("B", [1 if source == trained else 0 for source in segment.source])
        turns = _turns(segment, turn_of)
        if last_turn_only:
            mask = array(
                "B", [one if turn == last else 0 for one, turn in zip(mask, turns, strict=True)]
            )
        own = _last_one(mask) + 1
        if own == 0:
            continue
        prefix = segment.prefix_len
        yield Sample(
            token_ids=rollout.full_token_ids(index)[: prefix + own],
            loss_mask=array("B", bytes(prefix)) + mask[:own],
            rollout_id=rollout.id,
            group_id=rollout.group_id,
            objective=objective,
            behavior_logprobs=array("f", bytes(4 * prefix)) + segment.logprobs[:own],
            turns=array("i", [-1] * prefix) + turns[:own],
            versions=array("i", [NO_VERSION] * prefix) + segment.versions[:own],
        )


def _turns(segment: Segment, turn_of: Mapping[int, int]) -> array[int]:
    turns = array("i", [-1]) * len(segment.token_ids)
    for span in segment.turns:
        turns[span.start : span.end] = array("i", [turn_of.get(span.message, -1)]) * (
            span.end - span.start
        )
    return turns


def _last_one(mask: Sequence[int]) -> int:
    for position in range(len(mask) - 1, -1, -1):
        if mask[position]:
            return position
    return -1
