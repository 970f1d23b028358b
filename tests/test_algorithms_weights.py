"""Aggregations, off-policy corrections, KL estimates and length penalties, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from retrain.algorithms import kl, mis, soft_overlong_punishment, tis, token_weights

NAN = math.nan


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_token_mean_counts_every_token_the_same() -> None:
    assert token_weights([2, 3, 5], ["a", "a", "b"], "token_mean") == [0.1, 0.1, 0.1]


def test_sequence_mean_counts_a_rollout_over_all_its_segments() -> None:
    # rollout a has 2 + 2 tokens in two segments, b has 5: 1 / (4 * 2) and 1 / (5 * 2)
    assert token_weights([2, 2, 5], ["a", "a", "b"], "sequence_mean") == [0.125, 0.125, 0.1]


def test_sequence_sum_divides_by_rollouts_not_by_samples() -> None:
    assert token_weights([2, 2, 5], ["a", "a", "b"], "sequence_sum") == [0.5, 0.5, 0.5]


def test_constant_divides_by_one_length_for_all() -> None:
    ids = ["a", "a", "b"]
    assert token_weights([2, 2, 5], ids, "constant", constant_length=8) == [1 / 16] * 3


def test_rollouts_without_trained_tokens_do_not_dilute_the_mean() -> None:
    assert token_weights([0, 4], ["a", "b"], "sequence_mean") == [0.0, 0.25]
    assert token_weights([0, 4], ["a", "b"], "token_mean") == [0.25, 0.25]
    assert token_weights([0, 4], ["a", "b"], "sequence_sum")[1] == 1.0
    assert token_weights([0, 4], ["a", "b"], "constant", constant_length=2)[1] == 0.5
    for how in ("token_mean", "sequence_mean", "sequence_sum", "constant"):
        found = token_weights([0, 0], ["a", "b"], how, constant_length=4)
        assert found == [0.0, 0.0]


@pytest.mark.parametrize("length", [None, 0])
def test_constant_needs_its_length(length: int | None) -> None:
    with pytest.raises(ValueError, match="constant_length"):
        token_weights([1], ["a"], "constant", constant_length=length)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean'"):
        token_weights([1], ["a"], "mean")  # type: ignore[arg-type]


# Ratios learner / engine: row 0 is 3, (hole), 1/2; row 1 is 3/2, 4, (padding).
RATIOS = f64([3.0, NAN, 0.5], [1.5, 4.0, NAN])
MASK = torch.tensor([[True, False, True], [True, True, False]])
ENGINE = f64([-1.0, -2.0, -3.0], [-0.5, -0.25, NAN])
LEARNER = ENGINE + RATIOS.log()


@pytest.mark.parametrize(
    ("correct", "token", "sequence", "pooled"),
    [
        # sequence ratios: 3 * 1/2 = 3/2 and 3/2 * 4 = 6; both rows together: 9
        (tis, [[2, 0, 0.5], [1.5, 2, 0]], [[1.5, 0, 1.5], [2, 2, 0]], 2.0),
        (mis, [[0, 0, 0.5], [1.5, 0, 0]], [[1.5, 0, 1.5], [0, 0, 0]], 0.0),
    ],
)
def test_importance_weights_by_hand(
    correct: Callable[..., torch.Tensor],
    token: list[list[float]],
    sequence: list[list[float]],
    pooled: float,
) -> None:
    learner = LEARNER.clone().requires_grad_()
    found = correct(learner, ENGINE, MASK, cap=2.0)
    assert not found.requires_grad
    torch.testing.assert_close(found, f64(*token), atol=1e-12, rtol=0)
    found = correct(learner, ENGINE, MASK, level="sequence", cap=2.0)
    torch.testing.assert_close(found, f64(*sequence), atol=1e-12, rtol=0)
    one = torch.tensor([7, 7])
    found = correct(learner, ENGINE, MASK, level="sequence", cap=2.0, sequences=one)
    torch.testing.assert_close(found, MASK.to(torch.float64) * pooled, atol=1e-12, rtol=0)
    found = correct(learner, ENGINE, MASK, level="sequence", cap=10.0, sequences=one)
    torch.testing.assert_close(found, MASK.to(torch.float64) * 9, atol=1e-12, rtol=0)


@pytest.mark.parametrize("correct", [tis, mis])
def test_an_engine_that_agrees_needs_no_correction(correct: Callable[..., torch.Tensor]) -> None:
    for level in ("token", "sequence"):
        found = correct(ENGINE, ENGINE, MASK, level=level)
        assert found.tolist() == [[1, 0, 1], [1, 1, 0]]
    far = ENGINE + 1000.0  # a ratio that overflows
    expected = 2.0 if correct is tis else 0.0
    assert correct(far, ENGINE, MASK)[MASK].tolist() == [expected] * 4


def test_a_ratio_at_the_cap_trains() -> None:
    assert mis(ENGINE, ENGINE, MASK, cap=1.0)[MASK].tolist() == [1.0] * 4


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'turn'"):
        tis(LEARNER, ENGINE, MASK, level="turn")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        # d = log 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 + d - 1; gradients 1, d, 1 - exp(-d)
        ("k1", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", math.log(2) - 0.5, 0.5),
    ],
)
def test_kl_by_hand(estimator: str, value: float, gradient: float) -> None:
    reference = f64([-2.0, NAN, -3.0])
    logprobs = f64([-2.0 + math.log(2), NAN, -3.0]).requires_grad_()
    mask = torch.tensor([[True, False, True]])
    found = kl(logprobs, reference, mask, estimator=estimator)  # type: ignore[arg-type]
    found.sum().backward()
    torch.testing.assert_close(found.detach(), f64([value, 0, 0]), atol=1e-12, rtol=0)
    assert logprobs.grad is not None
    own = 1.0 if estimator == "k1" else 0.0  # k1 is linear: its gradient is 1 everywhere
    torch.testing.assert_close(logprobs.grad, f64([gradient, 0, own]), atol=1e-12, rtol=0)


def test_k1_and_k3_estimate_the_divergence() -> None:
    policy, reference = f64([0.7, 0.2, 0.1]), f64([0.5, 0.25, 0.25])
    mask = torch.ones(1, 3, dtype=torch.bool)
    exact = sum(p * math.log(p / q) for p, q in [(0.7, 0.5), (0.2, 0.25), (0.1, 0.25)])
    for estimator in ("k1", "k3"):
        each = kl(policy.log(), reference.log(), mask, estimator=estimator)
        assert (policy * each).sum().item() == pytest.approx(exact, abs=1e-12)


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="'k4'"):
        kl(ENGINE, ENGINE, MASK, estimator="k4")  # type: ignore[arg-type]


def test_overlong_punishment_falls_over_the_buffer() -> None:
    lengths = torch.tensor([0, 80, 85, 90, 100, 101, 500])
    found = soft_overlong_punishment(lengths, limit=100, buffer=20)
    assert found.tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert soft_overlong_punishment(lengths.double(), limit=100, buffer=20).dtype == torch.float64


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong_punishment(torch.tensor([1]), limit=100, buffer=buffer)
