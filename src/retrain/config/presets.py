"""Algorithms by the names that people use: each a set of choices, which a file may overrule.

A key of `Hyperparameters` that a preset leaves out has its default, which is GRPO's.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"normalize_advantages": "none", "aggregation": "constant"},
    "dapo": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "mini_batches": 2,
        "dynamic_sampling_rounds": 3,
        "overlong_punishment": {},
    },
    "gspo": {"loss": "gspo", "mini_batches": 2},
    "cispo": {"loss": "cispo", "aggregation": "token_mean", "mini_batches": 2},
    "rloo": {
        "advantage": "rloo",
        "normalize_advantages": "none",
        "loss": "reinforce",
        "aggregation": "sequence_sum",
    },
    "reinforce_plus_plus": {
        "advantage": "reinforce_plus_plus",
        "normalize_advantages": "batch",
        "aggregation": "token_mean",
        "kl": {"estimator": "k1", "place": "reward"},
    },
    "ppo": {
        "advantage": "gae",
        "normalize_advantages": "batch",
        "aggregation": "token_mean",
        "epochs": 2,
        "critic": {},
    },
}
"""`grpo` (Shao et al. 2024, arXiv:2402.03300) has no KL penalty here; the paper's is `kl:
{coefficient: 0.04}`. `dr_grpo`: Liu et al. 2025, arXiv:2503.20783. `dapo`: Yu et al. 2025,
arXiv:2503.14476. `gspo`: Zheng et al. 2025, arXiv:2507.18071. `cispo`: MiniMax 2025,
arXiv:2506.13585. `rloo`: Ahmadian et al. 2024, arXiv:2402.14740. `reinforce_plus_plus`: Hu et al.
2025, arXiv:2501.03262. `ppo`: Schulman et al. 2017, arXiv:1707.06347."""
