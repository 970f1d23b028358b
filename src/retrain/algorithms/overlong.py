"""What length costs."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_overlong_punishment(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """What is added to the reward of a response that is too long, [N] -> [N] (DAPO, Yu et al. 2025,
    arXiv:2503.14476, equation 13).

    0 up to `limit - buffer` tokens, from there falling linearly to -1 at `limit`, and -1 beyond.
    Integer lengths give torch's default float type.

    Raises:
        ValueError: a buffer that is not within (0, limit].
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer is {buffer}: it must be above 0 and at most limit, {limit}")
    punishment: Tensor = ((limit - buffer) - lengths) / buffer
    return torch.clamp(punishment, -1.0, 0.0)
