"""`rollout`: deadlines, retries, and what a step does about rollouts that it lost."""

from __future__ import annotations

from pydantic import Field, model_validator

from retrain.config.base import Section

TURN_SHARE = 1 / 3
"""Of the rollout's deadline: what one turn may take, where the file does not say."""


class RolloutConfig(Section):
    timeout_s: float = Field(3600.0, gt=0)
    """Of a whole rollout: all turns, tools and attempts. One that takes longer is masked."""
    turn_timeout_s: float | None = Field(None, gt=0)
    """Of sampling one MODEL turn, waiting in the engine included; then the engine counts as failed,
    and the rollout is retried. By default a third of `timeout_s`."""
    retries: int = Field(2, ge=0)
    """Further attempts at a rollout whose infrastructure failed, before it is masked."""
    backoff_s: float = Field(1.0, ge=0)
    """Wait before the first retry. It doubles with each, up to a minute; a part of it, up to half,
    is taken off by the rollout's seed, so that retries spread."""
    max_concurrency: int = Field(1024, ge=1)
    """Rollouts under way at the same time; further ones wait, and their clocks do not run."""
    min_group_size: int | None = Field(None, ge=1)
    """Fewest rollouts of a group that have to survive for it to teach. By default 2 where the
    rollouts of a group are compared, 1 for `gae` and `reinforce_plus_plus`."""
    max_lost_steps: int = Field(3, ge=1)
    """After so many steps in a row in which every rollout was lost, the run stops."""

    @property
    def turn_limit_s(self) -> float:
        """`turn_timeout_s`, its default filled in."""
        return self.timeout_s * TURN_SHARE if self.turn_timeout_s is None else self.turn_timeout_s

    @model_validator(mode="after")
    def _every_key_acts(self) -> RolloutConfig:
        if self.turn_timeout_s is not None and self.turn_timeout_s > self.timeout_s:
            raise ValueError(
                f"turn_timeout_s {self.turn_timeout_s:g} never runs out: the whole rollout has "
                f"timeout_s {self.timeout_s:g}; lower it, or raise timeout_s"
            )
        if self.retries == 0 and self.changed("backoff_s"):
            raise ValueError(
                f"backoff_s {self.backoff_s:g} does nothing with retries 0; remove one of them"
            )
        return self
