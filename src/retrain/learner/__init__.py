"""Forward, backward, step."""

from retrain.learner.batch import Batch, collate, micro_batches
from retrain.learner.critic import Critic
from retrain.learner.objectives import (
    LogitsObjective,
    Objective,
    PolicyObjective,
    Predictions,
    sft_loss,
)
from retrain.learner.optim import Schedule
from retrain.learner.reference import Reference
from retrain.learner.torch_learner import NotFiniteError, TorchLearner

__all__ = [
    "Batch",
    "Critic",
    "LogitsObjective",
    "NotFiniteError",
    "Objective",
    "PolicyObjective",
    "Predictions",
    "Reference",
    "Schedule",
    "TorchLearner",
    "collate",
    "micro_batches",
    "sft_loss",
]
