"""What a model says of tokens that are given: log-probabilities, entropies, hidden states.

Hidden states are computed once per shared token where the model allows it, logits only at the
tokens asked for, a chunk at a time: no [B, T, V] tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retrain.models.forward import (
    decoder_hidden,
    full_logits,
    head_logits,
    splits_exactly,
    unwrap,
)
from retrain.models.tree import build_tree, packs_exactly, tree_hidden

LOGITS_PER_CHUNK = 1 << 23
"""Most logits alive at once (32 MiB of fp32)."""


WORTH_PACKING = 0.8
"""Largest share of the padded tokens that a packing may have left: attention without a mask is
cheaper than a packing that saves less."""


@dataclass(frozen=True)
class Scores:
    """Of the M masked tokens, in the order of `mask.nonzero()`."""

    logprobs: Tensor
    """[M], fp32, or float64 for a float64 model."""
    entropy: Tensor
    """[M], of the distribution that the token was drawn from, in nats."""
    hidden: Tensor | None
    """[M, D], the states that the tokens are predicted from; None where the model does not give
    them apart from its logits."""
    candidates: Tensor | None = None
    """[M, K + 1], log-probabilities of the K candidates at each token's place, and last of all
    other tokens together; None where none were given."""


def scores(
    model: nn.Module,
    token_ids: Tensor,
    lengths: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    *,
    share_prefixes: bool = True,
    entropy_gradient: bool = False,
    candidates: Tensor | None = None,
    candidate_temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> Scores:
    """Score the masked tokens given those before them; differentiable in the model's parameters.

    Column t speaks of token t: the shift by one between a hidden state and the token it predicts
    happens in `predictor_states` and nowhere else. Logits are divided by `temperature` (0 counts
    as 1).

    Args:
        token_ids: [B, T], right-padded to `lengths` [B].
        mask: [B, T] bool.
        share_prefixes: compute what rows share from the start once.
        entropy_gradient: whether the entropy takes part in the backward pass.
        candidates: [M, K] ids of tokens that might have stood at each masked token's place.
        candidate_temperature: what logits are divided by for them.
        logits_per_chunk: most logits at once; they are computed again in the backward pass.

    Raises:
        ValueError: a mask that selects a first token (it has no predictor) or padding.
    """
    _check_mask(token_ids, lengths, mask)
    rows, columns = mask.nonzero(as_tuple=True)
    targets = token_ids[rows, columns]
    columns_given = (targets,) if candidates is None else (targets, candidates)

    def of(logits: Tensor, tokens: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
        found = _of_logits(logits, tokens, temperature, entropy_gradient)
        return (
            found if ids is None else (*found, _of_candidates(logits, ids, candidate_temperature))
        )

    hidden: Tensor | None = None
    if splits_exactly(model):
        hidden = predictor_states(model, token_ids, mask, share_prefixes=share_prefixes)
        vocab = unwrap(model).get_output_embeddings().weight.shape[0]

        def of_states(part: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            return of(head_logits(model, part), *given)

        found = _in_chunks(of_states, logits_per_chunk // vocab, hidden, *columns_given)
    else:
        logits = full_logits(model, token_ids[:, : int(lengths.max())])[rows, columns - 1]
        found = of(logits, *columns_given)
    return Scores(found[0], found[1], hidden, None if candidates is None else found[2])


def selected_logprobs(
    model: nn.Module,
    token_ids: Tensor,
    lengths: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    *,
    share_prefixes: bool = True,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> Tensor:
    """log p(token t | tokens before t) [B, T] at masked positions, 0 elsewhere; see `scores`.

    Raises:
        ValueError: a mask that selects a first token or padding.
    """
    found = scores(
        model,
        token_ids,
        lengths,
        mask,
        temperature,
        share_prefixes=share_prefixes,
        logits_per_chunk=logits_per_chunk,
    )
    return spread(found.logprobs, mask)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[M, ...] values of the masked tokens to [B, T, ...], 0 elsewhere."""
    shape = (*mask.shape, *values.shape[1:])
    zeros = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return zeros.index_put(mask.nonzero(as_tuple=True), values)


def predictor_states(
    model: nn.Module, token_ids: Tensor, mask: Tensor, *, share_prefixes: bool = True
) -> Tensor:
    """The final hidden states [M, D] that masked tokens are predicted from: those a token earlier.

    Packed where that saves enough tokens; nothing after the last predictor is run.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    width = int(columns.max()) if len(columns) else 1
    tree = None
    if share_prefixes and packs_exactly(model):
        table = token_ids.cpu().numpy()
        reach = np.where(mask.cpu().numpy(), np.arange(mask.shape[1]), 1).max(axis=1)
        tree = build_tree([row[:end] for row, end in zip(table, reach, strict=True)])
    if tree is None or len(tree.token_ids) > WORTH_PACKING * len(token_ids) * width:
        return decoder_hidden(model, token_ids[:, :width])[rows, columns - 1]
    index = torch.from_numpy(tree.index).to(token_ids.device)
    return tree_hidden(model, tree)[index[rows, columns - 1]]


def _check_mask(token_ids: Tensor, lengths: Tensor, mask: Tensor) -> None:
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    outside = (columns == 0) | (columns >= lengths.to(columns.device).unsqueeze(1))
    if bool((mask & outside).any()):
        raise ValueError("the mask selects a first token or padding")


def _in_chunks(
    of: Callable[..., tuple[Tensor, ...]], size: int, *columns: Tensor
) -> tuple[Tensor, ...]:
    """What `of` gives for columns of M rows each, so many rows at a time."""
    size = max(1, size)
    if len(columns[0]) <= size:
        return of(*columns)
    cut = [torch.split(column, size) for column in columns]
    parts = [
        checkpoint(of, *pieces, use_reentrant=False, preserve_rng_state=False)
        for pieces in zip(*cut, strict=True)
    ]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def _of_logits(
    logits: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each row [R] of logits [R, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature in (0.0, 1.0) else wide / temperature
    total = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities = (scaled - total.unsqueeze(-1)).exp()
        # 0 * -inf would be NaN
        bounded = scaled.clamp(min=torch.finfo(scaled.dtype).min)
        entropy = total - torch.linalg.vecdot(probabilities, bounded)
    return chosen - total, entropy


def _of_candidates(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [R, K + 1] of ids [R, K], and of all other tokens, of logits [R, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if temperature in (0.0, 1.0) else wide / temperature
    # -inf would make the gradient NaN where no other token is left
    others = scaled.scatter(-1, ids, torch.finfo(scaled.dtype).min)
    masses = torch.cat((scaled.gather(-1, ids), others.logsumexp(-1, keepdim=True)), -1)
    return masses - scaled.logsumexp(-1, keepdim=True)
