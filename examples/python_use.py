"""retrain from Python: a reward, a verifier and a tool of one's own, on a tiny random model.

    python examples/python_use.py

The model knows nothing and learns nothing in three steps; what counts is the way through. Give
`model` a `name_or_path` for a real one.
"""

from __future__ import annotations

import sys
from typing import Any

import retrain
from retrain import Rollout


@retrain.tool
def shout(text: str) -> str:
    """Say it in capitals.

    Args:
        text: what to say
    """
    return text.upper()


@retrain.verifier
def said_something(rollout: Rollout) -> bool:
    return bool(rollout.completion.strip())


@retrain.reward(range=(0.0, 1.0))
def brevity(rollout: Rollout, *, scale: float = 40.0) -> float:
    """1 for nothing at all, halved at `scale` characters."""
    return scale / (scale + len(rollout.completion))


def words() -> list[str]:
    """What the tiny model's tokenizer is trained on."""
    return ["Say hello in capitals.", "Shout a short word.", "<code>hello</code>"]


def config(output_dir: str = "runs") -> dict[str, Any]:
    return {
        "experiment_name": "python-use",
        "output_dir": output_dir,
        "model": {
            "from_scratch": {
                "config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "intermediate_size": 64,
                    "max_position_embeddings": 128,
                },
                "tokenizer": {"vocab_size": 300, "corpus": f"{__file__}:words"},
            }
        },
        "environment": {"type": "smolagent", "tools": [f"{__file__}:shout"], "max_steps": 2},
        "prompt_source": {"type": "list", "prompts": words()[:2]},
        "reward_setup": {
            "rollout_reward_configs": {
                "brevity": {
                    "function": f"{__file__}:brevity",
                    "verifiers": [f"{__file__}:said_something"],
                }
            }
        },
        "algorithm": {
            "hyperparameters": {
                "steps": 3,
                "prompts_per_step": 2,
                "group_size": 4,
                "max_new_tokens": 16,
                "learning_rate": 1e-3,
            }
        },
    }


if __name__ == "__main__":
    result = retrain.run_sync(config(*sys.argv[1:]))
    print(f"{result.status}: reward {result.metrics['reward/mean']:.2f}, see {result.path}")
