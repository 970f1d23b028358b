"""The ledger becomes samples: each sampled token trains exactly once."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
import torch

from retrain.learner.batch import micro_batches
from retrain.rollout import to_samples
from retrain.types import Message, MessageType, Prompt, Rollout, Sample, Source, Turn


def say(rollout: Rollout, parent: int | None, prefix: int, context: list[int], *said: int) -> None:
    """A MODEL message sampled after a prompt that shares `prefix` tokens of segment `parent`."""
    logprobs = array("f", [-token / 100 for token in said])
    turn = Turn(
        Prompt(parent, prefix, context, [int(Source.CONTEXT)] * len(context)),
        array("i", said),
        logprobs,
        array("i", [3] * len(said)),
        "stop_token",
    )
    rollout.add_messages(Message("m", MessageType.MODEL, turn=turn))


def forked() -> Rollout:
    """Two turns; then a fork after 3 tokens, one turn in it; then a fork of the fork."""
    rollout = Rollout("r", group_id="g")
    say(rollout, None, 0, [1, 2], 10, 11)
    say(rollout, 0, 4, [3], 12)
    say(rollout, 0, 3, [4], 13, 14)
    say(rollout, 1, 5, [5, 6], 15)
    return rollout


def test_segments_become_samples_with_their_shared_prefixes() -> None:
    samples = to_samples(forked())
    assert [list(s.token_ids) for s in samples] == [
        [1, 2, 10, 11, 3, 12],
        [1, 2, 10, 4, 13, 14],
        [1, 2, 10, 4, 13, 5, 6, 15],
    ]
    assert [list(s.loss_mask) for s in samples] == [
        [0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert all(s.rollout_id == "r" and s.group_id == "g" for s in samples)


def test_each_sampled_token_trains_exactly_once_with_the_engines_number() -> None:
    trained: Counter[int] = Counter()
    for sample in to_samples(forked()):
        assert sample.behavior_logprobs is not None and sample.versions is not None
        for column, token in enumerate(sample.token_ids):
            if sample.loss_mask[column]:
                trained[token] += 1
                assert sample.behavior_logprobs[column] == pytest.approx(-token / 100)
                assert sample.versions[column] == 3
            else:
                assert sample.versions[column] in (-1, 3)
    assert trained == Counter([10, 11, 12, 13, 14, 15])


def test_what_follows_the_last_trained_token_is_left_out() -> None:
    rollout = Rollout("r")
    say(rollout, None, 0, [1], 10)
    rollout.enter_prompt(Prompt(0, 2, [7, 8], [0, 0]))
    (sample,) = to_samples(rollout)
    assert list(sample.token_ids) == [1, 10]


def test_the_last_turn_alone_may_train() -> None:
    """Turns 1 to 3 of the fork are context then: the segments that hold only those are gone."""
    (sample,) = to_samples(forked(), last_turn_only=True)
    assert list(sample.token_ids) == [1, 2, 10, 4, 13, 5, 6, 15]
    assert list(sample.loss_mask) == [0, 0, 0, 0, 0, 0, 0, 1]
    assert sample.turns is not None and sample.turns[7] == 3
    straight = Rollout("r")
    say(straight, None, 0, [1, 2], 10, 11)
    say(straight, 0, 4, [3], 12, 13)
    (sample,) = to_samples(straight, last_turn_only=True)
    assert list(sample.token_ids) == [1, 2, 10, 11, 3, 12, 13]
    assert list(sample.loss_mask) == [0, 0, 0, 0, 0, 1, 1]


def test_a_single_turn_is_the_last_one() -> None:
    rollout = Rollout("r")
    say(rollout, None, 0, [1, 2], 10, 11)
    assert to_samples(rollout, last_turn_only=True) == to_samples(rollout)


def test_masked_and_untrainable_rollouts_give_no_samples() -> None:
    masked, frozen = forked(), forked()
    masked.error = "the engine failed"
    frozen.trainable = False
    assert to_samples(masked) == to_samples(frozen) == []


def test_targets_train_under_cross_entropy_only() -> None:
    rollout = Rollout("r")
    sources = [int(Source.CONTEXT), int(Source.TARGET), int(Source.TARGET)]
    rollout.enter_prompt(Prompt(None, 0, [1, 20, 21], sources, ((0, 1, 3),)))
    (sample,) = to_samples(rollout, "cross_entropy")
    assert list(sample.loss_mask) == [0, 1, 1] and sample.objective == "cross_entropy"
    assert to_samples(rollout) == []


def group(*rewards: float, name: str = "g") -> list[Rollout]:
    rollouts = []
    for index, reward in enumerate(rewards):
        rollout = forked()
        rollout.id, rollout.group_id, rollout.reward = f"{name}/{index}", name, reward
        rollouts.append(rollout)
    return rollouts


def test_batches_hold_the_samples_and_the_weights_of_the_whole() -> None:
    groups = [group(0.0, 0.5, 1.0)]
    samples = [sample for one in groups[0] for sample in to_samples(one)]
    for sample, advantage in zip(samples, (-0.5, -0.5, -0.5, 0, 0, 0, 0.5, 0.5, 0.5), strict=True):
        sample.advantages = array("d", [advantage]) * len(sample)
    batches = list(
        micro_batches(
            samples, token_budget=16, aggregation="sequence_mean", device=torch.device("cpu")
        )
    )
    assert sorted(i for chosen, _ in batches for i in chosen) == [0, 1, 2, 6, 7, 8]
    for chosen, batch in batches:
        assert batch.token_ids.numel() <= 16
        for row, index in enumerate(chosen):
            sample, length = samples[index], len(samples[index])
            assert batch.token_ids[row, :length].tolist() == list(sample.token_ids)
            assert batch.mask[row].nonzero().flatten().tolist() == _ones(sample)
            # 6 trained tokens a rollout, 3 rollouts
            assert batch.weights[row].sum().item() == pytest.approx(sum(sample.loss_mask) / 18)


def _ones(sample: Sample) -> list[int]:
    return [i for i, one in enumerate(sample.loss_mask) if one]
