"""Policies: load, make from scratch, adapt, save; and the forward pass that all share."""

from retrain.models.load import Policy, load_policy
from retrain.models.save import holds, load_critic, restore, save_policy, save_tensors, trained
from retrain.models.tokenizer import train_tokenizer

__all__ = [
    "Policy",
    "holds",
    "load_critic",
    "load_policy",
    "restore",
    "save_policy",
    "save_tensors",
    "train_tokenizer",
    "trained",
]
