"""Sequences that begin alike, packed so that every shared token is computed once.

The sequences' tries are laid out depth first in one row, so that what follows a token on any
sequence lies in one stretch after it. One rule then says all of attention: token i sees token j
where `j <= i < last[j]`, `last[j]` being the end of the stretch that descends from j. Positions
restart at every branch. `packs_exactly` proves once per model that this equals the sequences
on their own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retrain.models.attention import OwnAttention, takes_own_attention
from retrain.models.forward import (
    architecture_setting,
    decoder_hidden,
    evaluating,
    splits_exactly,
    unwrap,
)

logger = logging.getLogger(__name__)

BLOCK_CPU, BLOCK_GPU = 128, 1024
"""Most tokens of small branches that one attention call takes together: a larger one computes more
pairs that are then masked, a smaller one makes more calls. On a CPU 128 is the best of 32 to 512;
the other is where a call's own cost counts for more, and is not measured."""

KEPT_COLUMNS = 1024
"""Most keys of a block whose copy is kept for the backward pass. A long branch has many blocks, and
each one's ancestors grow: what all of them copy would be quadratic in its length."""

_packs: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Tree:
    """A packing of B sequences into N tokens."""

    token_ids: np.ndarray
    """[N]"""
    positions: np.ndarray
    """[N], each token's column in its sequences."""
    last: np.ndarray
    """[N], the end of the stretch of tokens that descend from this one."""
    index: np.ndarray
    """[B, T], where each sequence's token lies; 0 in the padding."""


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences share from the start."""
    count = min(len(first), len(second))
    differs = np.flatnonzero(first[:count] != second[:count])
    return int(differs[0]) if len(differs) else count


def prefix_order(sequences: Sequence[np.ndarray]) -> list[int]:
    """Indices of the sequences in dictionary order: those that begin alike are neighbours."""
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def build_tree(sequences: Sequence[np.ndarray]) -> Tree:
    """Pack sequences of token ids; what two of them share from the start is kept once."""
    width = max(map(len, sequences))
    index = np.zeros((len(sequences), width), dtype=np.int64)
    own: list[np.ndarray] = []
    starts: list[int] = []
    last = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    size, before = 0, -1
    for row in prefix_order(sequences):
        tokens = sequences[row]
        shared = common_prefix(sequences[before], tokens) if before >= 0 else 0
        if before >= 0:
            index[row, :shared] = index[before, :shared]
        fresh = len(tokens) - shared
        index[row, shared : len(tokens)] = np.arange(size, size + fresh)
        own.append(tokens[shared:])
        starts.append(shared)
        size += fresh
        last[index[row, : len(tokens)]] = size
        before = row
    positions = [start + np.arange(len(part)) for start, part in zip(starts, own, strict=True)]
    return Tree(np.concatenate(own), np.concatenate(positions), last[:size], index)


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) attend to themselves and to earlier blocks, `ancestors`."""

    start: int
    stop: int
    ancestors: tuple[int, ...]


def _blocks(last: np.ndarray, size: int) -> list[_Block]:
    """Cut a packed row into attention calls, in its order.

    A block is a whole number of neighbouring branches of at most `size` tokens together, or a
    piece of a run without a branch in it; only a run that nothing precedes may be longer, since
    it needs no mask. All queries of a block see the same ancestors.
    """
    blocks: list[_Block] = []
    pending: list[tuple[int, int, tuple[int, ...]]] = [(0, len(last), ())]
    while pending:
        start, stop, ancestors = pending.pop()
        if stop - start <= size:
            blocks.append(_Block(start, stop, ancestors))
            continue
        end = int(last[start])
        if end < stop:
            cut = start
            while cut < stop and int(last[cut]) - start <= size:
                cut = int(last[cut])
            cut = max(cut, end)
            pending += [(cut, stop, ancestors), (start, cut, ancestors)]
            continue
        run = start + _run(last[start:stop])
        if ancestors:
            run = min(run, start + size)
        if run < stop:
            pending.append((run, stop, (*ancestors, len(blocks))))
        blocks.append(_Block(start, run, ancestors))
    return blocks


def _run(last: np.ndarray) -> int:
    """Length of the stretch at the start in which every token descends to the same end."""
    differs = np.flatnonzero(last != last[0])
    return int(differs[0]) if len(differs) else len(last)


