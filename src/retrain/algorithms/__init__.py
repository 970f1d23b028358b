"""Advantages, losses and aggregations: pure functions, no config, no state."""

from retrain.algorithms.advantages import grpo
from retrain.algorithms.aggregation import Aggregation, token_weights
from retrain.algorithms.losses import cross_entropy, ppo_clip

__all__ = ["Aggregation", "cross_entropy", "grpo", "ppo_clip", "token_weights"]
