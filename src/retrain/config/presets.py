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

DECIDING = {"loss": "ppo_clip", "advantage": "grpo", "epochs": 1, "mini_batches": 1}
"""The defaults of what decides which of a preset's choices can act."""


def fitting(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is left of a preset where the file takes another loss or advantage than it, or makes
    one update a step."""
    left = dict(preset)
    new = DECIDING | preset | given
    old = DECIDING | preset
    if new["loss"] != old["loss"] or (new["epochs"] == 1 and new["mini_batches"] == 1):
        for key in ("clip_low", "clip_high", "dual_clip"):
            left.pop(key, None)
    if new["advantage"] != old["advantage"]:
        for key in ("critic", "dynamic_sampling_rounds"):
            left.pop(key, None)
    return left


def overlaid(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Given keys over the preset's, also within the small sections that both set."""
    both = {
        key: {**preset[key], **value}
        for key, value in given.items()
        if isinstance(value, dict) and isinstance(preset.get(key), dict)
    }
    return {**preset, **given, **both}
