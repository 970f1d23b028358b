"""Building blocks for a training loop of one's own in plain PyTorch.

The user owns the model, the optimizer and the loop; these sample, score and give a loss.
"""

from retrain.native.environment import BoxedReward, QASolverEnv
from retrain.native.generate import ModelGenerate
from retrain.native.grpo import GRPO
from retrain.native.ppo import PPO

__all__ = ["GRPO", "PPO", "BoxedReward", "ModelGenerate", "QASolverEnv"]
