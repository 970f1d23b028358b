"""One configured reward, checked when it is built, and how its score spreads over turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from retrain.rewards.base import (
    Range,
    RewardKind,
    bind_parameters,
    check_verifier_shape,
    reward_info,
)
from retrain.types import RewardPart, UserError

DistributionStrategy = Literal["last_step", "all_steps_average", "all_steps_equal"]
"""`last_step`: the score goes to the last turn. `all_steps_average`: score / S to each of the S
turns. `all_steps_equal`: the score to each turn, so the rollout gets S times the score."""

NamedVerifier = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class RewardSpec:
    """A reward as configured: name, function, and how its number enters the total.

    `agents` are those whose rollouts it scores, where there are several; None is all of them.
    `params` are the function's keyword arguments. `verifiers` gate this reward only: when one
    fails, the function is not called and the component becomes `verifier_penalty`, as given,
    once per rollout, spread by `distribution_strategy`. For a step reward that means one penalty
    for the rollout in place of its S step values, at the last turn unless the strategy says
    otherwise; the strategy of a step reward has no other use. A group reward's function is
    called with the rollouts that pass.

    Raises:
        UserError: parameters that do not fit the function's signature or can never work, a
            function that does not fit `kind`, or numbers that are not finite.
    """

    name: str
    function: Callable[..., Any]
    kind: RewardKind
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    agents: tuple[str, ...] | None = None
    verifiers: tuple[NamedVerifier, ...] = ()
    verifier_penalty: float = 0.0
    distribution_strategy: DistributionStrategy = "last_step"

    def __post_init__(self) -> None:
        check_choice(f"reward '{self.name}'", "kind", self.kind, get_args(RewardKind))
        strategies = get_args(DistributionStrategy)
        place = f"reward '{self.name}'"
        check_choice(place, "distribution_strategy", self.distribution_strategy, strategies)
        check_number(place, "weight", self.weight)
        check_number(place, "verifier_penalty", self.verifier_penalty)
        for name, function in self.verifiers:
            check_verifier_shape(name, function)
        info = reward_info(self.function)
        if info.kind is not None and info.kind != self.kind:
            raise UserError(
                f"{place} is configured as a {self.kind} reward, but its function is marked as a "
                f"{info.kind} reward",
                f"move it to the {info.kind} rewards",
            )
        bound = bind_parameters(self.name, self.function, self.kind, self.params)
        if info.check is not None:
            try:
                info.check(bound)
            except (ValueError, TypeError) as error:
                raise UserError(f"{place}: {error}", "correct its params") from error

    def is_for(self, agent: str) -> bool:
        return self.agents is None or agent in self.agents

    @property
    def weighted_range(self) -> Range | None:
        """Lowest and highest weighted value (per turn for a step reward); None when unknown."""
        declared = reward_info(self.function).range
        if callable(declared):
            declared = declared(bind_parameters(self.name, self.function, self.kind, self.params))
        if declared is None:
            return None
        ends = (self.weight * declared[0], self.weight * declared[1])
        return min(ends), max(ends)


def spread(part: RewardPart, turns: int, strategy: DistributionStrategy) -> list[RewardPart]:
    """Distribute a whole-rollout entry over S turns; with no turns it stays as it is.

    The parts keep `raw` and `weight`; only `turn` and `value` differ.
    """
    if turns == 0:
        return [part]
    if strategy == "last_step":
        return [at_turn(part, turns - 1, part.value)]
    share = part.value / turns if strategy == "all_steps_average" else part.value
    return [at_turn(part, turn, share) for turn in range(turns)]


def at_turn(part: RewardPart, turn: int, value: float) -> RewardPart:
    return RewardPart(
        part.name, part.kind, turn, part.raw, part.weight, value, part.verifier, part.error
    )


def check_choice(place: str, key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{place}: {key} is {value!r}", f"choose one of: {', '.join(choices)}")


def check_number(place: str, key: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: {key} is {value!r}", "give a finite number")
