"""Which rows of a source become tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from retrain.data.files import Row
from retrain.data.filters import Filter, as_row
from retrain.data.tasks import Candidate, TaskBuilder
from retrain.types import Task, UserError

_FRUITLESS_ROWS = 1_000_000
"""A source of which a filter has kept none of so many may have no end."""


@dataclass
class Counts:
    filters: Sequence[Filter] = ()
    """Which count for themselves."""
    rows: int = 0
    other_part: int = 0
    duplicates: int = 0
    skipped: int = 0
    kept: int = 0

    def __str__(self) -> str:
        reasons = (
            (self.other_part, "in the other part of the holdout"),
            (self.duplicates, "with a prompt seen before"),
            (self.skipped, "skipped"),
        )
        left_out = [
            f"{refused:,} left out by {f.label}"
            for f in self.filters
            if (refused := f.reached - f.kept)
        ]
        left_out += [f"{count:,} {reason}" for count, reason in reasons if count]
        return "; ".join([f"{self.rows:,} rows read, {self.kept:,} kept", *left_out])


def in_test_part(source_key: str, *, fraction: float, seed: int) -> bool:
    """Whether a prompt belongs to the test part: a hash, so it depends on nothing else."""
    digest = hashlib.blake2b(
        f"{seed}\0{source_key}".encode("utf-8", "surrogatepass"), digest_size=8
    )
    return int.from_bytes(digest.digest()) < fraction * 2**64


@dataclass(frozen=True)
class Selection:
    """Which rows stay: filters, then holdout, then duplicates, then skip and limit, in the
    source's order."""

    build: TaskBuilder
    holdout: tuple[float, str, int] | None
    """(fraction, part, seed)."""
    deduplicate: bool
    skip: int
    limit: int | None
    filters: Callable[[], Sequence[Filter]] = tuple
    """Makes them anew for each reading, for they count."""

    def tasks(self, rows: Iterable[Row | Task], counts: Counts) -> Iterator[Task]:
        """Tasks of rows, counted as they pass.

        Raises:
            UserError: a row is at fault, a filter keeps nothing, or no task is left.
        """
        counts.filters = self.filters()
        yield from islice(self._kept(rows, counts), self.limit)
        if counts.kept == 0:
            _check_fruitful(counts.filters)
            raise UserError(
                f"the prompt source has no task: {counts}",
                "Check its path, holdout, skip and limit." if counts.rows else "It is empty.",
            )

    def _kept(self, rows: Iterable[Row | Task], counts: Counts) -> Iterator[Task]:
        seen: set[str] = set()
        for row in rows:
            counts.rows += 1
            place = f"task {counts.rows}"
            if counts.filters and not _stays(row, place, counts):
                continue
            candidate = self.build.build(row, place=place)
            if not self._in_part(candidate):
                counts.other_part += 1
            elif candidate.prompt_key in seen:
                counts.duplicates += 1
            else:
                if self.deduplicate:
                    seen.add(candidate.prompt_key)
                if counts.skipped < self.skip:
                    counts.skipped += 1
                else:
                    counts.kept += 1
                    yield candidate.task

    def _in_part(self, candidate: Candidate) -> bool:
        if self.holdout is None:
            return True
        fraction, part, seed = self.holdout
        in_test = in_test_part(candidate.source_key, fraction=fraction, seed=seed)
        return in_test == (part == "test")


def _stays(row: Row | Task, place: str, counts: Counts) -> bool:
    seen = as_row(row, place)
    if all(stays(seen) for stays in counts.filters):
        return True
    if counts.rows == _FRUITLESS_ROWS:
        _check_fruitful(counts.filters)
    return False


def _check_fruitful(filters: Sequence[Filter]) -> None:
    for entry in filters:
        if entry.reached and not entry.kept:
            raise entry.fruitless()
