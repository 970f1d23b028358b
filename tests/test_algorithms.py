"""GRPO, the clipped surrogate and cross-entropy against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from retrain.algorithms import cross_entropy, grpo, ppo_clip


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_grpo_by_hand() -> None:
    # mean 1/2, squared deviations 4 * 1/4 over 3: the unbiased std is sqrt(1/3)
    found = grpo(f64(1, 0, 0, 1), eps=0.0)
    half = 0.5 * math.sqrt(3)
    torch.testing.assert_close(found, f64(half, -half, -half, half), atol=1e-12, rtol=0)
    found = grpo(f64(1, 0, 0, 1))
    assert found[0].item() == pytest.approx(0.5 / (1 / math.sqrt(3) + 1e-6), abs=1e-12)
    # mean 2, std 1
    torch.testing.assert_close(grpo(f64(3, 1, 2), eps=0.0), f64(1, -1, 0), atol=1e-12, rtol=0)


def test_grpo_without_std_takes_the_mean_off() -> None:
    assert grpo(f64(5, 1, 0), normalize_std=False).tolist() == [3, -1, -2]


@pytest.mark.parametrize("rewards", [[0.7], [0.1, 0.1, 0.1], [0.0, 0.0]])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_without_variance_has_no_advantage(
    rewards: list[float], normalize_std: bool
) -> None:
    assert not grpo(f64(*rewards), normalize_std=normalize_std).any()


CASES = [
    # ratio, advantage, loss, d loss / d logprob: -ratio * advantage where not clipped
    (1.5, 2.0, -2.56, 0.0),  # min(3.0, 1.28 * 2): clipped above
    (0.5, 2.0, -1.0, -1.0),  # min(1.0, 0.8 * 2): not clipped
    (1.5, -2.0, 3.0, 3.0),  # min(-3.0, -2.56): not clipped
    (0.5, -2.0, 1.6, 0.0),  # min(-1.0, -1.6): clipped below
    (1.1, 2.0, -2.2, -2.2),
    (0.9, -2.0, 1.8, 1.8),
    (1.0, 2.0, -2.0, -2.0),  # the first update: the plain policy gradient
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), CASES)
def test_ppo_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    old = f64(-1.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    found, _ = ppo_clip(
        logprobs, old, f64(advantage), torch.tensor([True]), clip_low=0.2, clip_high=0.28
    )
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_ppo_clip_counts_and_masks() -> None:
    ratios, advantages, _, _ = map(list, zip(*CASES, strict=True))
    old = torch.full((2, 7), -1.0, dtype=torch.float64)
    logprobs = (old + torch.log(f64(*ratios))).requires_grad_()
    old[1] = torch.nan
    mask = torch.tensor([[True] * 7, [False] * 7])
    loss, metrics = ppo_clip(
        logprobs, old, f64(*advantages).expand(2, 7), mask, clip_low=0.2, clip_high=0.28
    )
    loss.sum().backward()
    assert metrics["clipped_low"].item() == 1
    assert metrics["clipped_high"].item() == 1
    assert "clipped_dual" not in metrics
    assert metrics["ratio"].item() == pytest.approx(1.5 + 0.5 + 1.5 + 0.5 + 1.1 + 0.9 + 1.0)
    assert logprobs.grad is not None
    assert not loss[1].any() and logprobs.grad[1].tolist() == [0.0] * 7


def test_cross_entropy_by_hand() -> None:
    logprobs = f64(-0.5, -2.0, -9.0).requires_grad_()
    loss = cross_entropy(logprobs, torch.tensor([True, True, False]))
    loss.sum().backward()
    assert loss.tolist() == [0.5, 2.0, 0.0]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, -1.0, 0.0]
