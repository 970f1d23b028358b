"""A source whose tasks are drawn by what the policy makes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrain.data.cursor import Cursor, Position
from retrain.data.mixture import Turns
from retrain.data.order import Succeeded, TaskList
from retrain.data.selection import Counts
from retrain.types import Rollout, Task, UserError

_MOST_LEVELS = 100


def weight(successes: int, rollouts: int, *, least: float) -> float:
    """How much a level is worth drawing: 4 p (1 - p), the variance of a success as a share of the
    greatest, for the mean p of its posterior under a uniform prior; at least `least`.

    Before anything is measured it is 1. A group all of whose rollouts succeed or fail teaches
    nothing, and groups of a level at p = 1/2 do so least often (learnability, Foster et al., 2025,
    arXiv:2502.12272).
    """
    p = (successes + 1) / (rollouts + 2)
    return max(4 * p * (1 - p), least)


class CurriculumSource:
    """Tasks by the value of a metadata column, their level.

    Args:
        window: latest rollouts of a level that its success is measured over.
        min_weight: least weight of a level, in (0, 1].
        success_reward, success_threshold: handed to `Succeeded`.

    Raises:
        UserError: a task has no such column, all have one level, or there are too many of them.
    """

    def __init__(
        self,
        tasks: list[Task],
        counts: Counts,
        *,
        column: str,
        window: int,
        min_weight: float,
        success_reward: str | None,
        success_threshold: float | None,
        shuffle: bool,
        seed: int | str,
    ) -> None:
        self._tasks = TaskList(tasks, counts, shuffle=shuffle, seed=seed)
        self._column = column
        self._window = window
        self._min_weight = min_weight
        self._success = (success_reward, success_threshold)
        of = _by_level(tasks, column)
        self._levels = {
            level: TaskList(of[level], counts, shuffle=shuffle, seed=f"{seed}:{level}")
            for level in sorted(of)
        }

    def epoch(self, n: int) -> Iterator[Task]:
        return self._tasks.epoch(n)

    def __len__(self) -> int:
        return len(self._tasks)

    def known(self) -> Iterator[Task]:
        return self._tasks.known()

    def cursor(self, place: str) -> CurriculumCursor:
        return CurriculumCursor(
            self._levels,
            place=place,
            column=self._column,
            window=self._window,
            min_weight=self._min_weight,
            success_reward=self._success[0],
            success_threshold=self._success[1],
        )

    def summary(self) -> str:
        first, *rest = self._tasks.summary().splitlines()
        sizes = ", ".join(f"{level} ({len(own):,})" for level, own in self._levels.items())
        return "\n".join([first, f"curriculum by {self._column}: {sizes}", *rest])


def _by_level(tasks: Sequence[Task], column: str) -> dict[str, list[Task]]:
    of: dict[str, list[Task]] = {}
    for task in tasks:
        if task.metadata.get(column) is None:
            raise UserError(
                f"curriculum.column: task {task.id} has no metadata {column!r}",
                f"It has: {', '.join(sorted(task.metadata)) or 'none'}.",
            )
        of.setdefault(str(task.metadata[column]), []).append(task)
    if not 1 < len(of) <= _MOST_LEVELS:
        raise UserError(
            f"curriculum.column: {column!r} has {len(of):,} different values in {len(tasks):,} "
            f"tasks, and a curriculum needs from 2 to {_MOST_LEVELS} levels",
            "Choose a column that says how hard a task is, in few steps.",
        )
    return of


class Window:
    """The latest outcomes, at most `size`."""

    def __init__(self, size: int) -> None:
        self._outcomes: deque[bool] = deque()
        self._size = size
        self.successes = 0

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[bool]:
        return iter(self._outcomes)

    def add(self, won: bool) -> None:
        if len(self._outcomes) == self._size:
            self.successes -= self._outcomes.popleft()
        self._outcomes.append(won)
        self.successes += won

    def replace(self, outcomes: Iterable[bool]) -> None:
        self._outcomes.clear()
        self.successes = 0
        for won in outcomes:
            self.add(won)


@dataclass
class Draw:
    """One draw, and through `next` those after it. The last one is still to be made.

    Nothing but marks refers to the draws before the last, so that what is kept of them reaches
    back to the oldest mark that somebody holds.
    """

    number: int
    level: str = ""
    before: Position | None = None
    """Where the level stood."""
    next: Draw | None = None


class CurriculumCursor:
    """Chooses a level, and takes the next of its tasks.

    Which level comes depends on the draws before and on what was observed before; nothing is
    drawn at random but the order within a level. A level that was chosen stays chosen: tasks that
    were drawn and not trained on when a run stopped are drawn again, whatever was measured since.
    """

    def __init__(
        self,
        levels: Mapping[str, TaskList],
        *,
        place: str,
        column: str,
        window: int,
        min_weight: float,
        success_reward: str | None,
        success_threshold: float | None,
    ) -> None:
        self._cursors = {name: Cursor(own, place=place) for name, own in levels.items()}
        self._sizes = {name: len(own) for name, own in levels.items()}
        self._level_of = {task.id: name for name, own in levels.items() for task in own.known()}
        self._place = place
        self._column = column
        self._min_weight = min_weight
        self._success = (success_reward, success_threshold)
        self._turns = Turns(levels)
        self._measured = {name: Window(window) for name in levels}
        self._ahead: deque[str] = deque()
        """Levels that were chosen for the next draws."""
        self._draw = Draw(0)

    def __iter__(self) -> CurriculumCursor:
        return self

    def __next__(self) -> tuple[int, Task]:
        if not self._ahead:
            shares = self.shares()
            level = self._turns.next(shares)
            self._turns.take(level, shares)
            self._ahead.append(level)
        level = self._ahead[0]
        before = self._cursors[level].position()
        drawn = next(self._cursors[level])
        self._ahead.popleft()
        made, self._draw = self._draw, Draw(self._draw.number + 1)
        made.level, made.before, made.next = level, before, self._draw
        return drawn

    def shares(self) -> dict[str, float]:
        """Of the tasks that are drawn next, by level; they sum to 1."""
        weights = {
            name: size * weight(seen.successes, len(seen), least=self._min_weight)
            for (name, size), seen in zip(self._sizes.items(), self._measured.values(), strict=True)
        }
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def position(self) -> dict[str, Any]:
        return self.rewound(self.mark())

    def mark(self) -> Draw:
        return self._draw

    def rewound(self, mark: Draw) -> dict[str, Any]:
        again: list[str] = []
        earliest: dict[str, Position] = {}
        draw = mark
        while draw.next is not None:
            assert draw.before is not None
            again.append(draw.level)
            earliest.setdefault(draw.level, draw.before)
            draw = draw.next
        return {
            "drawn": mark.number,
            "levels": {
                name: earliest.get(name) or cursor.position()
                for name, cursor in self._cursors.items()
            },
            "chosen": [*again, *self._ahead],
            "credit": dict(self._turns.credit),
            "measured": {
                name: "".join("01"[won] for won in seen) for name, seen in self._measured.items()
            },
        }

    def restore(self, position: Position) -> None:
        before = position["levels"]
        if before.keys() != self._cursors.keys():
            raise UserError(
                f"{self._place}: the data is not what the run was trained on: levels were "
                f"{', '.join(sorted(before))} and are {', '.join(self._cursors)} now",
                "Put the data back as it was, or start a new run.",
            )
        for name, cursor in self._cursors.items():
            cursor.restore(before[name])
        self._draw = Draw(position["drawn"])
        self._ahead = deque(position["chosen"])
        self._turns.credit = {name: position["credit"][name] for name in self._cursors}
        for name, seen in self._measured.items():
            seen.replace(won == "1" for won in position["measured"][name])

    def observe(self, rollouts: Sequence[Rollout], succeeded: Succeeded) -> None:
        """Those that were masked, that do not train, or that an environment gave another task
        measure nothing."""
        for rollout in rollouts:
            if rollout.error is None and rollout.trainable and rollout.task is not None:
                level = self._level_of.get(rollout.task.id)
                if level is not None:
                    self._measured[level].add(succeeded(rollout, *self._success))

    def metrics(self, source: str = "") -> dict[str, float]:
        """Of each level its share of the tasks drawn next, and its measured success."""
        metrics: dict[str, float] = {}
        inside = f"{source}/" if source else ""
        for name, share in self.shares().items():
            label = f"curriculum/{inside}{self._column}={name}"
            metrics[f"{label}/share"] = share
            if seen := self._measured[name]:
                metrics[f"{label}/success"] = seen.successes / len(seen)
        return metrics
