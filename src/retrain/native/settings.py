"""Checked settings of GRPO and PPO, and what they are made into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from retrain.algorithms import CorrectionLevel, mis, ppo_clip, tis
from retrain.learner import Reference
from retrain.learner.objectives import Correction, Metrics, PolicyLoss
from retrain.types import UserError

CorrectionKind = Literal["tis", "mis"]
ReferenceModel = Callable[[], AbstractContextManager[nn.Module]]


def clipped_loss(eps: float, eps_high: float | None) -> PolicyLoss:
    """PPO's surrogate with the ratio clipped to [1 - eps, 1 + eps_high].

    Raises:
        UserError: a bound that is not above zero, or a lower one that is not below 1.
    """
    above_zero("eps", eps)
    if eps >= 1:
        raise UserError(f"eps is {eps}", "Give a number below 1.")
    high = eps if eps_high is None else eps_high
    above_zero("eps_high", high)

    def loss(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, sequences: Tensor
    ) -> tuple[Tensor, Metrics]:
        return ppo_clip(logprobs, old, advantages, mask, clip_low=eps, clip_high=high)

    return loss


def make_correction(
    kind: CorrectionKind | None, level: CorrectionLevel, cap: float
) -> Correction | None:
    """Weights for what the engine sampled from; tokens that no engine sampled weigh 1.

    Raises:
        UserError: an unknown kind or level, a cap that is not above 1, or either without a kind.
    """
    if kind is None:
        if (level, cap) != ("token", 2.0):
            raise UserError(
                "correction_level and correction_cap do nothing without a correction",
                "Give correction='tis' or 'mis', or leave them out.",
            )
        return None
    one_of("correction", kind, get_args(CorrectionKind))
    one_of("correction_level", level, get_args(CorrectionLevel))
    if cap <= 1:
        raise UserError(f"correction_cap is {cap}", "Give a number above 1; 2 is usual.")
    weigh = tis if kind == "tis" else mis

    def weights(old: Tensor, behavior: Tensor, mask: Tensor, sequences: Tensor) -> Tensor:
        known = torch.where(behavior.isnan(), old, behavior)
        return weigh(old, known, mask, level=level, cap=cap, sequences=sequences)

    return weights


def make_reference(
    model: nn.Module, kl_coefficient: float, kl_estimator: str, reference: nn.Module | None
) -> ReferenceModel | None:
    """What a KL penalty measures from: the given model, or the policy as it is now.

    Raises:
        UserError: a reference model without a KL penalty, a negative coefficient, or an
            estimator that is not for losses.
    """
    one_of("kl_estimator", kl_estimator, ("k2", "k3"))
    not_negative("kl_coefficient", kl_coefficient)
    if kl_coefficient == 0:
        if reference is not None:
            raise UserError(
                "a reference model does nothing while kl_coefficient is 0",
                "Give kl_coefficient=0.001, say, or leave the reference out.",
            )
        return None
    if reference is None:
        return Reference(model).model
    given = reference
    return lambda: nullcontext(given)


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}", f"Choose from: {', '.join(map(str, choices))}.")


def above_zero(name: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{name} is {value}", "Give a number above zero.")


def not_negative(name: str, value: float) -> None:
    if value < 0:
        raise UserError(f"{name} is {value}", "Give a number of at least 0.")


def between_0_and_1(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}", "Give a number from 0 to 1.")
