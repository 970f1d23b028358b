"""Advantages against numbers worked out by hand, and against plain loops over plain lists."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.algorithms import (
    gae,
    grpo,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    turn_credit,
    whiten,
)

NAN = math.nan


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_rloo_by_hand() -> None:
    # the others' means: 3/2, 5/2, 2
    close(rloo(f64(3, 1, 2)), f64(1.5, -1.5, 0))
    close(rloo(f64(1, 0)), f64(1, -1))


def test_rloo_is_the_centred_reward_scaled() -> None:
    rewards = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(rloo(rewards), grpo(rewards, normalize_std=False) * 8 / 7)


def test_opo_weights_the_baseline_by_length() -> None:
    # (1 * 10 + 0 * 30) / 40 = 1/4
    close(opo(f64(1, 0), torch.tensor([10, 30])), f64(0.75, -0.25))
    equal = opo(f64(3, 1, 2), torch.tensor([7, 7, 7]))
    close(equal, grpo(f64(3, 1, 2), normalize_std=False))
    assert opo(f64(3, 1), torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("rewards", [[0.7], [0.1, 0.1, 0.1], [0.3] * 7])
def test_no_variance_no_advantage(rewards: list[float]) -> None:
    assert not rloo(f64(*rewards)).any()
    assert not opo(f64(*rewards), torch.arange(1, len(rewards) + 1)).any()
    assert not turn_credit([f64(*rewards)])[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    rewards, mask = torch.tensor([1.0, 0.0], dtype=dtype), torch.ones(2, 3, dtype=torch.bool)
    tokens = rewards.unsqueeze(1).expand(2, 3)
    found = [
        grpo(rewards),
        rloo(rewards),
        opo(rewards, torch.tensor([3, 3])),
        reinforce_plus_plus(tokens, mask),
        reinforce_plus_plus_baseline(rewards, torch.tensor([0, 0]), mask),
        whiten(tokens, mask),
        *gae(tokens, tokens, mask),
        *turn_credit([rewards]),
    ]
    assert {each.dtype for each in found} == {dtype}


def test_turn_credit_by_hand() -> None:
    # all turns: 1, 3, 2, 2 -> mean 2, unbiased variance 2/3; normalised: -z, z, 0, 0
    found = turn_credit([f64(1, 3), f64(2), f64(), f64(2)], eps=0.0)
    z = math.sqrt(1.5)
    close(found[0], f64(0, z))
    close(found[1], f64(0))
    assert found[2].shape == (0,)
    close(found[3], f64(0))
    # without the std: 1, 0, 5 less 2 -> -1, -2, 3; later ones added: -1 - 2 + 3, -2 + 3, 3
    close(turn_credit([f64(1, 0, 5)], normalize_std=False)[0], f64(0, 1, 3))
    assert turn_credit([]) == []


def test_turn_credit_of_single_turns_is_grpo() -> None:
    rewards = f64(0.2, 1.0, 0.4)
    close(torch.cat(turn_credit([r.reshape(1) for r in rewards])), grpo(rewards))


def test_reinforce_plus_plus_skips_holes() -> None:
    # gamma 1/2 from token to token of the mask: 4; 2 + 4/2; 1 + 4/2
    mask = torch.tensor([[True, False, True, False, True, False]])
    rewards = rows([1, NAN, 2, 9, 4, math.inf])
    found = reinforce_plus_plus(rewards, mask, gamma=0.5)
    assert found.tolist() == [[3, 0, 4, 0, 4, 0]]


def test_whiten_by_hand() -> None:
    # values 1, 2, 6: mean 3, deviations -2, -1, 3, unbiased variance 14 / 2
    values, mask = rows([1, NAN, 2], [6, NAN, 5]), rows([1, 0, 1], [1, 0, 0]).bool()
    s = math.sqrt(7)
    close(whiten(values, mask, eps=0.0), rows([-2 / s, 0, -1 / s], [3 / s, 0, 0]))
    kept = whiten(values, mask, eps=0.0, shift_mean=False)
    close(kept, rows([3 - 2 / s, 0, 3 - 1 / s], [3 + 3 / s, 0, 0]))
    close(whiten(values, mask, eps=2.0), rows([-2 / 3, 0, -1 / 3], [1, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_without_variance(dtype: torch.dtype) -> None:
    values = torch.full((3, 7), 0.1, dtype=dtype)
    for chosen in (0, 1, 21):
        mask = torch.arange(21).reshape(3, 7) < chosen
        assert whiten(values, mask).abs().max() < 1e-7
        kept = whiten(values, mask, shift_mean=False)
        close(kept, values * mask, atol=1e-7)


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    # groups {3, 1} and {5, 5}: centred 1, -1, 0, 0; on tokens 1, 1, -1, 0: mean 1/4,
    # squared deviations 9/16 + 9/16 + 25/16 + 1/16 = 11/4, unbiased variance 11/12
    rewards, groups = f64(3, 5, 1, 5), torch.tensor([4, 2, 4, 2])
    mask = rows([1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]).bool()
    s = math.sqrt(11 / 12 + 1e-8)
    found = reinforce_plus_plus_baseline(rewards, groups, mask)
    expected = rows([0.75, 0, 0.75], [-0.25, 0, 0], [0, 0, -1.25], [0, 0, 0]) / s
    close(found, expected)


def test_gae_by_hand() -> None:
    # tokens: r 1, V 2 | r 0, V 4 | r 8, V 6; gamma 1/2, lambda 1/2
    # deltas: 1 + 2 - 2 = 1 | 0 + 3 - 4 = -1 | 8 - 6 = 2; A: 2 | -1 + 2/4 = -1/2 | 1 - 1/8 = 7/8
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    rewards = rows([1, 100, 0, 8, NAN], [NAN] * 5)
    values = rows([2, NAN, 4, 6, -50], [NAN] * 5).requires_grad_()
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.875, 0, -0.5, 2, 0], [0] * 5]
    assert returns.tolist() == [[2.875, 0, 3.5, 8, 0], [0] * 5]
    assert not advantages.requires_grad and not returns.requires_grad


def test_gae_of_nothing() -> None:
    for shape in ((0, 4), (3, 0), (2, 3)):
        empty = torch.zeros(shape)
        advantages, returns = gae(empty, empty, empty.bool())
        assert advantages.shape == returns.shape == shape and not advantages.any()


def gae_by_loop(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> list[float]:
    found = [0.0] * len(mask)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(mask))):
        if mask[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = found[t] = delta + gamma * lam * next_advantage
            next_value = values[t]
    return found


UNIT = st.floats(0, 1)
TOKEN = st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.booleans())
BATCH = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(TOKEN, min_size=length, max_size=length), min_size=1, max_size=4
    )
)


@settings(max_examples=60, deadline=None)
@given(BATCH, UNIT, UNIT)
def test_gae_equals_the_plain_loop(
    batch: list[list[tuple[float, float, bool]]], gamma: float, lam: float
) -> None:
    table = torch.tensor(batch, dtype=torch.float64)
    rewards, values, mask = table[..., 0], table[..., 1], table[..., 2].bool()
    expected = rows(
        *(
            gae_by_loop([x[0] for x in row], [x[1] for x in row], [x[2] for x in row], gamma, lam)
            for row in batch
        )
    )
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    close(advantages, expected)
    close(returns, torch.where(mask, expected + values, 0.0))
    single = gae(rewards.float(), values.float(), mask, gamma=gamma, lam=lam)[0]
    close(single, advantages.float(), atol=1e-5)
    close(
        reinforce_plus_plus(rewards, mask, gamma=gamma),
        gae(rewards, torch.zeros_like(values), mask, gamma=gamma)[0],
    )


@settings(max_examples=60, deadline=None)
@given(BATCH)
def test_holes_change_nothing(batch: list[list[tuple[float, float, bool]]]) -> None:
    """The advantages of a row are those of its mask tokens alone, in their order."""
    for row in torch.tensor(batch, dtype=torch.float64):
        mask = row[:, 2].bool()
        dense = row[mask]
        full = torch.ones(1, len(dense), dtype=torch.bool)
        alone, _ = gae(dense[None, :, 0], dense[None, :, 1], full, gamma=0.9, lam=0.8)
        among, _ = gae(row[None, :, 0], row[None, :, 1], mask[None], gamma=0.9, lam=0.8)
        close(among[0][mask], alone[0])


def test_gae_keeps_the_order_of_long_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 3, 1000, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 1000, generator=generator) > 0.5
    found, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    expected = [
        gae_by_loop(*row, gamma=0.9, lam=0.8)
        for row in zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)
    ]
    close(found, rows(*expected))


def test_gae_at_its_limits() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    values = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 6, generator=generator) > 0.4
    # lambda 1: returns are the discounted rewards, whatever the critic says
    close(
        gae(rewards, values, mask, gamma=0.9, lam=1.0)[1],
        reinforce_plus_plus(rewards, mask, gamma=0.9),
    )
    # lambda 0: one-step errors; gamma 0: the token's reward alone
    close(gae(rewards, values, mask, gamma=0.0, lam=0.0)[0], (rewards - values) * mask)


@settings(max_examples=60, deadline=None)
@given(BATCH)
def test_whitened_values_have_mean_0_and_variance_1(
    batch: list[list[tuple[float, float, bool]]],
) -> None:
    table = torch.tensor(batch, dtype=torch.float64)
    mask = table[..., 2].bool()
    chosen = table[..., 0][mask].tolist()
    found = whiten(table[..., 0], mask)
    assert not found[~mask].any()
    if len(chosen) > 1 and statistics.variance(chosen) > 1e-3:
        assert found[mask].mean().item() == pytest.approx(0, abs=1e-9)
        assert statistics.variance(found[mask].tolist()) == pytest.approx(1, abs=1e-4)
