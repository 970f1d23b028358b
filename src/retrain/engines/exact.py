"""Whether a row's bits depend on its company, found out by trying.

The order in which a matrix product sums depends on the shapes of its operands, and the shape of a
batch on who happens to be in it. Where a row nevertheless gets the same bits in any company, what
a request gets depends on its own tokens alone: a run can then be repeated to the bit, however long
its tools take. `Scheduler` keeps shapes to multiples that make this likely; here it is tried for
the very model, number of threads and machine, over batches of every kind that will occur.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from retrain.engines.fill import BLOCK
from retrain.engines.runners import CachedRunner, make_runner
from retrain.engines.sampling import sample_tokens
from retrain.models.forward import architecture_setting, evaluating, unwrap
from retrain.types import UserError

logger = logging.getLogger(__name__)

WIDEST = 1024
"""Columns up to which widths are tried; beyond, attention goes on in blocks of the same size."""

BLOCK_ROWS = (1, 2, 5, 16)
"""Prompts whose blocks are prefilled together."""

STEP_ROWS = (8, 16, 24, 40, 64, 96)
"""Rows that decode together, as far as there are slots."""

ROW_BLOCK = 8
"""Rows of a step come in multiples of this."""

COLUMN_BLOCK = 16
"""As ROW_BLOCK, of the columns that its attention reads."""


def exact_runner(model: nn.Module, max_slots: int, context_limit: int) -> CachedRunner:
    """A runner whose rows do not depend on their company, proven on this machine.

    Where they do with as many CPU threads as this thread has, it goes on with one.

    Raises:
        UserError: they do with one too, or the model does not work with the slot cache.
    """
    with evaluating(model), torch.no_grad():
        usual = make_runner(model, context_limit)
        reason: str | None = "it recomputes whole sequences"
        if isinstance(usual, CachedRunner):
            reason = why_not_exact(model, max_slots, context_limit)
            if reason is not None and torch.get_num_threads() > 1:
                before = torch.get_num_threads()
                torch.set_num_threads(1)
                reason = why_not_exact(model, max_slots, context_limit)
                if reason is None:
                    logger.info("decoding takes 1 thread in place of %d, to be exact", before)
    if reason is not None:
        raise UserError(
            f"engine.deterministic: {type(unwrap(model)).__name__} gives other bits in other "
            f"company ({reason})",
            "Set engine.deterministic: false; such a run resumes, but not bit for bit.",
        )
    return CachedRunner(model, context_limit)


def why_not_exact(model: nn.Module, max_slots: int, context_limit: int) -> str | None:
    """The first shape in which a row's bits differ from those it has in others; None if none."""
    if next(model.parameters()).device.type != "cpu":
        return "it is not on the CPU"
    if changes_rotary_tables(model):
        return "its rotary tables change with the longest sequence"
    shapes = _Shapes(model, max_slots, context_limit)
    wrong = itertools.chain(shapes.blocks(), shapes.rows(), shapes.widths())
    return next(wrong, None)


def changes_rotary_tables(model: nn.Module) -> bool:
    """Whether a forward pass depends on the longest position that the model has seen."""
    rope = str(architecture_setting(model, "rope_parameters") or {})
    return "dynamic" in rope or "longrope" in rope


