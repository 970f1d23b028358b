"""From logits to a token and its log-probability, one uniform number per token."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

UNIFORM_BLOCK = 64
"""Uniform numbers drawn at a time for one request."""


class Uniforms:
    """The uniform numbers of one request: number t depends on the seed and t alone.

    Block b is SHAKE-128 of (seed, b), so nothing depends on how the engine interleaves requests,
    nor on a library's generator. (NumPy's Philox gives as much, and costs 50 times more to start.)
    """

    def __init__(self, seed: int) -> None:
        self._seed = (seed % 2**128).to_bytes(16, "little")
        self._block = 0

    def next_block(self) -> np.ndarray:
        """[UNIFORM_BLOCK] float32 in [0, 1 - 2**-22]: u * total then stays under total in fp32,
        so that a token of probability 0 is never hit."""
        key = self._seed + self._block.to_bytes(8, "little")
        self._block += 1
        bits = np.frombuffer(hashlib.shake_128(key).digest(4 * UNIFORM_BLOCK), dtype="<u4")
        return (bits >> 10).astype(np.float32) * np.float32(2**-22)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse CDF; temperature 0 is argmax.

    Args:
        logits: [R, V] fp32.
        uniforms: [R] in [0, 1).
        temperature: one for all rows, or [R].

    Returns:
        Tokens [R] int64 and their log-probabilities [R] fp32 under softmax(logits/temperature);
        under softmax(logits) where the temperature is 0.
    """
    if isinstance(temperature, Tensor):
        scaled = logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    else:
        scaled = logits if temperature in (0.0, 1.0) else logits / temperature
    top = scaled.amax(-1, keepdim=True)
    cumulative = (scaled - top).exp_().cumsum(-1)
    total = cumulative[:, -1:]
    if isinstance(temperature, float) and temperature == 0.0:
        tokens = scaled.argmax(-1, keepdim=True)
    else:
        tokens = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * total, right=True)
        if isinstance(temperature, Tensor):
            greedy = (temperature == 0).unsqueeze(1)
            tokens = torch.where(greedy, scaled.argmax(-1, keepdim=True), tokens)
    tokens.clamp_(max=logits.shape[1] - 1)
    logprobs = scaled.gather(1, tokens) - top - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)


def truncate(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits [V] with everything outside the top-k, then top-p set at -inf.

    top-p keeps the smallest set of most likely tokens whose probability at `temperature`
    reaches `top_p` (Holtzman et al., 2020), at least one. `top_k == 0` keeps all.
    """
    order = logits.argsort(descending=True)
    kept = order[: top_k or len(order)]
    if top_p < 1.0:
        probabilities = (logits[kept] / (temperature or 1.0)).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        kept = kept[(before < top_p) | (torch.arange(len(kept), device=logits.device) == 0)]
    truncated = torch.full_like(logits, -torch.inf)
    truncated[kept] = logits[kept]
    return truncated
