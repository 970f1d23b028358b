"""Forward, backward, step."""

from retrain.learner.batch import Batch, micro_batches
from retrain.learner.objectives import policy_loss, sft_loss
from retrain.learner.optim import Schedule
from retrain.learner.torch_learner import PerTokenLoss, TorchLearner

__all__ = [
    "Batch",
    "PerTokenLoss",
    "Schedule",
    "TorchLearner",
    "micro_batches",
    "policy_loss",
    "sft_loss",
]