class _Shapes:
    """Tries shapes, in two kinds of company: every second row a twin of the first, wherever it
    stands; and the first row among strangers, who differ in length and from trial to trial."""

    def __init__(self, model: nn.Module, max_slots: int, context_limit: int) -> None:
        self._model = model
        self._limit = context_limit
        self._slots = max_slots
        self._random = np.random.default_rng(0)
        self._vocab: int = unwrap(model).get_input_embeddings().weight.shape[0]
        self._shape = (max(max_slots, *BLOCK_ROWS), min(context_limit, WIDEST))
        self._first = self._drawn(self._shape[1])

    def blocks(self) -> Iterator[str]:
        """The first blocks of prompts, in several batches."""
        width = self._shape[1]
        starts = range(0, min(2 * BLOCK, width), BLOCK)
        expected: dict[int, Tensor] = {}
        for twins in (True, False):
            runner = self._runner(max(BLOCK_ROWS), 2 * BLOCK)
            for start, count in itertools.product(starts, BLOCK_ROWS):
                stop = np.full(count, min(start + BLOCK, width))
                runner.prefill_block(self._company(twins), range(count), start, stop, BLOCK)
                alike = range(0, count, 2) if twins else range(1)
                found = [runner.remembered(row, start, int(stop[0])) for row in alike]
                usual = expected.setdefault(start, found[0])
                if not all(torch.equal(row, usual) for row in found):
                    yield f"a block of {count} prompts at {start}"

    def rows(self) -> Iterator[str]:
        """Steps of several numbers of rows."""
        length = min(BLOCK, self._shape[1]) - 1
        runner = self._begun(self._slots, length)
        expected: Tensor | None = None
        counts = sorted(count for count in {*STEP_ROWS, self._slots} if count <= self._slots)
        for twins, count in itertools.product((True, False), counts):
            lengths = np.full(count, length)
            if not twins:  # from here on the other rows have run other tokens
                lengths[1::3] = min(5, length)
                lengths[2::3] = min(2 * length, self._shape[1] - 1)
            found = self._step(runner, lengths, int(lengths.max()) + 1, twins)
            expected = found[0] if expected is None else expected
            if not (found == expected).all():
                yield f"a step of {count} rows"

    def widths(self) -> Iterator[str]:
        """Steps that read several widths, after sequences of several lengths."""
        longest = self._shape[1] - 1
        runner = self._begun(STEP_ROWS[0], longest)
        tried = (10, 3 * BLOCK + 6, 9 * BLOCK + 24, longest)
        for length in sorted({min(length, longest) for length in tried}):
            expected: Tensor | None = None
            for more in (0, 16, 48, 112, 240, 400):
                if length + more > longest:
                    continue
                lengths = np.full(STEP_ROWS[0], length)
                found = self._step(runner, lengths, length + 1 + more, twins=True)
                expected = found[0] if expected is None else expected
                if not (found == expected).all():
                    yield f"a step at {length} over {length + more} columns"

    def _drawn(self, *shape: int) -> np.ndarray:
        return self._random.integers(0, self._vocab, shape).astype(np.int32)

    def _company(self, twins: bool) -> np.ndarray:
        ids = self._drawn(*self._shape)
        ids[:: 2 if twins else len(ids)] = self._first
        return ids

    def _runner(self, slots: int, columns: int) -> CachedRunner:
        runner = CachedRunner(self._model, self._limit)
        runner.reserve(slots, columns + 2 * BLOCK)
        return runner

    def _begun(self, slots: int, length: int) -> CachedRunner:
        """Every slot has run the first `length` tokens of row 0."""
        runner = self._runner(slots, length)
        for start in range(0, length, BLOCK):
            end = np.array([min(start + BLOCK, length)])
            runner.prefill_block(self._first[None], [0], start, end, BLOCK)
        runner.copy([0] * (slots - 1), range(1, slots), length)
        return runner

    def _step(self, runner: CachedRunner, lengths: np.ndarray, width: int, twins: bool) -> Tensor:
        """Of the first row and its twins: logits, and log-probabilities of samples [n, V + 2]."""
        width = -(-width // COLUMN_BLOCK) * COLUMN_BLOCK
        logits = runner.step(self._company(twins), lengths, width)
        drawn = torch.full((len(lengths),), 0.37)
        sampled = [sample_tokens(logits.clone(), drawn, t)[1] for t in (1.0, 0.7)]
        return torch.cat([logits, torch.stack(sampled, 1)], 1)[:: 2 if twins else len(lengths)]
