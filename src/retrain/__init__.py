"""retrain trains language models to act: tools, several turns, verifiable rewards.

Names load when they are first used, so that `import retrain` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retrain.version import __version__

if TYPE_CHECKING:
    from retrain.config.load import load_config
    from retrain.config.root import TrainingConfig
    from retrain.envs.base import Environment
    from retrain.loops.interrupt import Interrupted
    from retrain.loops.run import run, run_sync
    from retrain.loops.trainer import SFTTrainer
    from retrain.native import GRPO, PPO, BoxedReward, ModelGenerate, QASolverEnv
    from retrain.rewards import RewardCalculator, reward, verifier
    from retrain.tools import tool
    from retrain.types import (
        Message,
        MessageType,
        Rollout,
        TagConfig,
        Task,
        ToolCall,
        UserError,
    )

_HOMES = {
    "BoxedReward": "retrain.native",
    "Environment": "retrain.envs.base",
    "GRPO": "retrain.native",
    "Interrupted": "retrain.loops.interrupt",
    "Message": "retrain.types",
    "MessageType": "retrain.types",
    "ModelGenerate": "retrain.native",
    "PPO": "retrain.native",
    "QASolverEnv": "retrain.native",
    "RewardCalculator": "retrain.rewards",
    "Rollout": "retrain.types",
    "SFTTrainer": "retrain.loops.trainer",
    "TagConfig": "retrain.types",
    "Task": "retrain.types",
    "ToolCall": "retrain.types",
    "TrainingConfig": "retrain.config.root",
    "UserError": "retrain.types",
    "load_config": "retrain.config.load",
    "reward": "retrain.rewards",
    "run": "retrain.loops.run",
    "run_sync": "retrain.loops.run",
    "tool": "retrain.tools",
    "verifier": "retrain.rewards",
}

__all__ = [
    "GRPO",
    "PPO",
    "BoxedReward",
    "Environment",
    "Interrupted",
    "Message",
    "MessageType",
    "ModelGenerate",
    "QASolverEnv",
    "RewardCalculator",
    "Rollout",
    "SFTTrainer",
    "TagConfig",
    "Task",
    "ToolCall",
    "TrainingConfig",
    "UserError",
    "__version__",
    "load_config",
    "reward",
    "run",
    "run_sync",
    "tool",
    "verifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'retrain' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
