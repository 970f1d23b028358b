"""The one forward pass that the engine and the learner share.

A causal language model is used as two parts: the decoder, which gives hidden states, and the
head, which gives logits where somebody asks for them. `splits_exactly` proves once per model
that the two parts together equal the model's own forward pass; where they do not (an
architecture with an unusual head), everything here calls the whole model instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrain.types import UserError

AttentionMask = Tensor | Mapping[str, Tensor]
"""2-D padding mask, 4-D additive mask, or one 4-D mask per attention type of the model."""

_splits: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper; its LoRA layers stay active."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def architecture_setting(model: nn.Module, name: str) -> Any:
    """A setting of the text model's architecture, None where the architecture has none."""
    return getattr(unwrap(model).config.get_text_config(), name, None)


def decoder_hidden(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: AttentionMask | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Final hidden states [B, T, D] of tokens `input_ids` [B, T].

    Without a mask, attention is causal over the columns: right padding then needs none, and
    the fastest kernel is used.
    """
    optional = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": cache,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    outputs = unwrap(model).base_model(input_ids=input_ids, use_cache=cache is not None, **given)
    hidden: Tensor = outputs[0]
    return hidden


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], as the model's own forward gives them."""
    logits: Tensor = unwrap(model).get_output_embeddings()(hidden)
    scale = architecture_setting(model, "logit_scale")
    if scale is not None:
        logits = logits * scale
    divisor = architecture_setting(model, "logits_scaling")
    if divisor is not None:
        logits = logits / divisor
    cap = architecture_setting(model, "final_logit_softcapping")
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def full_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of right-padded tokens [B, T], by the model's own forward pass."""
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def last_logits(model: nn.Module, input_ids: Tensor, last: Tensor) -> Tensor:
    """Logits [B, V] after column `last` [B] of right-padded tokens [B, T]; no cache."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    if splits_exactly(model):
        return head_logits(model, decoder_hidden(model, input_ids)[rows, last])
    return full_logits(model, input_ids)[rows, last]


def is_causal(model: nn.Module) -> bool:
    """Whether a token's logits are untouched by the tokens after it; tried on two sequences.

    Raises:
        UserError: the logits are not finite.
    """
    device = next(model.parameters()).device
    vocab = unwrap(model).get_input_embeddings().weight.shape[0]
    first = torch.arange(1, 9, device=device).remainder(vocab).unsqueeze(0)
    second = first.clone()
    second[:, 5:] = (first[:, 5:] + vocab // 2).remainder(vocab)
    with evaluating(model), torch.no_grad():
        a, b = (full_logits(model, ids)[:, :5].float() for ids in (first, second))
    if not bool(torch.isfinite(a).all()):
        raise UserError(
            f"{type(unwrap(model)).__name__} gives logits that are not finite",
            "Its weights are damaged or have diverged: take an earlier checkpoint.",
        )
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def splits_exactly(model: nn.Module) -> bool:
    """Whether decoder and head together give the model's own logits; found out once."""
    if model not in _splits:
        _splits[model] = _try_split(model)
    return _splits[model]


def _try_split(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    vocab = unwrap(model).get_input_embeddings().weight.shape[0]
    probe = torch.arange(1, 8, device=device).remainder(vocab).unsqueeze(0)
    with evaluating(model), torch.no_grad():
        expected = full_logits(model, probe).float()
        try:
            found = head_logits(model, decoder_hidden(model, probe)).float()
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    scale = expected.abs().max().clamp(min=1.0)
    return bool((found - expected).abs().max() <= tolerance * scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own flag restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
