"""Policy and value losses: values and gradients by hand, holes, garbage, and segments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from retrain.algorithms import (
    cispo,
    cross_entropy,
    gmpo,
    gspo,
    ppo_clip,
    reinforce,
    sapo,
    token_weights,
    value_loss,
)

NAN = math.nan
PolicyLoss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
POLICY_LOSSES: list[PolicyLoss] = [
    ppo_clip,
    partial(ppo_clip, dual_clip=3.0),
    gspo,
    cispo,
    partial(cispo, clip_low=0.5),
    gmpo,
    sapo,
    reinforce,
]


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def one_token(
    loss: PolicyLoss, ratio: float, advantage: float
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient and metrics of a token of old log-probability -1."""
    old = rows([-1.0])
    logprobs = (old + math.log(ratio)).requires_grad_()
    found, metrics = loss(logprobs, old, rows([advantage]), torch.tensor([[True]]))
    found.sum().backward()
    assert logprobs.grad is not None
    return found.item(), logprobs.grad.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "dual"),
    [
        (5.0, -2.0, 6.0, 0.0, 1),  # 10 without it: held at 3 * 2
        (2.0, -2.0, 4.0, 4.0, 0),
        (0.5, -2.0, 1.6, 0.0, 0),  # clipped below
        (5.0, 2.0, -2.4, 0.0, 0),  # clipped above, as ever
    ],
)
def test_dual_clip(
    ratio: float, advantage: float, value: float, gradient: float, dual: int
) -> None:
    found, slope, metrics = one_token(partial(ppo_clip, dual_clip=3.0), ratio, advantage)
    assert found == pytest.approx(value, abs=1e-12)
    assert slope == pytest.approx(gradient, abs=1e-12)
    assert metrics["clipped_dual"].item() == dual


def test_dual_clip_must_be_above_one() -> None:
    with pytest.raises(ValueError, match="dual_clip"):
        one_token(partial(ppo_clip, dual_clip=1.0), 1.0, 1.0)


# Log ratios whose mean over three mask tokens is log(3/2), around a hole.
WEIGHTS = [math.log(3.0), NAN, math.log(1.5), math.log(0.75)]
HOLE = torch.tensor([[True, False, True, True]])


def test_gspo_by_hand() -> None:
    # s = 3/2; tokens A = -1, -1, 2: -sA each where not clipped; above 1.25 with A > 0: -1.25 A
    old = rows([-1.0, -1.0, -2.0, -3.0])
    logprobs = (old + rows(WEIGHTS)).requires_grad_()
    advantages = rows([-1.0, NAN, -1.0, 2.0])
    loss, metrics = gspo(logprobs, old, advantages, HOLE, clip_low=0.25, clip_high=0.25)
    loss.sum().backward()
    close(loss.detach(), rows([1.5, 0, 1.5, -2.5]))
    assert logprobs.grad is not None
    close(logprobs.grad, rows([1.5, 0, 1.5, 0]))
    assert metrics["ratio"].item() == pytest.approx(4.5)
    assert metrics["clipped_low"].item() == 0 and metrics["clipped_high"].item() == 1
    kl = (3 - 1 - math.log(3)) + (1.5 - 1 - math.log(1.5)) + (0.75 - 1 - math.log(0.75))
    assert metrics["approx_kl"].item() == pytest.approx(kl, abs=1e-12)


