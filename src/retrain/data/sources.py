"""`load_tasks`: a prompt source as tasks, epoch after epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from retrain.config.data import (
    FileSourceConfig,
    HFDatasetSourceConfig,
    HoldoutConfig,
    ListSourceConfig,
    PromptSourceConfig,
    PythonSourceConfig,
    ReasoningGymSourceConfig,
    SourceSection,
    StreamableSection,
)
from retrain.data.files import Row, data_files, read_files, row_of
from retrain.data.functions import call_for_rows
from retrain.data.hub import read_dataset
from retrain.data.reasoning_gym import read_reasoning_gym
from retrain.data.tasks import Candidate, TaskBuilder
from retrain.types import Message, Task, UserError

_DEFAULT_BUFFER = 1000
_EXAMPLE_CHARACTERS = 200


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

    def summary(self) -> str:
        """What was read, kept and left out, and the first task, for a person to check."""
        ...


@dataclass
class Counts:
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
        left_out = [f"{count:,} {reason}" for count, reason in reasons if count]
        return "; ".join([f"{self.rows:,} rows read, {self.kept:,} kept", *left_out])


def in_test_part(source_key: str, *, fraction: float, seed: int) -> bool:
    """Whether a prompt belongs to the test part: a hash, so it depends on nothing else."""
    digest = hashlib.blake2b(
        f"{seed}\0{source_key}".encode("utf-8", "surrogatepass"), digest_size=8
    )
    return int.from_bytes(digest.digest()) < fraction * 2**64


@dataclass(frozen=True)
class Selection:
    """Which rows stay: holdout, then duplicates, then skip and limit, in the source's order."""

    build: TaskBuilder
    holdout: tuple[float, str, int] | None
    """(fraction, part, seed)."""
    deduplicate: bool
    skip: int
    limit: int | None

    def tasks(self, rows: Iterable[Row | Task], counts: Counts) -> Iterator[Task]:
        """Tasks of rows, counted as they pass.

        Raises:
            UserError: a row is at fault, or no task is left.
        """
        yield from islice(self._kept(rows, counts), self.limit)
        if counts.kept == 0:
            raise UserError(
                f"the prompt source has no task: {counts}",
                "Check its path, holdout, skip and limit." if counts.rows else "It is empty.",
            )

    def _kept(self, rows: Iterable[Row | Task], counts: Counts) -> Iterator[Task]:
        seen: set[str] = set()
        for row in rows:
            counts.rows += 1
            candidate = self.build.build(row, place=f"task {counts.rows}")
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


class TaskList:
    """Tasks in memory."""

    def __init__(self, tasks: list[Task], counts: Counts, *, shuffle: bool, seed: int) -> None:
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

    def summary(self) -> str:
        return f"{self._counts}\n{_describe(self._tasks[0])}"


class TaskStream:
    """Tasks read anew in every epoch. That ids are unique is not checked."""

    def __init__(
        self,
        read: Callable[[], Iterable[Row | Task]],
        selection: Selection,
        *,
        shuffle_buffer: int | None,
        seed: int,
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

    def summary(self) -> str:
        first = next(self._selection.tasks(self._read(), Counts()))
        return f"streamed: rows are counted and checked as they are read\n{_describe(first)}"


def shuffled(tasks: Iterable[Task], size: int, generator: random.Random) -> Iterator[Task]:
    """Tasks in a random order, holding `size` of them at a time."""
    held: list[Task] = []
    for task in tasks:
        if len(held) < size:
            held.append(task)
            continue
        i = generator.randrange(size)
        yield held[i]
        held[i] = task
    generator.shuffle(held)
    yield from held


def load_tasks(source: PromptSourceConfig, *, seed: int) -> TaskSource:
    """The tasks of a prompt source; `seed` orders each epoch.

    Everything is read and checked now, unless the source streams.

    Raises:
        UserError: the data is missing, malformed or empty, or does not fit the column mapping.
    """
    streaming = isinstance(source, StreamableSection) and source.streaming
    read = _reader(source, seed)
    selection = Selection(
        build=_builder(source),
        holdout=_holdout(source.holdout),
        deduplicate=source.deduplicate,
        skip=source.skip,
        limit=source.limit,
    )
    if streaming:
        assert isinstance(source, StreamableSection)
        buffer = (source.shuffle_buffer or _DEFAULT_BUFFER) if source.shuffle else None
        return TaskStream(read, selection, shuffle_buffer=buffer, seed=seed)
    counts = Counts()
    tasks = list(selection.tasks(read(), counts))
    return TaskList(tasks, counts, shuffle=source.shuffle, seed=seed)


def _builder(source: SourceSection) -> TaskBuilder:
    return TaskBuilder(
        prompt_column=source.prompt_column,
        answer_column=source.answer_column,
        id_column=source.id_column,
        messages_column=source.messages_column,
        metadata_columns=source.metadata_columns,
        system_prompt=source.system_prompt,
        prompt_template=source.prompt_template,
        content_ids=source.deduplicate,
    )


def _holdout(holdout: HoldoutConfig | None) -> tuple[float, str, int] | None:
    return None if holdout is None else (holdout.fraction, holdout.part, holdout.seed)


def _reader(source: PromptSourceConfig, seed: int) -> Callable[[], Iterable[Row | Task]]:
    """What opens a source's rows from the start."""
    match source:
        case ListSourceConfig():
            return lambda: _numbered(source.prompts, "prompts")
        case FileSourceConfig():
            if source.streaming:
                _refuse_streamed_json(source)
            return lambda: read_files(source.path, source.format)
        case HFDatasetSourceConfig():
            return lambda: read_dataset(
                source.path, name=source.name, split=source.split, streaming=source.streaming
            )
        case ReasoningGymSourceConfig():
            return lambda: read_reasoning_gym(
                source.dataset, size=source.size, seed=seed, params=source.params
            )
        case PythonSourceConfig():
            return lambda: _numbered(
                call_for_rows(source.function, source.params, "prompt source"), source.function
            )


def _refuse_streamed_json(source: FileSourceConfig) -> None:
    if any(kind == "json" for _, kind in data_files(source.path, source.format)):
        raise UserError(
            f"{source.path} is JSON, which can only be read as a whole",
            "Set streaming: false, or convert the file to JSONL.",
        )


def _numbered(values: Iterable[Any], name: str) -> Iterator[Row | Task]:
    for number, value in enumerate(values):
        yield value if isinstance(value, Task) else row_of(value, f"{name}[{number}]")


def _generator(seed: int, epoch: int) -> random.Random:
    return random.Random(f"{seed}:{epoch}")


def _describe(task: Task) -> str:
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
