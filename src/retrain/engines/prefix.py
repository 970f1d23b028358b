"""One decode step's attention where rows begin alike: a group's prompt is read once.

The keys and values of a prefix that several rows share are read in one place, for all their
queries together; each row's own ones after that. The two parts are then put together by their
softmax denominators, so that the result is that of attention over the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retrain.models.attention import OwnAttention

WORTH_SHARING = 32
"""Fewest columns that every row must share with some other for the parts to pay."""


@dataclass(frozen=True)
class Families:
    """Rows 0 to R-1 by whom they share their first columns with.

    F families of at most M rows; all of them share `start` columns at least, `width` at most.
    """

    names: bytes
    start: int
    width: int
    members: Tensor
    """[F, M] rows, padded with a member."""
    place: Tensor
    """[R], where each row stands in `members`, flattened."""
    leaders: Tensor
    """[F], the row whose columns are read."""
    shared: Tensor
    """[F] columns."""
    prefixes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer, keys [F, K, D, width] and values [F, K, width, D], copied when first read."""


def find_families(
    family: np.ndarray,
    shared: np.ndarray,
    active: np.ndarray,
    width: int,
    device: torch.device,
    *,
    before: Families | None = None,
) -> Families | None:
    """Families of the active rows, from columns [R]; None where sharing does not pay.

    It does not where half of the `width` columns that matter lie beyond the shortest prefix: each
    row reads those on its own. Rows of one `family` are equal in their first `shared` columns.
    What was copied for the families of the step `before` serves again where they are the same.
    """
    rows = np.flatnonzero(active)
    if len(rows) < 2 or 2 * int(shared[rows].min()) < max(width, 2 * WORTH_SHARING):
        return None
    if 2 * len(np.unique(family[rows])) > len(rows):
        return None
    return make_families(family, shared, active, device, before)


def make_families(
    family: np.ndarray,
    shared: np.ndarray,
    active: np.ndarray,
    device: torch.device,
    before: Families | None = None,
) -> Families:
    """As `find_families`, whether it pays or not."""
    rows = np.flatnonzero(active)
    names, first, number = np.unique(family[rows], return_index=True, return_inverse=True)
    sizes = np.bincount(number)
    most = int(sizes.max())
    order = np.argsort(number, kind="stable")
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    leaders = rows[first]
    members = np.repeat(leaders[:, None], most, axis=1)
    members[number, rank] = rows
    place = np.zeros(len(active), dtype=np.int64)
    place[rows] = number * most + rank
    lengths = shared[leaders]
    known = before.prefixes if before is not None and before.names == names.tobytes() else {}
    return Families(
        names=names.tobytes(),
        start=int(lengths.min()),
        width=int(lengths.max()),
        members=torch.from_numpy(members).to(device),
        place=torch.from_numpy(place).to(device),
        leaders=torch.from_numpy(leaders).to(device),
        shared=torch.from_numpy(lengths).to(device),
        prefixes=known,
    )


class PrefixAttention(OwnAttention):
    """Attention of one token a row; the keys and values it gets are the whole cache's."""

    families: Families
    _layer: int
    _hidden_shared: Tensor | None
    _hidden_own: Tensor

    @staticmethod
    def of(families: Families, columns: Tensor, width: int, dtype: torch.dtype) -> PrefixAttention:
        """For queries at `columns` [R, 1], of rows that matter up to `width`."""
        device = columns.device
        own: PrefixAttention = torch.empty(1, 1, 1, 1, device=device).as_subclass(PrefixAttention)
        own.families = families
        own._hidden_shared = None
        if families.start < families.width:
            beyond = torch.arange(families.width, device=device) >= families.shared.unsqueeze(1)
            own._hidden_shared = _additive(beyond, _wide(dtype))
        key = torch.arange(families.start, width, device=device)
        first = families.shared[families.place // families.members.shape[1]]
        own._hidden_own = _additive((key < first.unsqueeze(1)) | (key > columns), _wide(dtype))
        return own

    def read(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The next call is that of `layer`, whose cache is given [slots, K, columns, D]."""
        self._layer = layer
        families = self.families
        if layer not in families.prefixes:
            first, width = families.leaders, families.width
            families.prefixes[layer] = (
                keys.index_select(0, first)[:, :, :width].mT.contiguous(),
                values.index_select(0, first)[:, :, :width].contiguous(),
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Query [R, H, 1, D] over the cache [slots, K, columns, D] -> [R, 1, H, D]."""
        if window is not None:
            raise NotImplementedError("a shared prefix under a sliding window")
        families = self.families
        rows, heads, _, size = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        scale = size**-0.5 if scaling is None else scaling
        grouped = (query * scale).view(rows, kv_heads, repeats, size)
        count, most = families.members.shape

        def by_row(part: Tensor) -> Tensor:
            split = part.view(count, kv_heads, most, repeats, -1).transpose(1, 2)
            return split.flatten(0, 1).index_select(0, families.place)

        together = grouped.index_select(0, families.members.flatten())
        together = together.view(count, most, kv_heads, repeats, size).transpose(1, 2)
        shared = _attended(
            together.flatten(2, 3), *families.prefixes[self._layer], self._hidden_shared
        )
        stop = families.start + self._hidden_own.shape[-1]
        own = _attended(
            grouped,
            key[:rows, :, families.start : stop].mT,
            value[:rows, :, families.start : stop],
            self._hidden_own,
        )
        joined = _joined((by_row(shared[0]), by_row(shared[1]), by_row(shared[2])), own)
        return joined.to(query.dtype).view(rows, 1, heads, size)


Part = tuple[Tensor, Tensor, Tensor]
"""Attention [..., Q, D] before its division, largest score and denominator [..., Q, 1]."""


def _attended(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Part:
    """Query [..., Q, D] over key [..., D, C] and value [..., C, D]; softmax in fp32 at least."""
    scores = (query @ key).to(_wide(query.dtype))
    if hidden is not None:
        scores += hidden
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    attended = (weights.to(value.dtype) @ value).to(weights.dtype)
    return attended, top, weights.sum(-1, keepdim=True)


def _joined(first: Part, second: Part) -> Tensor:
    top = torch.maximum(first[1], second[1])
    scales = [(part[1] - top).exp_() for part in (first, second)]
    attended = first[0] * scales[0] + second[0] * scales[1]
    return attended / (first[2] * scales[0] + second[2] * scales[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, 1, C] of bool [R, C]."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
