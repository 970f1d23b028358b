"""Scored groups to new weights: what the settings of a step do to gradients, in float64."""

from __future__ import annotations

import copy
import math
import random
import statistics
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from retrain.config.algorithm import Hyperparameters
from retrain.loops.update import PolicyUpdate, build_update
from retrain.models import Policy
from retrain.rollout import to_samples
from retrain.types import Rollout, Sample
from test_learner import Gradients, assert_same, exact, gradients, plain_loss
from test_rollout_samples import say
from tiny import VOCAB, tiny_gpt2

TEMPERATURE = 0.7
TokenLoss = Callable[[Tensor, Sample, int], Tensor]
"""(log-probabilities [V] of what may stand at t, sample, t) -> loss of token t."""


def group(name: str, *rewards: float) -> list[Rollout]:
    """Attempts of two turns each at one prompt; in the first, the second turn is a fork."""
    generator = random.Random(name)

    def words(count: int) -> list[int]:
        return [generator.randrange(1, VOCAB) for _ in range(count)]

    prompt, rollouts = words(4), []
    for index, reward in enumerate(rewards):
        rollout = Rollout(f"{name}/{index}", group_id=name)
        say(rollout, None, 0, prompt, *words(2 + index))
        say(rollout, 0, len(rollout.segments[0]) if index else 5, words(2), *words(3))
        rollout.step_rewards, rollout.reward = [0.0, reward], reward
        rollouts.append(rollout)
    return rollouts


def three_groups() -> list[list[Rollout]]:
    return [group("x", 1, 0, 0, 3), group("y", 0, 1), group("z", 2, 0, 1)]


def by_hand(groups: Sequence[Sequence[Rollout]]) -> list[Sample]:
    """Samples with GRPO's advantages."""
    samples = []
    for rollouts in groups:
        rewards = [rollout.reward for rollout in rollouts]
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
        for rollout in rollouts:
            for sample in to_samples(rollout):
                value = (rollout.reward - mean) / (std + 1e-6)
                sample.advantages = array("d", [value]) * len(sample)
                samples.append(sample)
    return samples


def updating(model: Any, *, seed: int = 0, **settings: Any) -> PolicyUpdate:
    """One update of the whole batch with plain GRPO, where the settings say nothing else."""
    plain: dict[str, Any] = {"temperature": TEMPERATURE, "max_grad_norm": None}
    if settings.get("epochs", 1) * settings.get("mini_batches", 1) > 1:
        plain |= {"clip_low": 0.2, "clip_high": 0.28}
    chosen = Hyperparameters(**{**plain, **settings})
    return build_update(chosen, Policy(model, None), seed=seed)


def unheard() -> None:
    """Nobody wants to know that the weights have changed."""


async def first_gradient(update: PolicyUpdate, samples: Sequence[Sample]) -> Gradients:
    """What the first update would step along; nothing moves."""
    found: list[Gradients] = []
    model = update.learner.model

    def keep(part: Sequence[Sample], *, schedule_step: int) -> dict[str, float]:
        found.append(gradients(model))
        model.zero_grad()
        return {}

    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update.learner, "optim_step", keep)
        update.learn(samples, 1, unheard)
    return found[0]


def of_tokens(model: Any, one: Sample) -> Tensor:
    """[T, V] log-probabilities, row t of what may stand at t; from plain full logits."""
    logits = model(input_ids=torch.tensor([list(one.token_ids)])).logits[0] / TEMPERATURE
    return torch.cat((torch.zeros_like(logits[:1]), logits[:-1].log_softmax(-1)))


def plain_gradient(model: Any, samples: Sequence[Sample], loss: TokenLoss) -> Gradients:
    """Of the mean over rollouts of their tokens' mean."""
    of_rollout: dict[str, list[Tensor]] = {}
    for one in samples:
        table = of_tokens(model, one)
        losses = [loss(table[t], one, t) for t, trains in enumerate(one.loss_mask) if trains]
        of_rollout.setdefault(one.rollout_id, []).extend(losses)
    model.zero_grad()
    means = [torch.stack(losses).mean() for losses in of_rollout.values()]
    torch.stack(means).mean().backward()  # type: ignore[no-untyped-call]
    found = gradients(model)
    model.zero_grad()
    return found


def policy_gradient(table: Tensor, one: Sample, t: int) -> Tensor:
    """On-policy: the ratio is 1, its gradient that of the log-probability."""
    assert one.advantages is not None
    return -one.advantages[t] * table[one.token_ids[t]]


