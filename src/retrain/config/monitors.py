"""`monitors`: when a step's metrics are worth a warning."""

from __future__ import annotations

from pydantic import Field

from retrain.config.base import Section


class MonitorsConfig(Section):
    """A threshold for each known way in which training goes wrong; null switches it off. A monitor
    that is crossed logs a warning, never stops the run, and counts in the metric `alerts`.
    docs/when_training_goes_wrong.md has a section for each, with causes and cures."""

    logprob_gap: float | None = Field(0.05, gt=0)
    """Most nats per token, on average, between the engine's and the learner's log-probability of
    what was sampled."""
    ratio: float | None = Field(0.1, gt=0)
    """Most distance of the mean probability ratio from 1, in a step's last update."""
    clip_fraction: float | None = Field(0.3, gt=0, le=1)
    """Largest share of trained tokens that the loss clips, in a step's last update."""
    approx_kl: float | None = Field(0.1, gt=0)
    """Most nats per token that one step's updates move the policy."""
    kl: float | None = Field(0.5, gt=0)
    """Most nats per token from the reference; only where `algorithm.hyperparameters.kl` is set."""
    entropy_low: float | None = Field(0.005, gt=0)
    """Least entropy of the policy, in nats per trained token."""
    entropy_growth: float | None = Field(3.0, gt=1)
    """Most that entropy may be of what it was at the start, both as means of 5 steps."""
    grad_norm_spike: float | None = Field(20.0, gt=1)
    """Most that a gradient norm may be of the median of the steps before it, before clipping."""
    zero_variance: float | None = Field(0.9, gt=0, lt=1)
    """Largest share of groups whose rewards are all equal, over 5 steps. Off for `gae` and
    `reinforce_plus_plus`, as is `flat_reward_steps`: they learn from such groups too."""
    truncated: float | None = Field(0.2, gt=0, lt=1)
    """Largest share of rollouts cut by `max_new_tokens` or the context limit."""
    masked: float | None = Field(0.1, gt=0, lt=1)
    """Largest share of rollouts left out because infrastructure failed."""
    tool_calls: float | None = Field(0.05, gt=0)
    """Fewest tool calls of a rollout, as a mean of 5 steps; only where there are tools."""
    tool_failures: float | None = Field(0.5, gt=0, lt=1)
    """Largest share of tool calls in which the tool failed or gave no result in time."""
    invalid_calls: float | None = Field(0.5, gt=0, lt=1)
    """Largest share of tool calls that the model got wrong."""
    length_growth: float | None = Field(3.0, gt=1)
    """Most that responses may be of their length at the start, both as means of 5 steps."""
    staleness: float | None = Field(8.0, gt=0)
    """Most updates, on average, between sampling a token and learning from it."""
    flat_reward_steps: int | None = Field(10, ge=1)
    """Most steps, from the first on, in which no group has any variance."""
    reward_drop: float | None = Field(0.5, gt=0)
    """Largest share of what the reward had gained that it may lose again, as means of 5 steps."""
