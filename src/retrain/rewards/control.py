"""What a reward is compared with: one that knows nothing."""

from __future__ import annotations

import hashlib

from retrain.rewards.base import reward
from retrain.types import Rollout


@reward(kind="rollout", range=(0.0, 1.0))
def random(rollout: Rollout, *, seed: int = 0) -> float:
    """A uniform number, whatever the rollout says: the control of an experiment.

    Range [0, 1); the rollout's id and `seed` decide it, so that a run can be repeated. A policy
    that gets better under it has learnt nothing from its reward.

    Example: `random: {}`
    """
    digest = hashlib.blake2b(f"{seed}\0{rollout.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
