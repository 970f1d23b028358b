"""`reward_setup`: what a rollout is worth."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from retrain.config.base import Section


class RewardConfig(Section):
    function: str | None = None
    """A built-in name or an import path; by default the key that this entry stands under."""
    weight: float = 1.0
    """Factor on what the function returns."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    agents: list[str] | None = Field(None, min_length=1)
    """Of several agents, those that it is for; by default all."""
    verifiers: list[str] = Field(default_factory=list)
    """Gate this reward: when one fails, the function is not called. Built-in names or import
    paths."""
    verifier_penalty: float = 0.0
    """What the component becomes, unweighted, when one of its verifiers fails."""

    @model_validator(mode="after")
    def _penalty_has_a_verifier(self) -> Self:
        _refuse_penalty(self.verifiers, self.verifier_penalty)
        return self


class RolloutRewardConfig(RewardConfig):
    distribution_strategy: Literal["last_step", "all_steps_average", "all_steps_equal"] = (
        "last_step"
    )
    """Over the turns: all to the last one; an equal share to each; the whole to each."""


class RewardSetup(Section):
    step_reward_configs: dict[str, RewardConfig] = Field(default_factory=dict)
    """Rewards of one turn, by name."""
    rollout_reward_configs: dict[str, RolloutRewardConfig] = Field(default_factory=dict)
    """Rewards of a whole rollout, by name."""
    group_reward_configs: dict[str, RewardConfig] = Field(default_factory=dict)
    """Rewards that compare the rollouts of one task, by name."""
    verifiers: list[str] = Field(default_factory=list)
    """Gate the whole reward: when one fails, the total becomes `verifier_penalty`."""
    verifier_penalty: float = 0.0
    """The total when one of `verifiers` fails."""
    on_error: Literal["stop", "mask", "penalty"] = "stop"
    """What a reward or verifier that raises or returns NaN does."""
    error_penalty: float = 0.0
    """The component's value under `on_error: penalty`."""

    @model_validator(mode="after")
    def _penalties_act(self) -> Self:
        _refuse_penalty(self.verifiers, self.verifier_penalty)
        if self.on_error != "penalty" and self.changed("error_penalty"):
            raise ValueError(
                f"error_penalty {self.error_penalty:g} does nothing with on_error: "
                f"{self.on_error}; set on_error: penalty, or remove error_penalty"
            )
        return self


def _refuse_penalty(verifiers: list[str], penalty: float) -> None:
    if penalty != 0 and not verifiers:
        raise ValueError(
            f"verifier_penalty {penalty:g} does nothing without verifiers beside it; "
            "list some, or remove it"
        )
