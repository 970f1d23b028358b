"""How a model is run for the slots: over a cache where that is proven right, plainly elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from retrain.engines.cache import SlotCache
from retrain.engines.prefix import Families, PrefixAttention, make_families
from retrain.models.attention import takes_own_attention
from retrain.models.forward import (
    AttentionMask,
    architecture_setting,
    decoder_hidden,
    evaluating,
    full_logits,
    head_logits,
    last_logits,
    splits_exactly,
    unwrap,
)

logger = logging.getLogger(__name__)

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
PREFILL_TOKENS = 16_384
"""Most padded tokens in one prefill call."""

PADDING_SHARE = 0.25
"""Most of a prefill call that may be padding."""


class Runner(Protocol):
    """Runs the model over rows of a table of token ids."""

    incremental: bool
    """Whether a token fed is remembered, so that only new ones need to be run."""

    def reserve(self, slots: int, columns: int) -> None: ...

    def prefill(
        self, ids: np.ndarray, rows: Sequence[int], start: np.ndarray, end: np.ndarray
    ) -> None:
        """Run columns [start, end) of `rows`; `ids` is the whole table [slots, columns]."""
        ...

    def prefill_block(
        self, ids: np.ndarray, rows: Sequence[int], start: int, end: np.ndarray, size: int
    ) -> None:
        """Run columns [start, end[r]) of each row as a block of `size` columns: a row's bits then
        depend on neither the other rows nor its own `end`."""
        ...

    def copy(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        """What is remembered of columns [0, width), from slot to slot."""
        ...

    def step(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        width: int,
        families: Families | None = None,
    ) -> Tensor:
        """Run column `lengths[r]` of each of the first R rows; logits after it [R, V] fp32.

        `width` bounds the columns that matter: rows beyond it are idle and may give anything.
        `families` says which rows begin alike; it changes what is read, not what comes out.
        """
        ...


class CachedRunner:
    """One column per row and step, over a `SlotCache`."""

    incremental = True

    def __init__(
        self, model: nn.Module, context_limit: int, *, reads_families: bool = False
    ) -> None:
        self._model = model
        self._reads_families = reads_families
        self._last_position = context_limit - 1
        self._cache = SlotCache()
        self._columns = 0
        first = next(model.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._window: int | None = architecture_setting(model, "sliding_window")
        kinds = architecture_setting(model, "layer_types")
        if kinds is None:
            self._kinds = {"full_attention" if self._window is None else "sliding_attention"}
            self._by_kind = False
        else:
            self._kinds = set(kinds)
            self._by_kind = self._kinds != {"full_attention"}
        if not self._kinds <= ATTENTION_TYPES:
            raise ValueError(f"attention of types {sorted(self._kinds - ATTENTION_TYPES)}")

    def reserve(self, slots: int, columns: int) -> None:
        self._cache.reserve(slots, columns)
        self._columns = self._cache.columns

    def copy(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        self._cache.copy(self._index(source), self._index(target), width)

    def prefill(
        self, ids: np.ndarray, rows: Sequence[int], start: np.ndarray, end: np.ndarray
    ) -> None:
        for part in batches(end - start):
            chosen = np.asarray(rows)[part]
            self._prefill(ids, chosen, start[part], end[part])

    def _prefill(
        self, ids: np.ndarray, rows: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> None:
        width = int((end - start).max())
        columns = start[:, None] + np.arange(width)
        inside = columns < end[:, None]
        tokens = np.where(inside, ids[rows[:, None], np.minimum(columns, ids.shape[1] - 1)], 0)
        # Padding repeats nothing: it goes to the columns after the row's end, which are garbage
        # by definition; those past the table all share its last, never-read column.
        where = torch.from_numpy(np.minimum(columns, self._columns - 1)).to(self._device)
        index = self._index(rows)
        fresh = not start.any()
        self._cache.begin(index, where, int(end.max()), fresh=fresh)
        inputs = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        positions = where.clamp(max=self._last_position)
        if fresh:
            decoder_hidden(self._model, inputs, None, None, self._cache)
        else:
            mask = self._mask(where, int(end.max()))
            decoder_hidden(self._model, inputs, mask, positions, self._cache)

    def prefill_block(
        self, ids: np.ndarray, rows: Sequence[int], start: int, end: np.ndarray, size: int
    ) -> None:
        columns = np.tile(start + np.arange(size), (len(rows), 1))
        inside = columns < end[:, None]
        chosen = np.asarray(rows)[:, None]
        tokens = np.where(inside, ids[chosen, np.minimum(columns, ids.shape[1] - 1)], 0)
        where = torch.from_numpy(columns).to(self._device)
        self._cache.begin(self._index(rows), where, start + size, fresh=False)
        inputs = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        mask = self._mask(where, start + size)
        positions = where.clamp(max=self._last_position)
        decoder_hidden(self._model, inputs, mask, positions, self._cache)

    def step(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        width: int,
        families: Families | None = None,
    ) -> Tensor:
        count = len(lengths)
        tokens = ids[np.arange(count), lengths]
        inputs = torch.from_numpy(tokens.astype(np.int64)).to(self._device).unsqueeze(1)
        columns = torch.from_numpy(lengths.astype(np.int64)).to(self._device).unsqueeze(1)
        mask: AttentionMask
        if families is not None and self._reads_families:
            attention = PrefixAttention.of(families, columns, width, self._dtype)
            self._cache.begin(slice(0, count), columns, width, fresh=False, attention=attention)
            mask = attention
        else:
            self._cache.begin(slice(0, count), columns, width, fresh=False)
            mask = self._mask(columns, width)
        positions = columns.clamp(max=self._last_position)
        hidden = decoder_hidden(self._model, inputs, mask, positions, self._cache)
        return head_logits(self._model, hidden[:, -1]).float()

    def remembered(self, row: int, start: int, stop: int) -> Tensor:
        """What columns [start, stop) of a row hold, as one vector."""
        return self._cache.columns_of(row, start, stop)

    def _mask(self, columns: Tensor, width: int) -> AttentionMask:
        """Additive masks [R, 1, T, width] for queries at `columns` [R, T].

        Additive, because not every attention implementation takes a boolean one.
        """
        query = columns[:, None, :, None]
        key = torch.arange(width, device=self._device)
        masks: dict[str, Tensor] = {}
        for kind in self._kinds:
            hidden = key > query
            if kind == "sliding_attention" and self._window is not None:
                hidden |= key <= query - self._window
            empty = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            masks[kind] = empty.masked_fill_(hidden, torch.finfo(self._dtype).min)
        return masks if self._by_kind else next(iter(masks.values()))

    def _index(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(rows, dtype=torch.long, device=self._device)


class PlainRunner:
    """The whole sequence at every step: slow, and right for any causal language model."""

    incremental = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    def reserve(self, slots: int, columns: int) -> None:
        pass

    def prefill(
        self, ids: np.ndarray, rows: Sequence[int], start: np.ndarray, end: np.ndarray
    ) -> None:
        pass

    def prefill_block(
        self, ids: np.ndarray, rows: Sequence[int], start: int, end: np.ndarray, size: int
    ) -> None:
        pass

    def copy(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        pass

    def step(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        width: int,
        families: Families | None = None,
    ) -> Tensor:
        inputs = torch.from_numpy(ids[: len(lengths), :width].astype(np.int64)).to(self._device)
        last = torch.from_numpy(np.minimum(lengths, width - 1).astype(np.int64)).to(self._device)
        return last_logits(self._model, inputs, last).float()


def batches(lengths: np.ndarray) -> list[np.ndarray]:
    """Split rows of these `lengths` [R] into batches of similar length.

    Rows go from short to long; a batch ends where it would exceed `PREFILL_TOKENS` padded
    tokens, or where padding would take more than `PADDING_SHARE` of it and it is large enough
    for that to matter.
    """
    order = np.argsort(lengths, kind="stable")
    parts: list[np.ndarray] = []
    begin = 0
    for stop in range(1, len(order) + 1):
        if stop < len(order):
            padded = int(lengths[order[stop]]) * (stop + 1 - begin)
            real = int(lengths[order[begin : stop + 1]].sum())
            wasteful = padded > 256 and padded - real > PADDING_SHARE * padded
            if padded <= PREFILL_TOKENS and not wasteful:
                continue
        parts.append(order[begin:stop])
        begin = stop
    return parts


def make_runner(model: nn.Module, context_limit: int) -> Runner:
    """The fast runner if it agrees with the plain forward pass on this model, else the slow one."""
    with evaluating(model), torch.no_grad():
        try:
            gap = cache_gap(model, context_limit)
        except Exception as error:  # any architecture may fail in its own way
            reason = f"{type(error).__name__}: {error}"
        else:
            tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
            if gap <= tolerance:
                together = _reads_families(model, context_limit, tolerance)
                return CachedRunner(model, context_limit, reads_families=together)
            reason = f"logits differ by {gap:.2g}"
    logger.warning(
        "%s does not work with the slot cache (%s); generation recomputes the whole sequence "
        "for every token, which is slow",
        type(unwrap(model)).__name__,
        reason,
    )
    return PlainRunner(model)


def _reads_families(model: nn.Module, context_limit: int, tolerance: float) -> bool:
    kinds = set(architecture_setting(model, "layer_types") or ())
    slides = not kinds and architecture_setting(model, "sliding_window") is not None
    if slides or not takes_own_attention(model) or not kinds <= {"full_attention"}:
        return False
    try:
        return cache_gap(model, context_limit, families=True) <= tolerance
    except Exception:  # any architecture may fail in its own way; the usual attention serves
        return False


def cache_gap(model: nn.Module, context_limit: int, *, families: bool = False) -> float:
    """Largest difference between logits over a slot cache and those of a plain forward pass.

    Two ragged rows are prefilled, one of them copied to a third slot, extended, and decoded
    beyond a short sliding window; relative to the largest logit where that is above 1. With
    `families` the rows that begin alike are decoded so.
    """
    if not splits_exactly(model):
        raise ValueError("its head is more than its decoder's output and a projection")
    window = architecture_setting(model, "sliding_window") or 0
    total = min(12 + (window if window <= 64 else 0), context_limit)
    if total < 6:
        raise ValueError(f"a context of {context_limit} tokens")
    vocab = unwrap(model).get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocab, (3, total + 1))
    ids[2] = ids[0]
    runner = CachedRunner(model, context_limit, reads_families=families)
    runner.reserve(3, total + 1)
    start, middle, end = np.array([0, 0]), np.array([total - 4, 2]), np.array([total - 2, 3])
    runner.prefill(ids, [0, 1], start, middle)
    runner.prefill(ids, [0, 1], middle, end)
    runner.copy([0], [2], total)
    device = next(model.parameters()).device
    expected = full_logits(model, torch.from_numpy(ids[:, :total]).to(device)).detach()
    lengths = np.array([total - 2, 3, total - 2])
    gap = 0.0
    related = None
    if families:
        alike, shared = np.array([0, 1, 0]), np.array([total - 4, 2, total - 4])
        related = make_families(alike, shared, np.ones(3, dtype=np.bool_), device)
    for _ in range(2):
        logits = runner.step(ids, lengths, int(lengths.max()) + 1, related)
        right = expected[np.arange(3), lengths].float()
        scale = float(right.abs().max().clamp(min=1.0))
        gap = max(gap, float((logits - right).abs().max()) / scale)
        lengths = lengths + 1
    return gap
