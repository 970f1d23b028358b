"""Tasks in memory or read row by row, each epoch in its own order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from retrain.data.buffer import shuffled
from retrain.data.cursor import Cursor, Position
from retrain.data.files import Row
from retrain.data.selection import Counts, Selection
from retrain.types import Message, Rollout, Task, UserError

_EXAMPLE_CHARACTERS = 200

Succeeded = Callable[[Rollout, str | None, float | None], bool]
"""Whether a rollout is a success by (a reward's name or the total, a threshold)."""


class TaskCursor(Protocol):
    """(epoch, task) without end. No two that it gives have the same epoch and id."""

    def __iter__(self) -> Iterator[tuple[int, Task]]: ...

    def __next__(self) -> tuple[int, Task]: ...

    def position(self) -> dict[str, Any]:
        """JSON-able; that after the tasks handed out."""
        ...

    def mark(self) -> Any:
        """Where it is now, for `rewound`: for each task that is drawn there may be one."""
        ...

    def rewound(self, mark: Any) -> dict[str, Any]:
        """A position from which the tasks since a mark of this cursor come again, and then those
        that come now."""
        ...

    def restore(self, position: Position) -> None:
        """Go to where another cursor over the same data was.

        Raises:
            UserError: the data has changed.
        """
        ...

    def observe(self, rollouts: Sequence[Rollout], succeeded: Succeeded) -> None:
        """What became of tasks, in their order, at the end of a step."""
        ...

    def metrics(self, source: str = "") -> dict[str, float]:
        """What decides which tasks come next; `source` names the part of a mixture."""
        ...


class TaskSource(Protocol):
    """Tasks, as often as wanted. Epoch n is the same sequence whenever it is asked for, so that
    a run resumes by passing over the tasks it has done."""

    def epoch(self, n: int) -> Iterator[Task]: ...

    def __len__(self) -> int:
        """Tasks in an epoch.

        Raises:
            TypeError: the source is a stream; it is not known before its end.
        """
        ...

    def known(self) -> Iterator[Task]:
        """The tasks of epoch 0 that are in memory: none of a stream."""
        ...

    def cursor(self, place: str) -> TaskCursor:
        """What a training stage draws its tasks from; `place` names the source in messages."""
        ...

    def summary(self) -> str:
        """What was read, kept and left out, and the first task, for a person to check."""
        ...


class TaskList:
    """Tasks in memory."""

    def __init__(
        self, tasks: list[Task], counts: Counts, *, shuffle: bool, seed: int | str
    ) -> None:
        ids: set[str] = set()
        for task in tasks:
            if task.id in ids:
                raise UserError(
                    f"two tasks have the id {task.id!r}",
                    "An id names one task: choose another id_column, or leave it out.",
                )
            ids.add(task.id)
        self._tasks = tasks
        self._counts = counts
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return len(self._tasks)

    def epoch(self, n: int) -> Iterator[Task]:
        order = list(range(len(self._tasks)))
        if self._shuffle:
            _generator(self._seed, n).shuffle(order)
        return (self._tasks[i] for i in order)

    def known(self) -> Iterator[Task]:
        return self.epoch(0)

    def cursor(self, place: str) -> Cursor[Task]:
        return Cursor(self, place=place)

    def summary(self) -> str:
        return f"{self._counts}\n{describe(self._tasks[0])}"


class TaskStream:
    """Tasks read anew in every epoch. That ids are unique is not checked."""

    def __init__(
        self,
        read: Callable[[], Iterable[Row | Task]],
        selection: Selection,
        *,
        shuffle_buffer: int | None,
        seed: int | str,
    ) -> None:
        self._read = read
        self._selection = selection
        self._buffer = shuffle_buffer
        self._seed = seed

    def __len__(self) -> int:
        raise TypeError("a streamed prompt source has no length")

    def epoch(self, n: int) -> Iterator[Task]:
        tasks = self._selection.tasks(self._read(), Counts())
        if self._buffer is None:
            return tasks
        return shuffled(tasks, self._buffer, _generator(self._seed, n))

    def known(self) -> Iterator[Task]:
        return iter(())

    def cursor(self, place: str) -> Cursor[Task]:
        return Cursor(self, place=place)

    def summary(self) -> str:
        first = next(self._selection.tasks(self._read(), Counts()))
        return f"streamed: rows are counted and checked as they are read\n{describe(first)}"


def _generator(seed: int | str, epoch: int) -> random.Random:
    return random.Random(f"{seed}:{epoch}")


def describe(task: Task) -> str:
    lines = [f"first task {task.id}:"]
    lines += [f"  {message.role or message.type}: {_short(message)}" for message in task.prompt]
    if task.answer is not None:
        lines.append(f"  answer: {task.answer!r}")
    if task.metadata:
        lines.append(f"  metadata: {', '.join(task.metadata)}")
    return "\n".join(lines)


def _short(message: Message) -> str:
    text = message.content
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS] + " ..."
