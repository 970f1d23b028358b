"""Policies: load, make from scratch, adapt, save; and the forward pass that all share."""

from retrain.models.load import Policy, load_policy
from retrain.models.save import load_critic, save_policy
from retrain.models.tokenizer import train_tokenizer

__all__ = ["Policy", "load_critic", "load_policy", "save_policy", "train_tokenizer"]