class TreeMask(OwnAttention):
    """Attention of a packed row."""

    blocks: list[_Block]
    positions: Tensor
    last: Tensor
    windows: set[int | None]
    """Sliding windows that layers asked for."""
    _made: dict[tuple[int, int | None, torch.dtype], Tensor | None]

    @staticmethod
    def of(tree: Tree, device: torch.device) -> TreeMask:
        mask: TreeMask = torch.empty(1, 1, 1, 1, device=device).as_subclass(TreeMask)
        mask.blocks = _blocks(tree.last, BLOCK_CPU if device.type == "cpu" else BLOCK_GPU)
        mask.positions = torch.from_numpy(tree.positions).to(device)
        mask.last = torch.from_numpy(tree.last).to(device)
        mask.windows = set()
        mask._made = {}
        return mask

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Query [1, H, N, D] over key and value [1, K, N, D] -> [1, N, H, D].

        Each block of queries is one call of the fused kernel over its ancestors and itself. The
        row is split into blocks once: a slice for each call would cost a gradient of the whole
        row each.
        """
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        self.windows.add(window)
        sizes = [block.stop - block.start for block in self.blocks]
        queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            seen = (*block.ancestors, number)
            columns = sum(sizes[n] for n in seen)
            pieces = [*(keys[n] for n in seen), *(values[n] for n in seen)]

            def of_block(
                query: Tensor, *pieces: Tensor, number: int = number, columns: int = columns
            ) -> Tensor:
                half = len(pieces) // 2
                additive = self._additive(number, window, query.dtype, columns)
                return nn.functional.scaled_dot_product_attention(
                    query,
                    torch.cat(pieces[:half], dim=2) if half > 1 else pieces[0],
                    torch.cat(pieces[half:], dim=2) if half > 1 else pieces[1],
                    attn_mask=additive,
                    is_causal=additive is None,
                    scale=scaling,
                )

            if columns > KEPT_COLUMNS and len(seen) > 1 and torch.is_grad_enabled():
                outputs.append(
                    checkpoint(
                        of_block,
                        queries[number],
                        *pieces,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )
            else:
                outputs.append(of_block(queries[number], *pieces))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _additive(
        self, number: int, window: int | None, dtype: torch.dtype, columns: int
    ) -> Tensor | None:
        """[queries, keys] of a block: 0 where a query sees a key, -inf elsewhere; None where it is
        causal and nothing else. Those of few columns are kept for the other layers."""
        key = (number, window, dtype)
        if key in self._made:
            return self._made[key]
        visible = self.visible(number, window)
        made = None
        if visible is not None:
            made = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            made.masked_fill_(~visible, -torch.inf)
        if columns <= KEPT_COLUMNS:
            self._made[key] = made
        return made

    def visible(self, number: int, window: int | None) -> Tensor | None:
        """[queries, keys] of a block, bool; None where it is causal and nothing else."""
        block = self.blocks[number]
        with torch.no_grad():
            causal = bool((self.last[block.start : block.stop] >= block.stop).all())
            if causal and not block.ancestors and window is None:
                return None
            query = torch.arange(block.start, block.stop, device=self.last.device)
            parts = [self.blocks[ancestor] for ancestor in block.ancestors]
            keys = torch.cat(
                [torch.arange(b.start, b.stop, device=query.device) for b in (*parts, block)]
            )
            seen = (keys <= query.unsqueeze(1)) & (query.unsqueeze(1) < self.last[keys])
            if window is not None:
                seen &= self.positions[query].unsqueeze(1) - self.positions[keys] < window
            return seen


def tree_hidden(model: nn.Module, tree: Tree) -> Tensor:
    """Final hidden states [N, D] of a packing."""
    device = next(model.parameters()).device
    mask = TreeMask.of(tree, device)
    ids = torch.from_numpy(tree.token_ids.astype(np.int64)).to(device).unsqueeze(0)
    return decoder_hidden(model, ids, mask, mask.positions.unsqueeze(0))[0]


def packs_exactly(model: nn.Module) -> bool:
    """Whether a packing gives each sequence what it gets on its own; found out once."""
    if model not in _packs:
        reason = _why_not(model)
        if reason is not None:
            logger.warning(
                "%s: shared prefixes are computed anew for every sequence (%s)",
                type(unwrap(model)).__name__,
                reason,
            )
        _packs[model] = reason is None
    return _packs[model]


def _why_not(model: nn.Module) -> str | None:
    if not takes_own_attention(model):
        return "its attention is not sdpa"
    kinds = set(architecture_setting(model, "layer_types") or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if not splits_exactly(model):
        return "its head is more than its decoder's output and a projection"
    window = architecture_setting(model, "sliding_window")
    slides = "sliding_attention" in kinds or (not kinds and window is not None)
    with evaluating(model), torch.no_grad():
        try:
            return _probe(model, slides=slides)
        except Exception as error:  # any architecture may fail in its own way
            return f"{type(error).__name__}: {error}"


def _probe(model: nn.Module, *, slides: bool) -> str | None:
    """Three sequences that branch twice, beyond a short sliding window, packed and on their own."""
    window = architecture_setting(model, "sliding_window") or 0
    stem = 6 + (window if window <= 64 else 0)
    limit = architecture_setting(model, "max_position_embeddings") or stem + 6
    vocab = unwrap(model).get_input_embeddings().weight.shape[0]
    tokens = np.random.default_rng(0).integers(0, vocab, (3, min(stem + 6, limit)))
    tokens[1, :stem] = tokens[0, :stem]
    tokens[2, : stem - 3] = tokens[0, : stem - 3]
    rows = [tokens[0], tokens[1, :-1], tokens[2, :-2]]
    tree = build_tree(rows)
    packed = tree_hidden(model, tree)
    device = packed.device
    gap, scale = 0.0, 1.0
    for row, ids in enumerate(rows):
        alone = decoder_hidden(model, torch.from_numpy(ids).to(device).unsqueeze(0))[0]
        own = packed[torch.from_numpy(tree.index[row, : len(ids)]).to(device)]
        gap = max(gap, float((own - alone).abs().max()))
        scale = max(scale, float(alone.abs().max()))
    tolerance = 1e-4 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    if gap > tolerance * scale:
        return f"hidden states differ by {gap:.2g}"
    if slides and window > 64:
        mask = TreeMask.of(tree, device)
        ids = torch.from_numpy(tree.token_ids).to(device).unsqueeze(0)
        decoder_hidden(model, ids, mask, mask.positions.unsqueeze(0))
        if mask.windows <= {None}:
            return "its sliding window is applied where a packing does not see it"
    return None
