"""Advantages, losses, penalties and weights: pure functions, no config, no state."""

from retrain.algorithms.advantages import (
    grpo,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    turn_credit,
    whiten,
)
from retrain.algorithms.aggregation import Aggregation, token_weights
from retrain.algorithms.corrections import CorrectionLevel, mis, tis
from retrain.algorithms.distillation import (
    sampled_reverse_kl,
    top_forward_kl,
    top_reverse_kl,
)
from retrain.algorithms.gae import gae
from retrain.algorithms.kl import KLEstimator, kl
from retrain.algorithms.losses import (
    cispo,
    cross_entropy,
    gmpo,
    gspo,
    ppo_clip,
    reinforce,
    sapo,
    value_loss,
)
from retrain.algorithms.overlong import soft_overlong_punishment

__all__ = [
    "Aggregation",
    "CorrectionLevel",
    "KLEstimator",
    "cispo",
    "cross_entropy",
    "gae",
    "gmpo",
    "grpo",
    "gspo",
    "kl",
    "mis",
    "opo",
    "ppo_clip",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "sampled_reverse_kl",
    "sapo",
    "soft_overlong_punishment",
    "tis",
    "token_weights",
    "top_forward_kl",
    "top_reverse_kl",
    "turn_credit",
    "value_loss",
    "whiten",
]
