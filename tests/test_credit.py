"""Rewards become advantages: every estimator on groups that are worked out by hand."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from retrain.loops.credit import (
    Credit,
    by_agent,
    has_variance,
    punish_overlong,
    rollout_advantages,
    sampled_tokens,
)
from retrain.rollout import to_samples
from retrain.types import RewardPart, Rollout, Sample
from test_rollout_samples import say

STD = math.sqrt(2) + 1e-6
"""Of the rewards 1, 0, 0, 3 (mean 1)."""


def attempt(
    name: str,
    turns: Sequence[int],
    rewards: Sequence[float],
    *,
    agent: str = "policy",
    forks: bool = False,
) -> Rollout:
    """Turns of so many sampled tokens, two tokens of context before each; `forks`: each turn after
    the first starts a segment that shares one token with the one before."""
    rollout = Rollout(name, group_id="g", agent=agent)
    for turn, tokens in enumerate(turns):
        parent = len(rollout.segments) - 1 if turn else None
        prefix = 0 if parent is None else 1 if forks else len(rollout.segments[-1])
        say(rollout, parent, prefix, [1, 2], *range(3, 3 + tokens))
    rollout.step_rewards, rollout.reward = list(rewards), sum(rewards)
    return rollout


def samples_of(group: Sequence[Rollout]) -> list[Sample]:
    return [sample for rollout in group for sample in to_samples(rollout)]


def put(samples: Sequence[Sample], column: str, rollout: str, values: Sequence[float]) -> None:
    """Give a rollout's trained tokens these values, and all others one that must not be read."""
    rest = iter(values)
    for sample in samples:
        if sample.rollout_id == rollout:
            filled = [next(rest) if trains else 1e6 for trains in sample.loss_mask]
            setattr(sample, column, array("d", filled))
    assert next(rest, None) is None


