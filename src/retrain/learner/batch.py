"""Samples to padded tensors: collate, and cut into micro-batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from retrain.algorithms import Aggregation, token_weights
from retrain.models.tree import common_prefix, prefix_order
from retrain.types import Sample


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors [B, T]; column t speaks of token t."""

    token_ids: Tensor
    lengths: Tensor
    """[B], tokens before the padding."""
    sequences: Tensor
    """[B], which rollout each row belongs to."""
    mask: Tensor
    """bool, where a token trains."""
    weights: Tensor
    """float64, zero outside the mask; fixed on all the samples given."""
    advantages: Tensor
    behavior_logprobs: Tensor
    old_logprobs: Tensor
    """NaN where the learner has not computed them; so are the next three."""
    ref_logprobs: Tensor
    values: Tensor
    returns: Tensor
    teacher_logprobs: Tensor | None = None
    """NaN where no teacher speaks; None where none does anywhere."""
    teacher_top_ids: Tensor | None = None
    """[B, T, K]; None where no sample has any."""
    teacher_top_logprobs: Tensor | None = None
    """[B, T, K], -inf where there are fewer than K."""
    teacher_temperature: float = field(default=1.0, kw_only=True)
    """Of `teacher_top_logprobs`."""

    @property
    def num_trained(self) -> int:
        return int(self.mask.sum())


def collate(
    samples: Sequence[Sample], weights: Sequence[float], device: torch.device | str = "cpu"
) -> Batch:
    """Pad samples to one width; `weights` [B] are those of each sample's trained tokens."""
    shape = (len(samples), max(map(len, samples)))
    token_ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.bool_)
    for row, sample in enumerate(samples):
        token_ids[row, : len(sample)] = _column(sample.token_ids)
        mask[row, : len(sample)] = _column(sample.loss_mask).astype(np.bool_)
    nothing, unknown = 0.0, float("nan")
    number = {rollout: n for n, rollout in enumerate(dict.fromkeys(s.rollout_id for s in samples))}
    columns = (
        token_ids,
        np.asarray([len(sample) for sample in samples]),
        np.asarray([number[sample.rollout_id] for sample in samples]),
        mask,
        np.where(mask, np.asarray(weights, dtype=np.float64)[:, None], 0.0),
        _padded([s.advantages for s in samples], shape, nothing),
        _padded([s.behavior_logprobs for s in samples], shape, nothing).astype(np.float32),
        _padded([s.old_logprobs for s in samples], shape, unknown),
        _padded([s.ref_logprobs for s in samples], shape, unknown),
        _padded([s.values for s in samples], shape, unknown),
        _padded([s.returns for s in samples], shape, unknown),
    )
    batch = Batch(*(torch.from_numpy(column).to(device) for column in columns))
    taught = {
        name: torch.from_numpy(column).to(device)
        for name, column in _teacher_columns(samples, shape).items()
    }
    if not taught:
        return batch
    return replace(
        batch,
        teacher_logprobs=taught.get("logprobs"),
        teacher_top_ids=taught.get("top_ids"),
        teacher_top_logprobs=taught.get("top_logprobs"),
        teacher_temperature=samples[0].teacher_temperature,
    )