def shaken(model: Any, size: float = 0.02, seed: int = 5) -> None:
    """Move every weight a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=size)


def copies(samples: Sequence[Sample]) -> list[Sample]:
    return [copy.copy(sample) for sample in samples]


async def parts_of(update: PolicyUpdate, samples: Sequence[Sample], step: int) -> list[list[str]]:
    """The rollouts (an entry a sample) of each update that a step makes."""
    parts: list[list[str]] = []
    learn = update.learner.forward_backward

    def heard(part: Sequence[Sample], *args: Any, **how: Any) -> dict[str, float]:
        parts.append([sample.rollout_id for sample in part])
        return learn(part, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update.learner, "forward_backward", heard)
        update.learn(samples, step, unheard)
    return parts


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean"])
async def test_epochs_of_mini_batches_are_updates_one_after_the_other(how: Any) -> None:
    model = exact(tiny_gpt2)
    own = copy.deepcopy(model)
    update = updating(
        model, epochs=2, mini_batches=2, learning_rate=0.01, max_grad_norm=0.5, aggregation=how
    )
    samples = update.samples(three_groups())
    expected = by_hand(three_groups())
    for one in expected:
        with torch.no_grad():
            table = of_tokens(own, one)
        picked = [table[t, token].item() for t, token in enumerate(one.token_ids)]
        one.old_logprobs = array("d", picked)
    parts = await parts_of(update, samples, 1)
    assert len(parts) == 4

    optimizer = torch.optim.AdamW(own.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for part in parts:
        optimizer.zero_grad()
        loss = plain_loss(own, [s for s in expected if s.rollout_id in part], how)
        loss.backward()  # type: ignore[no-untyped-call]
        found = gradients(own).values()
        norm = math.sqrt(sum(g.square().sum().item() for g in found))
        for p in own.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=0)


async def test_each_group_is_in_one_mini_batch_and_each_token_once_an_epoch() -> None:
    groups = [group(name, 0, 1, 3) for name in "abcde"]
    settings: dict[str, Any] = {"epochs": 3, "mini_batches": 2, "learning_rate": 1e-6}
    update = updating(tiny_gpt2(), **settings)
    samples = update.samples(groups)
    everything = sorted(sample.rollout_id for sample in samples)
    assert len(everything) == 5 * 4  # three rollouts, of which one has a fork
    dealt: list[list[list[str]]] = []
    for step in (1, 2):
        parts = await parts_of(update, samples, step)
        epochs = [parts[start : start + 2] for start in (0, 2, 4)]
        for one, other in epochs:
            assert sorted(one + other) == everything
            assert {i.split("/")[0] for i in one}.isdisjoint(i.split("/")[0] for i in other)
            assert sorted((len(one), len(other))) == [8, 12]
        dealt += epochs
    assert len({str(epoch) for epoch in dealt}) > 1, "groups are dealt anew"
    again = await parts_of(updating(tiny_gpt2(), **settings), samples, 1)
    assert again == [part for epoch in dealt[:3] for part in epoch]
    reseeded = await parts_of(updating(tiny_gpt2(), seed=1, **settings), samples, 1)
    assert reseeded != again


async def test_more_mini_batches_than_groups_are_as_many_as_groups() -> None:
    update = updating(tiny_gpt2(), mini_batches=7)
    assert len(await parts_of(update, update.samples(three_groups()), 1)) == 3


async def test_the_ratio_is_to_the_learner_at_the_start_and_not_to_the_engine() -> None:
    model = exact(tiny_gpt2)
    update = updating(model, epochs=2)
    samples = update.samples(three_groups())
    shaken(model)
    for one, other in zip(by_hand(three_groups()), samples, strict=True):
        assert list(one.advantages or ()) == pytest.approx(  # zero where nothing trains
            [a if trains else b for a, b, trains in
             zip(other.advantages or (), one.advantages or (), one.loss_mask, strict=True)],
            abs=1e-9,
        )  # fmt: skip
    found = await first_gradient(update, samples)
    plain_loss(model, samples, "sequence_mean").backward()  # type: ignore[no-untyped-call]
    reference = gradients(model)
    assert_same(found, reference)
    engine = copies(samples)
    for one in engine:
        one.behavior_logprobs = array("f", [-9.0]) * len(one)
    assert_same(await first_gradient(update, engine), reference)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
async def test_the_correction_weighs_learner_over_engine(kind: Any, level: Any) -> None:
    model, cap = exact(tiny_gpt2), 1.5
    update = updating(model, correction={"kind": kind, "level": level, "cap": cap})
    samples, expected = update.samples(three_groups()), by_hand(three_groups())
    generator = random.Random(0)
    gaps: dict[str, list[float]] = {}
    for one, twin in zip(samples, expected, strict=True):
        with torch.no_grad():
            table = of_tokens(model, one)
        old = [table[t, token].item() for t, token in enumerate(one.token_ids)]
        one.behavior_logprobs = array("f", [x + generator.uniform(-0.8, 0.8) for x in old])
        gap = [x - b for x, b in zip(old, one.behavior_logprobs, strict=True)]
        twin.values = array("d", gap)
        own = (g for g, trains in zip(gap, one.loss_mask, strict=True) if trains)
        gaps.setdefault(one.rollout_id, []).extend(own)
    weights: list[float] = []

    def weighted(table: Tensor, one: Sample, t: int) -> Tensor:
        assert one.values is not None
        gap = one.values[t] if level == "token" else sum(gaps[one.rollout_id])
        ratio = math.exp(gap)
        weights.append(min(ratio, cap) if kind == "tis" else ratio * (ratio <= cap))
        return weights[-1] * policy_gradient(table, one, t)

    reference = plain_gradient(model, expected, weighted)
    assert min(weights) < 1 and max(weights) > 1 and (cap if kind == "tis" else 0.0) in weights
    assert_same(await first_gradient(update, samples), reference)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
async def test_kl_in_the_loss_is_that_from_the_frozen_copy(estimator: Any) -> None:
    model = exact(tiny_gpt2)
    reference = copy.deepcopy(model)
    update = updating(model, kl={"coefficient": 0.3, "estimator": estimator})
    shaken(model)
    groups = [*three_groups(), group("same", 1, 1)]
    samples, expected = update.samples(groups), by_hand(groups)
    tables: dict[int, Tensor] = {}

    def penalised(table: Tensor, one: Sample, t: int) -> Tensor:
        token = one.token_ids[t]
        if id(one) not in tables:
            with torch.no_grad():
                tables[id(one)] = of_tokens(reference, one)
        d = table[token] - tables[id(one)][t, token]
        penalty = d**2 / 2 if estimator == "k2" else torch.exp(-d) + d - 1
        return policy_gradient(table, one, t) + 0.3 * penalty

    assert_same(await first_gradient(update, samples), plain_gradient(model, expected, penalised))


@pytest.mark.parametrize("estimator", ["k1", "k2"])
async def test_kl_in_the_reward_is_in_the_advantages_not_in_the_loss(estimator: Any) -> None:
    model = exact(tiny_gpt2)
    reference = copy.deepcopy(model)
    kl = {"coefficient": 0.3, "estimator": estimator, "place": "reward"}
    update = updating(model, kl=kl, normalize_advantages="none")
    shaken(model)
    samples, expected = update.samples([group("y", 0, 1)]), by_hand([group("y", 0, 1)])
    rewards = {"y/0": 0.0, "y/1": 1.0}
    for one in expected:
        with torch.no_grad():
            now, then = of_tokens(model, one), of_tokens(reference, one)
        for t, token in enumerate(one.token_ids):
            if one.loss_mask[t]:
                d = (now[t, token] - then[t, token]).item()
                rewards[one.rollout_id] -= 0.3 * (d if estimator == "k1" else d**2 / 2)
    half = (rewards["y/1"] - rewards["y/0"]) / 2
    assert abs(half - 0.5) > 1e-3
    for one in expected:
        value = half if one.rollout_id == "y/1" else -half
        one.advantages = array("d", [value]) * len(one)
    assert_same(
        await first_gradient(update, samples), plain_gradient(model, expected, policy_gradient)
    )


async def test_the_entropy_bonus_has_the_gradient_of_the_entropy() -> None:
    model, groups = exact(tiny_gpt2), [*three_groups(), group("same", 1, 1)]
    update = updating(model, entropy_coefficient=0.2)

    def rewarded(table: Tensor, one: Sample, t: int) -> Tensor:
        entropy = -(table.exp() * table).sum()
        return policy_gradient(table, one, t) - 0.2 * entropy

    samples = update.samples(groups)
    reference = plain_gradient(model, by_hand(groups), rewarded)
    assert_same(await first_gradient(update, samples), reference)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        {"loss": "gmpo"},
        {"correction": {"level": "sequence"}},
    ],
    ids=["gspo", "gmpo", "correction"],
)
async def test_ratios_of_whole_rollouts_do_not_depend_on_the_cut(settings: dict[str, Any]) -> None:
    found: list[Gradients] = []
    for tokens, share in ((10_000, True), (1, True), (1, False), (25, False)):
        model = exact(tiny_gpt2)
        update = updating(
            model, epochs=2, micro_batch_tokens=tokens, share_prefixes=share, **settings
        )
        samples = update.samples(three_groups())
        for one in samples:
            assert one.old_logprobs is not None
            near = [x - 0.1 * (t % 3) for t, x in enumerate(one.old_logprobs)]
            one.behavior_logprobs = array("f", near)
        shaken(model, 0.01)
        found.append(await first_gradient(update, samples))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, False),
        (
            {"kl": {"place": "reward", "estimator": "k1"}, "normalize_advantages": "none"},
            False,
        ),
        ({"kl": {}}, True),
        ({"entropy_coefficient": 0.1}, True),
        ({"advantage": "gae", "normalize_advantages": "none", "critic": {}}, True),
    ],
    ids=["plain", "kl in reward", "kl in loss", "entropy", "critic"],
)
def test_groups_that_teach_nothing_train_only_what_needs_no_advantage(
    settings: dict[str, Any], kept: bool
) -> None:
    update = updating(tiny_gpt2(), **settings)
    samples = update.samples([group("same", 0, 0), group("mixed", 0, 1, 2)])
    found = {sample.rollout_id for sample in samples}
    mixed = {"mixed/0", "mixed/1", "mixed/2"}  # the middle one has an advantage of zero
    assert found == mixed | ({"same/0", "same/1"} if kept else set())


def test_truncated_rollouts_may_be_left_out_and_count_in_the_baseline() -> None:
    groups = [group("x", 1, 0, 0, 3)]
    groups[0][3].stop_reason = "length"
    groups[0][2].stop_reason = "context"
    update = updating(tiny_gpt2(), train_truncated=False, normalize_advantages="none")
    samples = update.samples(groups)
    found = {s.rollout_id: set(s.advantages or ()) - {0.0} for s in samples}
    assert found == {"x/0": set(), "x/1": {-1.0}}
    assert len({s.rollout_id for s in updating(tiny_gpt2()).samples(groups)}) == 4


def straight(name: str, *rewards: float) -> list[list[Rollout]]:
    """A group of calls of two tokens, a result, and answers of three, in one segment each."""
    rollouts = []
    for index, reward in enumerate(rewards):
        rollout = Rollout(f"{name}/{index}", group_id=name)
        say(rollout, None, 0, [1, 2, 3], 4 + index, 7)
        say(rollout, 0, 5, [8, 9], 10, 11 + index, 14)
        rollout.step_rewards, rollout.reward = [0.0, reward], reward
        rollouts.append(rollout)
    return [rollouts]


async def test_with_train_turns_last_calls_have_no_gradient() -> None:
    """The gradient is that of the answers alone, the calls being context; and not that of all."""
    model = exact(tiny_gpt2)
    update = updating(model, train_turns="last")
    samples = update.samples(straight("x", 0, 1, 3))
    assert [list(one.loss_mask) for one in samples] == [[0] * 7 + [1] * 3] * 3
    found = await first_gradient(update, samples)
    by_last = by_hand(straight("x", 0, 1, 3))
    for one in by_last:
        assert list(one.loss_mask) == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
        one.loss_mask = array("B", [0] * 7 + [1] * 3)
    assert_same(found, plain_gradient(model, by_last, policy_gradient))
    everything = updating(model)
    of_all = await first_gradient(everything, everything.samples(straight("x", 0, 1, 3)))
    assert any(not torch.allclose(found[name], of_all[name]) for name in found)


def test_credit_by_turn_is_that_of_the_turns() -> None:
    """Step rewards 0, 0 and 0, 1: of mean 1/4."""
    update = updating(tiny_gpt2(), credit="turn", normalize_advantages="none")
    found: dict[str, set[float]] = {}
    for one in update.samples([group("y", 0, 1)]):
        found.setdefault(one.rollout_id, set()).update(set(one.advantages or ()) - {0.0})
    assert found == {"y/0": {-0.5, -0.25}, "y/1": {0.5, 0.75}}
