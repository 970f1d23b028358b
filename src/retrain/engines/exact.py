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
from retrain.models.forward import evaluating, unwrap
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
    shapes = _Shapes(model, max_slots, context_limit)
    wrong = itertools.chain(shapes.blocks(), shapes.rows(), shapes.widths())
    return next(wrong, None)


class _Shapes:
    """Tries shapes; every even row has the same tokens, every odd one its own."""

    def __init__(self, model: nn.Module, max_slots: int, context_limit: int) -> None:
        self._model = model
        self._limit = context_limit
        self._slots = max_slots
        vocab = unwrap(model).get_input_embeddings().weight.shape[0]
        shape = (max(max_slots, *BLOCK_ROWS), min(context_limit, WIDEST))
        self._ids = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
        self._ids[::2] = self._ids[0]

    def blocks(self) -> Iterator[str]:
        """The first blocks of prompts, in several batches."""
        runner = self._runner(max(BLOCK_ROWS), 2 * BLOCK)
        for start in range(0, min(2 * BLOCK, self._ids.shape[1]), BLOCK):
            expected: list[Tensor] = []
            for count in BLOCK_ROWS:
                rows = list(range(count))
                stop = np.full(count, min(start + BLOCK, self._ids.shape[1]))
                runner.prefill_block(self._ids, rows, start, stop, BLOCK)
                found = [runner.remembered(row, start, int(stop[0])) for row in rows[::2]]
                expected = expected or found
                if not all(torch.equal(row, expected[0]) for row in found):
                    yield f"a block of {count} prompts at {start}"

    def rows(self) -> Iterator[str]:
        """Steps of several numbers of rows."""
        length = min(BLOCK, self._ids.shape[1]) - 1
        runner = self._begun(self._slots, length)
        counts = sorted({*STEP_ROWS, self._slots})
        expected = None
        for count in [count for count in counts if count <= self._slots]:
            found = self._step(runner, count, length, length + 1)
            expected = found[0] if expected is None else expected
            if not (found == expected).all():
                yield f"a step of {count} rows"

    def widths(self) -> Iterator[str]:
        """Steps that read several widths, after sequences of several lengths."""
        longest = self._ids.shape[1] - 1
        runner = self._begun(STEP_ROWS[0], longest)
        for length in sorted({min(length, longest) for length in (10, 3 * BLOCK + 6, longest)}):
            expected = None
            for more in (0, 16, 48, 112, 240, 512):
                if length + more > longest:
                    continue
                found = self._step(runner, STEP_ROWS[0], length, length + 1 + more)
                expected = found[0] if expected is None else expected
                if not (found == expected).all():
                    yield f"a step at {length} over {length + more} columns"

    def _runner(self, slots: int, columns: int) -> CachedRunner:
        runner = CachedRunner(self._model, self._limit)
        runner.reserve(slots, columns + 2 * BLOCK)
        return runner

    def _begun(self, slots: int, length: int) -> CachedRunner:
        """Every slot has run the first `length` tokens of row 0."""
        runner = self._runner(slots, length)
        for start in range(0, length, BLOCK):
            end = np.array([min(start + BLOCK, length)])
            runner.prefill_block(self._ids, [0], start, end, BLOCK)
        runner.copy([0] * (slots - 1), range(1, slots), length)
        return runner

    def _step(self, runner: CachedRunner, count: int, length: int, width: int) -> Tensor:
        """Logits, and log-probabilities of samples of them, of the even rows [rows, V + 2]."""
        width = -(-width // COLUMN_BLOCK) * COLUMN_BLOCK
        logits = runner.step(self._ids, np.full(count, length), width)
        drawn = torch.full((count,), 0.37)
        sampled = [sample_tokens(logits.clone(), drawn, t)[1] for t in (1.0, 0.7)]
        return torch.cat([logits, torch.stack(sampled, 1)], 1)[::2]
