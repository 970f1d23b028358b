"""A key/value cache whose rows belong to slots and grow independently.

Row r keeps token t of its sequence in column t, always: a shared prefix is copied column by
column, a finished row is overwritten from column 0, and nothing is ever shifted. Which columns
a query may see is said by the attention mask alone, so garbage beyond a row's length is
harmless.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from retrain.engines.prefix import PrefixAttention


class SlotCache(Cache):
    """Storage per layer: keys and values [slots, kv_heads, columns, head_dim].

    Heads come before columns so that attention reads one contiguous run per row and head: once
    the cache exceeds the processor's own, that is twice as fast as the projection's order.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slots = 0
        self.columns = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._flat: dict[int, Tensor] = {}
        self._columns = torch.empty(0, 0, dtype=torch.long)
        self._rows: Tensor | slice = slice(0, 0)
        self._width = 0
        self._fresh = False
        self._attention: PrefixAttention | None = None

    def reserve(self, slots: int, columns: int) -> None:
        """Grow to at least this size, keeping what is stored."""
        if slots <= self.slots and columns <= self.columns:
            return
        self.slots, self.columns = max(slots, self.slots), max(columns, self.columns)
        for store in (self._keys, self._values):
            for layer, old in store.items():
                slots, heads, columns, size = old.shape
                new = old.new_zeros(self.slots, heads, self.columns, size)
                new[:slots, :, :columns] = old
                store[layer] = new

    def begin(
        self,
        rows: Tensor | slice,
        columns: Tensor,
        width: int,
        *,
        fresh: bool,
        attention: PrefixAttention | None = None,
    ) -> None:
        """Say where the next forward pass writes and what it reads.

        Args:
            rows: the slots of the batch [R], as a slice for the first R slots.
            columns: where each new token goes [R, T].
            width: attention reads columns [0, width) of the rows.
            fresh: nothing precedes the new tokens; they attend to each other only.
            attention: is given all slots and columns, and picks what it reads.
        """
        self._rows, self._columns, self._width = rows, columns, width
        self._fresh, self._attention = fresh, attention
        self._flat.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states [R, kv_heads, T, head_dim]; return those to attend to."""
        keys = self._write(self._keys, layer_idx, key_states)
        values = self._write(self._values, layer_idx, value_states)
        if self._fresh:
            return key_states, value_states
        if self._attention is not None:
            self._attention.read(layer_idx, keys, values)
            return keys, values
        return self._view(keys), self._view(values)

    def _write(self, store: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
        heads, size = states.shape[1], states.shape[3]
        if layer not in store:
            store[layer] = states.new_zeros(self.slots, heads, self.columns, size)
        if heads not in self._flat:
            self._flat[heads] = self._flat_index(heads)
        stored = store[layer]
        stored.view(-1, size).index_copy_(0, self._flat[heads], states.reshape(-1, size))
        return stored

    def _flat_index(self, heads: int) -> Tensor:
        """Where each of the new states [R, heads, T] lies in [slots * heads * columns]."""
        device = self._columns.device
        rows = self._rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=device)
        head = torch.arange(heads, device=device)
        block = (rows.unsqueeze(1) * heads + head) * self.columns
        return (block.unsqueeze(2) + self._columns.unsqueeze(1)).flatten()

    def _view(self, stored: Tensor) -> Tensor:
        return stored[self._rows, :, : self._width]

    def copy(self, source: Tensor, target: Tensor, width: int) -> None:
        """Columns [0, width) of rows `source` [R] to rows `target` [R]; they may overlap."""
        for stored in self._all():
            stored[target, :, :width] = stored[source, :, :width]

    def columns_of(self, row: int, start: int, stop: int) -> Tensor:
        """Everything stored for columns [start, stop) of a row, as one vector."""
        return torch.cat([stored[row, :, start:stop].flatten() for stored in self._all()])

    def _all(self) -> Iterator[Tensor]:
        yield from self._keys.values()
        yield from self._values.values()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Asked only where the model makes its own mask: for a fresh prefill."""
        return query_length, 0
