"""Attention of our own inside models of transformers, where their `sdpa` would be called."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from retrain.models.forward import unwrap


class OwnAttention(Tensor):
    """Stands for a 4-D attention mask on its way through a model, and attends in its place.

    Models of transformers hand a 4-D mask to every layer as it is, and gradient checkpointing
    keeps it with the layer's other arguments. Make one with
    `torch.empty(1, 1, 1, 1).as_subclass(...)`.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Query [B, H, T, D] over key and value [B, K, S, D] -> [B, T, H, D]."""
        raise NotImplementedError


def takes_own_attention(model: nn.Module) -> bool:
    """Whether the model calls transformers' `sdpa`, where an `OwnAttention` acts."""
    if unwrap(model).config.get_text_config()._attn_implementation != "sdpa":
        return False
    _install()
    return True


@functools.cache
def _install() -> None:
    """Teach transformers' `sdpa` to take an `OwnAttention`; other masks go the usual way."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **settings: Any,
    ) -> Any:
        if not isinstance(attention_mask, OwnAttention):
            return usual(module, query, key, value, attention_mask, **settings)
        for name in ("softcap", "s_aux", "position_bias"):
            if settings.get(name) is not None:
                raise NotImplementedError(f"attention with {name}")
        scaling, window = settings.get("scaling"), settings.get("sliding_window")
        return attention_mask.attend(query, key, value, scaling, window), None

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
