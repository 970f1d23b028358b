"""Bringing rows to their last known token, before the steps that sample.

`FastFill` runs as little as it can, in calls as large as they can be: what a row's bits
are then depends on its company, since a batch's shape decides the order of sums. `ExactFill` runs
whole blocks at places that depend on the row's own tokens alone, so that its bits do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from retrain.engines.runners import Runner
from retrain.engines.slots import SlotTable

FEED_LIMIT = 32
"""Longest context that is fed through decode steps, a token a step, rather than prefilled."""

FEED_CROWD = 1
"""Rows decoding per row fed above which feeding is cheaper than a prefill call of its own."""

MIN_COPY = 64
"""Shortest prefix worth copying from another slot."""

MIN_SAVED = 256
"""Fewest tokens saved that make a prefill of a common prefix worth a call of its own."""

BLOCK = 64
"""Columns that `ExactFill` runs in one call."""


class Fill(Protocol):
    prefilled_tokens: int
    """Context tokens run in prefill calls so far; copied and cached ones do not count."""

    def place(self, slot: int, prompt: np.ndarray, *, returns: bool) -> None:
        """Say how much of its new prompt a slot has run already; `returns`: of its own session."""
        ...

    def fill(self, slots: Sequence[int], decoding: int) -> None:
        """Run all but the last known token of these rows; `decoding` others go on meanwhile.

        What is left of a row, if anything, is fed to the coming steps.
        """
        ...


class PlainFill:
    """For a model that is run over its whole sequence at every step: there is nothing to fill."""

    prefilled_tokens = 0

    def __init__(self, table: SlotTable) -> None:
        self._table = table

    def place(self, slot: int, prompt: np.ndarray, *, returns: bool) -> None:
        self._table.length[slot] = 0

    def fill(self, slots: Sequence[int], decoding: int) -> None:
        self._table.length[list(slots)] = self._table.known[list(slots)] - 1


class FastFill:
    """Every shared token is run once, wherever it lies; ragged rows go together."""

    def __init__(self, table: SlotTable, runner: Runner) -> None:
        self._table = table
        self._runner = runner
        self.prefilled_tokens = 0

    def place(self, slot: int, prompt: np.ndarray, *, returns: bool) -> None:
        table = self._table
        table.length[slot] = min(table.shared_prefix(slot, prompt), len(prompt) - 1)
        if table.length[slot] < table.shared[slot] or table.length[slot] == 0:
            table.relate([slot], 0)

    def fill(self, slots: Sequence[int], decoding: int) -> None:
        table = self._table
        groups: dict[bytes, list[int]] = {}
        for slot in sorted(slots, key=lambda s: -int(table.length[s])):
            groups.setdefault(_known(table, slot), []).append(slot)
        leaders = [group[0] for group in groups.values()]
        self._copy_from_donors(leaders)
        self._run_common_prefixes(leaders)
        crowded = decoding >= FEED_CROWD * sum(len(group) == 1 for group in groups.values())
        self._prefill(
            [
                group[0]
                for group in groups.values()
                if len(group) > 1 or not crowded or _missing(table, group[0]) > FEED_LIMIT
            ]
        )
        for group in groups.values():
            behind = [slot for slot in group[1:] if _missing(table, slot) > 0]
            self._copy(group[0], behind, int(table.length[group[0]]))
            if len(group) > 1:
                table.relate(group, int(table.length[group].min()))

    def _copy_from_donors(self, leaders: Sequence[int]) -> None:
        table = self._table
        for slot in leaders:
            if _missing(table, slot) < MIN_COPY:
                continue
            donor, shared = table.best_donor(table.ids[slot, : table.known[slot] - 1], table.length)
            if shared >= table.length[slot] + MIN_COPY:
                self._copy(donor, [slot], shared)

    def _run_common_prefixes(self, leaders: Sequence[int]) -> None:
        """Prompts that begin alike (a system prompt, tool schemas): their prefix is run once."""
        table = self._table
        families: dict[bytes, list[int]] = {}
        for slot in leaders:
            if table.length[slot] == 0 and table.known[slot] > MIN_COPY:
                families.setdefault(table.ids[slot, :MIN_COPY].tobytes(), []).append(slot)
        for family in families.values():
            shortest = int(table.known[family].min()) - 1
            rows = table.ids[family, :shortest]
            differs = (rows != rows[0]).any(0)
            shared = int(differs.argmax()) if differs.any() else shortest
            if (len(family) - 1) * shared >= MIN_SAVED:
                self._prefill(family[:1], np.array([shared]))
                self._copy(family[0], family[1:], shared)
                table.relate(family, shared)

    def _prefill(self, slots: Sequence[int], end: np.ndarray | None = None) -> None:
        table = self._table
        rows = np.asarray(slots, dtype=np.int64)
        stop = table.known[rows] - 1 if end is None else end
        todo = table.length[rows] < stop
        if not todo.any():
            return
        rows, stop = rows[todo], stop[todo]
        self._runner.prefill(table.ids, rows.tolist(), table.length[rows], stop)
        self.prefilled_tokens += int((stop - table.length[rows]).sum())
        table.length[rows] = stop

    def _copy(self, source: int, targets: Sequence[int], width: int) -> None:
        if targets:
            self._runner.copy([source] * len(targets), targets, width)
            self._table.length[list(targets)] = width


class ExactFill:
    """Block b of a fresh prompt is run as [rows, BLOCK] over the b + 1 first blocks, in any
    company; equal blocks after equal tokens are run once and copied. Only such blocks are ever
    copied: what decode steps ran has other bits.

    A session that comes back goes on from what it has run: a short addition is fed to the steps, a
    long one runs in blocks from where it begins. Its slot must not have been taken from it.
    """

    def __init__(self, table: SlotTable, runner: Runner) -> None:
        self._table = table
        self._runner = runner
        self._returned: set[int] = set()
        self.prefilled_tokens = 0

    def place(self, slot: int, prompt: np.ndarray, *, returns: bool) -> None:
        table = self._table
        shared = table.shared_prefix(slot, prompt)
        if returns and shared > 0:
            table.length[slot] = min(shared, len(prompt) - 1)
            table.settled[slot] = min(table.settled[slot], table.length[slot])
            self._returned.add(slot)
        else:
            settled = min(shared, int(table.settled[slot]), len(prompt) - 1)
            table.length[slot] = table.settled[slot] = settled // BLOCK * BLOCK

    def fill(self, slots: Sequence[int], decoding: int) -> None:
        table = self._table
        returned, self._returned = self._returned, set()
        fresh = [slot for slot in slots if slot not in returned]
        groups: dict[bytes, list[int]] = {}
        for slot in fresh:
            groups.setdefault(_known(table, slot), []).append(slot)
        leaders = [group[0] for group in groups.values()]
        for slot in leaders:
            self._copy_from_donor(slot)
        self._run_fresh(leaders)
        for group in groups.values():
            self._copy(group[0], group[1:], int(table.known[group[0]]) - 1)
        self._run_returned([slot for slot in slots if slot in returned])

    def _copy_from_donor(self, slot: int) -> None:
        table = self._table
        if _missing(table, slot) >= MIN_COPY:
            prompt = table.ids[slot, : table.known[slot] - 1]
            donor, shared = table.best_donor(prompt, table.settled)
            shared = shared // BLOCK * BLOCK
            if shared > table.length[slot]:
                self._copy(donor, [slot], shared)

    def _run_fresh(self, leaders: Sequence[int]) -> None:
        table = self._table
        starts = {int(table.length[slot]) for slot in leaders if _missing(table, slot) > 0}
        start = min(starts, default=0)
        while True:
            rows = [s for s in leaders if table.length[s] == start and _missing(table, s) > 0]
            if not rows and not any(_missing(table, slot) > 0 for slot in leaders):
                return
            alike: dict[bytes, list[int]] = {}
            for slot in rows:
                stop = min(start + BLOCK, int(table.known[slot]) - 1)
                alike.setdefault(table.ids[slot, :stop].tobytes(), []).append(slot)
            first = [group[0] for group in alike.values()]
            self._run_block(first, start)
            table.settled[first] = table.length[first]
            for group in alike.values():
                self._copy(group[0], group[1:], int(table.length[group[0]]))
            start += BLOCK

    def _run_returned(self, slots: Sequence[int]) -> None:
        table = self._table
        todo = [slot for slot in slots if _missing(table, slot) > FEED_LIMIT]
        while todo:
            start = int(table.length[todo].min())
            self._run_block([slot for slot in todo if table.length[slot] == start], start)
            todo = [slot for slot in todo if _missing(table, slot) > 0]

    def _run_block(self, rows: Sequence[int], start: int) -> None:
        if not rows:
            return
        table = self._table
        stop = np.minimum(start + BLOCK, table.known[list(rows)] - 1)
        self._runner.prefill_block(table.ids, rows, start, stop, BLOCK)
        self.prefilled_tokens += int((stop - start).sum())
        table.length[list(rows)] = stop

    def _copy(self, source: int, targets: Sequence[int], width: int) -> None:
        if targets:
            self._runner.copy([source] * len(targets), targets, width)
            self._table.length[list(targets)] = self._table.settled[list(targets)] = width


def _missing(table: SlotTable, slot: int) -> int:
    """Tokens to run before the last known one, which the next step runs."""
    return int(table.known[slot] - 1 - table.length[slot])


def _known(table: SlotTable, slot: int) -> bytes:
    return table.ids[slot, : table.known[slot]].tobytes()