def micro_batches(
    samples: Sequence[Sample],
    *,
    token_budget: int,
    aggregation: Aggregation,
    constant_length: int | None = None,
    device: torch.device,
    share_prefixes: bool = False,
    whole_rollouts: bool = False,
    skip_zero_advantages: bool = True,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of at most `token_budget` tokens, each with the indices of its samples.

    Weights come from all `samples` together, so the cut does not change the gradient. Samples
    without a trained token are not run, nor those whose advantages are zero throughout, unless
    `skip_zero_advantages` is off. With `share_prefixes` the samples that begin alike are
    neighbours and a token that several share counts once; else they are sorted by length and
    padding counts. One that is longer than the budget gets a batch of its own.

    Args:
        whole_rollouts: keep the samples of a rollout in one batch, as ratios of whole sequences
            require.
    """
    counts = [sum(sample.loss_mask) for sample in samples]
    ids = [sample.rollout_id for sample in samples]
    weights = token_weights(counts, ids, aggregation, constant_length=constant_length)
    trained = [i for i in range(len(samples)) if counts[i]]
    units = _units(trained, ids) if whole_rollouts else [[i] for i in trained]
    if skip_zero_advantages:
        units = [unit for unit in units if not all(_teaches_nothing(samples[i]) for i in unit)]
    cut = _cut_sharing if share_prefixes else _cut_padded
    for chosen in cut(units, samples, token_budget):
        yield chosen, collate([samples[i] for i in chosen], [weights[i] for i in chosen], device)


def _units(running: Iterable[int], rollout_ids: Sequence[str]) -> list[list[int]]:
    units: dict[str, list[int]] = {}
    for i in running:
        units.setdefault(rollout_ids[i], []).append(i)
    return list(units.values())


def _cut_padded(
    units: Sequence[list[int]], samples: Sequence[Sample], budget: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    width = 0
    for unit in sorted(units, key=lambda unit: -max(len(samples[i]) for i in unit)):
        if batch and (len(batch) + len(unit)) * width > budget:
            yield batch
            batch = []
        if not batch:
            width = max(len(samples[i]) for i in unit)
        batch += unit
    if batch:
        yield batch


def _cut_sharing(
    units: Sequence[list[int]], samples: Sequence[Sample], budget: int
) -> Iterator[list[int]]:
    tokens = {i: _column(samples[i].token_ids) for unit in units for i in unit}
    order = prefix_order([tokens[unit[0]] for unit in units])
    batch: list[int] = []
    size = 0
    for unit in (units[number] for number in order):
        cost = _fresh(batch, unit, tokens)
        if batch and size + cost > budget:
            yield batch
            batch, size = [], 0
            cost = _fresh(batch, unit, tokens)
        batch += unit
        size += cost
    if batch:
        yield batch


def _fresh(batch: Sequence[int], unit: Sequence[int], tokens: dict[int, np.ndarray]) -> int:
    """Tokens of a unit that the sequence before does not share, at most."""
    before = batch[-1] if batch else None
    cost = 0
    for i in unit:
        shared = 0 if before is None else common_prefix(tokens[before], tokens[i])
        cost += len(tokens[i]) - shared
        before = i
    return cost


def _teaches_nothing(sample: Sample) -> bool:
    return (
        sample.objective == "policy"
        and sample.advantages is not None
        and not any(sample.advantages)
    )


def _padded(
    columns: Sequence[array[float] | None], shape: tuple[int, int], padding: float
) -> np.ndarray:
    padded = np.full(shape, padding, dtype=np.float64)
    for row, column in enumerate(columns):
        if column is not None:
            padded[row, : len(column)] = _column(column)
    return padded


def _teacher_columns(samples: Sequence[Sample], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """What teachers said, where they said anything.

    Raises:
        ValueError: they spoke at different temperatures.
    """
    columns: dict[str, np.ndarray] = {}
    if any(sample.teacher_logprobs is not None for sample in samples):
        said = [sample.teacher_logprobs for sample in samples]
        columns["logprobs"] = _padded(said, shape, float("nan"))
    k = max(sample.teacher_top_k for sample in samples)
    if k == 0:
        return columns
    if len({sample.teacher_temperature for sample in samples}) > 1:
        raise ValueError("the samples of a batch have teachers of one temperature")
    ids = np.full((*shape, k), -1, dtype=np.int64)
    logprobs = np.full((*shape, k), -np.inf)
    for row, sample in enumerate(samples):
        if sample.teacher_top_ids is None or sample.teacher_top_logprobs is None:
            continue
        own = (row, slice(len(sample)), slice(sample.teacher_top_k))
        ids[own] = _column(sample.teacher_top_ids).reshape(len(sample), -1)
        logprobs[own] = _column(sample.teacher_top_logprobs).reshape(len(sample), -1)
    logprobs[(ids < 0) | np.isnan(logprobs)] = -np.inf
    # an id that stands for nothing repeats one that is there: the rest are all others
    best = np.take_along_axis(ids, logprobs.argmax(-1)[..., None], -1)
    columns["top_ids"] = np.where(logprobs > -np.inf, ids, np.maximum(best, 0))
    columns["top_logprobs"] = logprobs
    return columns


def _column(values: array[int] | array[float]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.dtype(values.typecode))