def test_gspo_is_the_gradient_of_the_papers_objective() -> None:
    """Mean over tokens of GSPO-token against `-s * A` with s differentiated as it is written."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(1, 6, dtype=torch.float64, generator=generator)
    logprobs = (old + 1e-4 * torch.randn(1, 6, dtype=torch.float64, generator=generator)).detach()
    mask = torch.tensor([[True, False, True, True, False, True]])
    found, written = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    loss, _ = gspo(found, old, torch.full_like(old, 0.7), mask)
    (loss.sum() / 4).backward()
    (-((written - old)[mask].mean().exp()) * 0.7).backward()
    close(found.grad, written.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "low", "high"),
    [
        (7.0, 2.0, 5.0, 0, 1),
        (7.0, -2.0, 5.0, 0, 1),  # the weight is bounded whatever the sign
        (2.0, -2.0, 2.0, 0, 0),
        (0.1, 2.0, 0.5, 1, 0),
    ],
)
def test_cispo_by_hand(ratio: float, advantage: float, weight: float, low: int, high: int) -> None:
    found, slope, metrics = one_token(partial(cispo, clip_low=0.5), ratio, advantage)
    assert found == pytest.approx(-weight * advantage * (math.log(ratio) - 1), abs=1e-12)
    assert slope == pytest.approx(-weight * advantage, abs=1e-12)
    assert (metrics["clipped_low"].item(), metrics["clipped_high"].item()) == (low, high)


def test_cispo_has_no_lower_bound_by_default() -> None:
    _, slope, metrics = one_token(cispo, 1e-3, 2.0)
    assert slope == pytest.approx(-2e-3, abs=1e-12)
    assert metrics["clipped_low"].item() == 0


@pytest.mark.parametrize(
    ("advantage", "log_ratios", "bounded", "low", "high"),
    [
        # A > 0: bounded above at 0.4 only; A < 0: below at -0.4 only
        (2.0, [1.0, -0.9, 0.1], [0.4, -0.9, 0.1], 0, 1),
        (-2.0, [1.0, -0.9, 0.1], [1.0, -0.4, 0.1], 1, 0),
    ],
)
def test_gmpo_by_hand(
    advantage: float, log_ratios: list[float], bounded: list[float], low: int, high: int
) -> None:
    first, second, third = log_ratios
    old = rows([-1.0, NAN, -2.0, -3.0])
    logprobs = (old + rows([first, 0.0, second, third])).requires_grad_()
    loss, metrics = gmpo(logprobs, old, torch.full_like(old, advantage), HOLE)
    (loss.sum() / 3).backward()
    value = -advantage * math.exp(sum(bounded) / 3)
    close(loss.detach(), rows([value, 0, value, value]))
    free = [value / 3 if x == y else 0.0 for x, y in zip(log_ratios, bounded, strict=True)]
    assert logprobs.grad is not None
    close(logprobs.grad, rows([free[0], 0, free[1], free[2]]))
    assert (metrics["clipped_low"].item(), metrics["clipped_high"].item()) == (low, high)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_sapo_by_hand(ratio: float, advantage: float, tau: float) -> None:
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    found, slope, metrics = one_token(sapo, ratio, advantage)
    assert found == pytest.approx(-4 / tau * gate * advantage, abs=1e-12)
    assert slope == pytest.approx(-4 * gate * (1 - gate) * ratio * advantage, abs=1e-12)
    assert metrics["clipped_low"].item() == metrics["clipped_high"].item() == 0


def test_reinforce_by_hand() -> None:
    found, slope, metrics = one_token(reinforce, 2.0, 3.0)
    assert found == pytest.approx(-3 * (math.log(2) - 1), abs=1e-12)
    assert slope == pytest.approx(-3, abs=1e-12)
    assert metrics["ratio"].item() == pytest.approx(2)
    assert metrics["approx_kl"].item() == pytest.approx(1 - math.log(2))


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_on_policy_all_are_the_plain_policy_gradient(loss: PolicyLoss, advantage: float) -> None:
    _, slope, metrics = one_token(loss, 1.0, advantage)
    assert slope == pytest.approx(-advantage, abs=1e-12)
    assert metrics["ratio"].item() == 1 and metrics["approx_kl"].item() == 0
    assert metrics["clipped_low"].item() == metrics["clipped_high"].item() == 0


def random_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """log-probabilities now and before, advantages [B, 1], and a mask with holes, [4, 7]."""
    generator = torch.Generator().manual_seed(5)
    old = -2 * torch.rand(4, 7, dtype=torch.float64, generator=generator)
    now = old + 0.4 * torch.randn(4, 7, dtype=torch.float64, generator=generator)
    advantages = torch.tensor([[1.3], [-0.8], [-0.8], [0.4]], dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) > 0.35
    mask[3] = False
    return now.to(dtype), old.to(dtype), advantages.expand(4, 7).to(dtype), mask


def run(
    loss: PolicyLoss, batch: tuple[torch.Tensor, ...], **keywords: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    now, old, advantages, mask = batch
    logprobs = now.clone().requires_grad_()
    found, metrics = loss(logprobs, old, advantages, mask, **keywords)
    found.sum().backward()
    assert logprobs.grad is not None
    return found.detach(), logprobs.grad, metrics


@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_what_stands_outside_the_mask_has_no_say(loss: PolicyLoss, garbage: float) -> None:
    batch = random_batch()
    mask = batch[3]
    dirty = (*(torch.where(mask, x, torch.full_like(x, garbage)) for x in batch[:3]), mask)
    value, gradient, metrics = run(loss, batch)
    dirty_value, dirty_gradient, dirty_metrics = run(loss, dirty)
    assert torch.equal(value, dirty_value) and torch.equal(gradient, dirty_gradient)
    assert metrics == dirty_metrics
    assert not value[~mask].any() and not gradient[~mask].any()
    assert gradient[mask].any()


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_float32_agrees(loss: PolicyLoss) -> None:
    value, gradient, _ = run(loss, random_batch(torch.float32))
    expected, slope, _ = run(loss, random_batch())
    assert value.dtype == gradient.dtype == torch.float32
    close(value, expected.float(), atol=1e-5)
    close(gradient, slope.float(), atol=1e-5)


@pytest.mark.parametrize("loss", [gspo, gmpo])
def test_segments_of_a_rollout_are_one_sequence(loss: PolicyLoss) -> None:
    """Cutting rows in two after the third token, and shuffling, changes nothing."""
    batch = random_batch()
    value, gradient, metrics = run(loss, batch)
    shuffled = torch.tensor([4, 1, 6, 0, 2, 5, 3, 7])
    heads = [torch.nn.functional.pad(column[:, :3], (0, 1)) for column in batch]
    tails = [column[:, 3:] for column in batch]
    pieces = tuple(torch.cat(both)[shuffled] for both in zip(heads, tails, strict=True))

    def uncut(columns: torch.Tensor) -> torch.Tensor:
        ordered = columns[shuffled.argsort()]
        return torch.cat((ordered[:4, :3], ordered[4:]), dim=1)

    found, slope, sums = run(loss, pieces, sequences=shuffled % 4 + 10)
    close(uncut(found), value)
    close(uncut(slope), gradient)
    for name in metrics:
        close(sums[name], metrics[name])
    apart, _, _ = run(loss, pieces)
    assert not torch.allclose(uncut(apart), value)


def test_gmpo_weighted_by_sequence_mean_is_the_papers_objective() -> None:
    now, old, advantages, mask = random_batch()
    loss, _ = gmpo(now, old, advantages, mask)
    weights = token_weights(mask.sum(1).tolist(), list("abcd"), "sequence_mean")
    total = (loss * torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).sum()
    expected = 0.0
    for row in range(3):
        advantage = advantages[row, 0].item()
        logs = [
            min(d, 0.4) if advantage > 0 else max(d, -0.4)
            for d in (now - old)[row][mask[row]].tolist()
        ]
        expected -= advantage * math.exp(sum(logs) / len(logs)) / 3
    assert total.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("distance", [500.0, -500.0])
def test_ratios_beyond_the_float_range_stay_finite(
    loss: PolicyLoss, advantage: float, distance: float
) -> None:
    logprobs = torch.tensor([[distance, -1.0]], requires_grad=True)
    old, mask = torch.tensor([[0.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    found, metrics = loss(logprobs, old, torch.full((1, 2), advantage), mask)
    found.sum().backward()
    assert logprobs.grad is not None
    assert found.isfinite().all() and logprobs.grad.isfinite().all()
    assert all(each.isfinite() for each in metrics.values())


def test_nan_inside_the_mask_is_not_hidden() -> None:
    now, old, advantages, mask = random_batch()
    now[mask] = NAN
    for loss in POLICY_LOSSES:
        assert loss(now, old, advantages, mask)[0][mask].isnan().all()


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (2.0, 1.62, 0.0, 1),  # held at 1.2: 0.5 * 1.8^2, larger than 0.5
        (0.0, 4.5, -3.0, 0),  # held at 0.8 the error would be smaller
        (1.1, 1.805, -1.9, 0),  # within the bounds
    ],
)
def test_value_loss_by_hand(value: float, loss: float, gradient: float, clipped: int) -> None:
    """Old value 1, return 3."""
    values = rows([value, NAN]).requires_grad_()
    mask = torch.tensor([[True, False]])
    found, metrics = value_loss(values, rows([1.0, NAN]), rows([3.0, NAN]), mask)
    found.sum().backward()
    close(found.detach(), rows([loss, 0]))
    assert values.grad is not None
    close(values.grad, rows([gradient, 0]))
    assert metrics["value_clipped"].item() == clipped


def test_value_loss_without_clipping() -> None:
    values = rows([2.0, NAN]).requires_grad_()
    mask = torch.tensor([[True, False]])
    found, metrics = value_loss(values, rows([NAN, NAN]), rows([3.0, NAN]), mask, clip=None)
    found.sum().backward()
    assert found.tolist() == [[0.5, 0]]
    assert values.grad is not None and values.grad.tolist() == [[-1, 0]]
    assert metrics["value_clipped"].item() == 0


def test_cross_entropy_ignores_garbage() -> None:
    logprobs = rows([-0.5, NAN, -math.inf]).requires_grad_()
    loss = cross_entropy(logprobs, torch.tensor([[True, False, False]]))
    loss.sum().backward()
    assert loss.tolist() == [[0.5, 0, 0]]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[-1, 0, 0]]