def of_tokens(samples: Sequence[Sample], column: str = "advantages") -> dict[str, list[float]]:
    """Each rollout's trained tokens; all others must be zero."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        values = getattr(sample, column)
        assert len(values) == len(sample)
        for value, trains in zip(values, sample.loss_mask, strict=True):
            if trains:
                found.setdefault(sample.rollout_id, []).append(value)
            else:
                assert value == 0.0
    return found


def assert_near(found: dict[str, list[float]], expected: Mapping[str, Sequence[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(list(values), abs=1e-9), name


def credited(group: Sequence[Rollout], **choices: Any) -> dict[str, list[float]]:
    samples = samples_of(group)
    Credit(**choices).assign([group], samples)
    return of_tokens(samples)


def four() -> list[Rollout]:
    """Rewards 1, 0, 0, 3 for 1, 2, 3 and 2 tokens."""
    shapes = zip("abcd", (1, 2, 3, 2), (1.0, 0.0, 0.0, 3.0), strict=True)
    return [attempt(name, [tokens], [reward]) for name, tokens, reward in shapes]


@pytest.mark.parametrize(
    ("advantage", "normalize", "expected"),
    [
        ("grpo", "group", (0, -1 / STD, -1 / STD, 2 / STD)),
        ("grpo", "none", (0, -1, -1, 2)),
        ("rloo", "none", (0, -4 / 3, -4 / 3, 8 / 3)),
        ("rloo", "group", (0, -4 / 3 / STD, -4 / 3 / STD, 8 / 3 / STD)),
        # (1 * 1 + 2 * 3) / 8 of the reward per token
        ("opo", "none", (1 / 8, -7 / 8, -7 / 8, 17 / 8)),
        ("opo", "group", (1 / 8 / STD, -7 / 8 / STD, -7 / 8 / STD, 17 / 8 / STD)),
    ],
)
def test_estimators_of_groups(advantage: Any, normalize: Any, expected: Sequence[float]) -> None:
    found = credited(four(), advantage=advantage, normalize_advantages=normalize)
    lengths = dict(zip("abcd", (1, 2, 3, 2), strict=True))
    values = dict(zip("abcd", expected, strict=True))
    assert_near(found, {name: [values[name]] * lengths[name] for name in "abcd"})


def test_the_batch_is_whitened_over_tokens_of_all_groups() -> None:
    other = [attempt("e", [1], [5.0]), attempt("f", [1], [3.0])]
    groups = [four(), other]
    samples = [sample for group in groups for sample in samples_of(group)]
    Credit(normalize_advantages="batch").assign(groups, samples)
    # 0, -1 x 2, -1 x 3, 2 x 2, 1, -1: their sum is -1, that of their squares 15
    mean, scale = -0.1, 1 / math.sqrt((15 - 10 * 0.01) / 9 + 1e-8)
    raw = {"a": [0], "b": [-1] * 2, "c": [-1] * 3, "d": [2] * 2, "e": [1], "f": [-1]}
    expected = {name: [(v - mean) * scale for v in values] for name, values in raw.items()}
    assert_near(of_tokens(samples), expected)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "opo"])
def test_equal_rewards_have_advantages_of_exactly_zero(advantage: Any) -> None:
    group = [attempt(name, [2], [0.1 + 0.2]) for name in "abc"]
    assert credited(group, advantage=advantage) == {name: [0.0, 0.0] for name in "abc"}


def test_turns_are_normalised_together_and_have_their_later_ones() -> None:
    group = [
        attempt("a", [2, 1], [1.0, 0.0]),
        attempt("b", [1, 2], [0.0, 3.0], forks=True),
        attempt("c", [1], [1.0]),
    ]
    # five turns: 1 0 | 0 3 | 1, of mean 1 and variance 6 / 4
    std = math.sqrt(1.5) + 1e-6
    for normalize, scale in (("group", 1 / std), ("none", 1.0)):
        found = credited(group, per_turn=True, normalize_advantages=normalize)
        a, b = [-scale, -scale, -scale], [scale, 2 * scale, 2 * scale]
        assert_near(found, {"a": a, "b": b, "c": [0.0]})
    # by whole rollouts the rewards would be 1, 3, 1
    assert credited(group, normalize_advantages="none")["a"] == pytest.approx([-2 / 3] * 3)


def leaving(group: Sequence[Rollout], **distances: Sequence[float]) -> list[Sample]:
    """Samples whose tokens are so much likelier than under the reference."""
    samples = samples_of(group)
    for name, distance in distances.items():
        put(samples, "old_logprobs", name, [d - 3.0 for d in distance])
        put(samples, "ref_logprobs", name, [-3.0] * len(distance))
    return samples


@pytest.mark.parametrize(
    ("estimator", "half_apart"),
    [
        ("k1", (0.7 - 0.1) / 2),  # 1 - 0.5 * (0.2 + 0.4) and 0 + 0.5 * 0.2
        ("k2", (0.95 + 0.01) / 2),  # 1 - 0.5 * (0.02 + 0.08) and 0 - 0.5 * 0.02
    ],
)
def test_kl_comes_off_the_rewards_of_rollouts(estimator: Any, half_apart: float) -> None:
    group = [attempt("a", [1, 1], [1.0, 0.0], forks=True), attempt("b", [1], [0.0])]
    samples = leaving(group, a=[0.2, 0.4], b=[-0.2])
    credit = Credit(normalize_advantages="none", kl_coefficient=0.5, kl_estimator=estimator)
    credit.assign([group], samples)
    assert_near(of_tokens(samples), {"a": [half_apart] * 2, "b": [-half_apart]})
    assert [rollout.reward for rollout in group] == [1.0, 0.0]  # what was earned stays


def test_kl_comes_off_the_rewards_of_the_turns_that_left() -> None:
    group = [attempt("a", [1, 1], [1.0, 0.0]), attempt("b", [1], [0.0])]
    samples = leaving(group, a=[0.2, 0.4], b=[-0.2])
    Credit(normalize_advantages="none", per_turn=True, kl_coefficient=0.5).assign([group], samples)
    # turns 0.9, -0.2 and 0.1, of mean 0.8 / 3
    mean = 0.8 / 3
    expected = {"a": [0.9 - 0.2 - 2 * mean, -0.2 - mean], "b": [0.1 - mean]}
    assert_near(of_tokens(samples), expected)


@pytest.mark.parametrize("forks", [False, True])
def test_reinforce_plus_plus_discounts_rewards_and_kl_from_token_to_token(forks: bool) -> None:
    group = [attempt("a", [2, 1], [1.0, 2.0], forks=forks), attempt("b", [1], [4.0])]
    samples = leaving(group, a=[0.1, -0.3, 0.5], b=[0.0])
    Credit(
        advantage="reinforce_plus_plus", normalize_advantages="none", gamma=0.5, kl_coefficient=0.1
    ).assign([group], samples)
    third = 2 - 0.05
    second = 1 + 0.03 + 0.5 * third
    assert_near(of_tokens(samples), {"a": [-0.01 + 0.5 * second, second, third], "b": [4.0]})


@pytest.mark.parametrize("forks", [False, True], ids=["one segment", "two segments"])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_gae_carries_values_over_what_the_model_did_not_say(
    forks: bool, coefficient: float
) -> None:
    group = [attempt("a", [2, 1], [1.0, 2.0], forks=forks), attempt("b", [1], [0.0])]
    samples = leaving(group, a=[0.1, -0.3, 0.5], b=[0.0])
    put(samples, "values", "a", [0.5, 0.25, 1.0])
    put(samples, "values", "b", [0.75])
    credit = Credit(
        advantage="gae", normalize_advantages="none", gamma=0.9, gae_lambda=0.8,
        kl_coefficient=coefficient,
    )  # fmt: skip
    credit.assign([group], samples)
    # deltas -0.275, 1.65 and 1, less the penalties 0.01, -0.03 and 0.05 where there are any
    share = coefficient / 0.1
    third = 1 - 0.05 * share
    second = 1.65 + 0.03 * share + 0.72 * third
    first = -0.275 - 0.01 * share + 0.72 * second
    assert_near(of_tokens(samples), {"a": [first, second, third], "b": [-0.75]})
    returns = [first + 0.5, second + 0.25, third + 1.0]
    assert_near(of_tokens(samples, "returns"), {"a": returns, "b": [0.0]})


def test_whitening_leaves_the_returns_alone() -> None:
    group = [attempt("a", [2, 1], [1.0, 2.0]), attempt("b", [1], [0.0])]
    plain, whitened = samples_of(group), samples_of(group)
    for samples in (plain, whitened):
        put(samples, "values", "a", [0.5, 0.25, 1.0])
        put(samples, "values", "b", [0.75])
    Credit(advantage="gae", normalize_advantages="none").assign([group], plain)
    Credit(advantage="gae", normalize_advantages="batch").assign([group], whitened)
    assert of_tokens(plain, "returns") == of_tokens(whitened, "returns")
    before = of_tokens(plain)
    tokens = [*before["a"], *before["b"]]
    assert tokens == [2.5, 2.75, 1.0, -0.75]
    mean, scale = 1.375, 1 / math.sqrt(statistics.variance(tokens) + 1e-8)
    expected = {name: [(v - mean) * scale for v in values] for name, values in before.items()}
    assert_near(of_tokens(whitened), expected)


def test_the_reward_of_a_turn_without_tokens_goes_to_the_token_before() -> None:
    group = [attempt("a", [2, 0], [1.0, 2.0]), attempt("b", [0, 1], [4.0, 8.0])]
    found = credited(group, advantage="reinforce_plus_plus", normalize_advantages="none", gamma=0.5)
    assert_near(found, {"a": [1.5, 3.0], "b": [12.0]})


def test_agents_of_a_group_are_compared_among_themselves() -> None:
    group = [
        attempt("a", [1], [1.0], agent="x"),
        attempt("b", [1], [10.0], agent="y"),
        attempt("c", [1], [0.0], agent="x"),
        attempt("d", [1], [30.0], agent="y"),
    ]
    assert [[r.id for r in own] for own in by_agent([group])] == [["a", "c"], ["b", "d"]]
    found = credited(group, normalize_advantages="none")
    assert_near(found, {"a": [0.5], "b": [-10.0], "c": [-0.5], "d": [10.0]})


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "opo"])
def test_masked_rollouts_are_compared_with_none(advantage: Any) -> None:
    group = four()
    group[3].error = "the engine failed"
    found = credited(group, advantage=advantage, normalize_advantages="none")
    expected = {
        "grpo": (2 / 3, -1 / 3, -1 / 3),
        "rloo": (1, -1 / 2, -1 / 2),
        "opo": (5 / 6, -1 / 6, -1 / 6),
    }[advantage]
    shapes = zip("abc", expected, (1, 2, 3), strict=True)
    assert_near(found, {name: [value] * tokens for name, value, tokens in shapes})


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_plus_plus"])
def test_frozen_agents_have_no_advantage_and_give_none(advantage: Any) -> None:
    group = four()
    frozen = attempt("z", [1], [100.0], agent="opponent")
    frozen.trainable = False
    choices = {"advantage": advantage, "normalize_advantages": "none"}
    assert credited([*group, frozen], **choices) == credited(group, **choices)


@pytest.mark.parametrize("per_turn", [False, True])
def test_rollouts_that_do_not_train_still_count_in_the_baseline(per_turn: bool) -> None:
    group = four()
    samples = samples_of(group[:3])
    Credit(normalize_advantages="none", per_turn=per_turn).assign([group], samples)
    assert_near(of_tokens(samples), {"a": [0.0], "b": [-1.0] * 2, "c": [-1.0] * 3})


def test_variance_is_that_of_an_agent_that_trains_and_is_not_masked() -> None:
    group = [attempt(name, [1], [1.0], agent="x") for name in "ab"]
    group += [attempt(name, [1], [2.0], agent="y") for name in "cd"]
    assert not has_variance(group)
    group[3].reward = 3.0
    assert has_variance(group)
    for rollout in group[2:]:
        rollout.trainable = False
    assert not has_variance(group)
    group[1].reward = 0.0
    assert has_variance(group)
    group[1].error = "the engine failed"
    assert not has_variance(group)


def test_variance_of_turns_is_not_that_of_rollouts() -> None:
    group = [attempt("a", [1, 1], [1.0, 0.0]), attempt("b", [1, 1], [0.0, 1.0])]
    assert not has_variance(group) and has_variance(group, per_turn=True)
    even = [attempt("a", [1, 1], [1.0, 1.0]), attempt("b", [1], [1.0])]
    assert has_variance(even) and not has_variance(even, per_turn=True)


def test_the_mean_advantage_of_a_rollout_is_over_its_trained_tokens() -> None:
    group = [attempt("a", [2, 1], [1.0, 2.0], forks=True), attempt("b", [1], [4.0])]
    samples = samples_of(group)
    assert len(samples) == 3
    Credit(advantage="reinforce_plus_plus", normalize_advantages="none").assign([group], samples)
    assert rollout_advantages(samples) == pytest.approx({"a": 8 / 3, "b": 4.0})


def test_a_turn_near_the_limit_costs_its_share() -> None:
    """Limit 10, buffer 4: nothing up to 6 tokens, half at 8, all of it at 10."""
    group = [
        attempt("a", [6], [1.0]),
        attempt("b", [8, 10, 3], [1.0, 0.0, 2.0], forks=True),
        attempt("c", [10], [1.0]),
    ]
    group[2].error = "the engine failed"
    punish_overlong(group, limit=10, buffer_share=0.4, weight=3.0)
    assert [rollout.reward for rollout in group] == [1.0, 3.0 - 1.5 - 3.0, 1.0]
    assert [rollout.step_rewards for rollout in group] == [[1.0], [-0.5, -3.0, 2.0], [1.0]]
    name = "overlong_punishment"
    assert group[1].reward_parts == [
        RewardPart(name, "step", 0, -0.5, 3.0, -1.5),
        RewardPart(name, "step", 1, -1.0, 3.0, -3.0),
    ]
    assert not group[0].reward_parts and not group[2].reward_parts
    assert sampled_tokens(group[1]) == 21
