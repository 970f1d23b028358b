"""Rollouts and rewards as the user gives them, to groups that can be compared."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from retrain.types import Rollout, UserError

Rewards = Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor] | Tensor
"""One number for each rollout, or for each MODEL message of each rollout."""


def training_indices(rollouts: Sequence[Rollout]) -> list[int]:
    """Which rollouts train: neither masked by an error nor of a frozen agent."""
    return [i for i, r in enumerate(rollouts) if r.error is None and r.trainable]


def read_rewards(
    rollouts: Sequence[Rollout], rewards: Rewards, training: Sequence[int]
) -> tuple[dict[int, list[float]], bool]:
    """Rewards of the training rollouts' turns [S], and whether they were given by turn.

    A single reward stands at the last turn. Those of rollouts that do not train are not looked
    at; each that does has a turn.

    Raises:
        UserError: another number of rewards than of rollouts or turns, both kinds mixed, or a
            reward that is not a finite number.
    """
    given = [_plain(reward) for reward in _plain(rewards)]
    if len(given) != len(rollouts):
        raise UserError(
            f"there are {len(given)} rewards for {len(rollouts)} rollouts",
            "Give one reward for each rollout, in the same order.",
        )
    kinds = {isinstance(given[i], Sequence) for i in training}
    if len(kinds) > 1:
        raise UserError(
            "some rewards are numbers and some are lists",
            "Give a number for each rollout, or a list with one number for each MODEL message.",
        )
    by_turn = kinds == {True}
    read: dict[int, list[float]] = {}
    for i in training:
        turns = len(rollouts[i].model_messages)
        values = list(given[i]) if by_turn else [0.0] * (turns - 1) + [given[i]]
        if len(values) != turns:
            raise UserError(
                f"rewards[{i}] has {len(values)} numbers; rollouts[{i}] has {turns} MODEL messages",
                "Give one number for each MODEL message.",
            )
        read[i] = [_finite(value, i) for value in values]
    return read, by_turn


def group_labels(
    rollouts: Sequence[Rollout], groups: Sequence[Hashable] | None
) -> list[Hashable] | None:
    """Which group each rollout belongs to; None where nothing says so.

    Raises:
        UserError: another number of groups than of rollouts, or a `group_id` on some only.
    """
    if groups is not None:
        labels: list[Hashable] = [_plain(group) for group in _plain(groups)]
        if len(labels) != len(rollouts):
            raise UserError(
                f"there are {len(labels)} groups for {len(rollouts)} rollouts",
                "Give the group of each rollout, in the same order: groups=[0, 0, 1, 1].",
            )
        return labels
    ids = [rollout.group_id for rollout in rollouts]
    without = [i for i, group_id in enumerate(ids) if group_id is None]
    if len(without) == len(ids):
        return None
    if without:
        raise UserError(
            f"rollouts[{without[0]}] has no group_id, but others have one",
            "Give every rollout a group_id, or pass groups=[...].",
        )
    return list(ids)


def _plain(value: Any) -> Any:
    """Python numbers and lists out of tensors and arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any, index: int) -> float:
    number = _plain(value)
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise UserError(
            f"rewards[{index}] is {value!r}, not a finite number",
            "Give a number; a rollout that could not be scored is masked by setting its `error`.",
        )
    return float(number)
