"""`load_tasks`: a prompt source as tasks, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from retrain.config.data import (
    FileSourceConfig,
    FilterConfig,
    HFDatasetSourceConfig,
    HoldoutConfig,
    ListSourceConfig,
    MixtureSourceConfig,
    PromptSourceConfig,
    PythonSourceConfig,
    ReasoningGymSourceConfig,
    SingleSourceConfig,
    SourceSection,
    StreamableSection,
)
from retrain.data.buffer import DEFAULT_BUFFER
from retrain.data.curriculum import CurriculumSource
from retrain.data.files import Row, read_files, refuse_json, row_of
from retrain.data.filters import Filter, column_filter, function_filter
from retrain.data.functions import call_for_rows
from retrain.data.hub import read_dataset
from retrain.data.mixture import MixtureSource, Part
from retrain.data.order import TaskList, TaskSource, TaskStream
from retrain.data.reasoning_gym import read_reasoning_gym
from retrain.data.selection import Counts, Selection
from retrain.data.tasks import TaskBuilder
from retrain.types import Task, UserError

__all__ = ["TaskSource", "load_tasks"]


def load_tasks(source: PromptSourceConfig, *, seed: int) -> TaskSource:
    """The tasks of a prompt source; `seed` orders each epoch.

    Everything is read and checked now, unless the source streams.

    Raises:
        UserError: the data is missing, malformed or empty, or does not fit the column mapping.
    """
    if not isinstance(source, MixtureSourceConfig):
        return _load(source, seed=seed)
    parts = {}
    for part in source.sources:
        try:
            parts[part.name] = Part(_load(part.source, seed=seed, name=part.name), part.weight)
        except UserError as error:
            raise UserError(f"source {part.name}: {error.cause}", error.next_step) from error
    return MixtureSource(parts)


def _load(source: SingleSourceConfig, *, seed: int, name: str | None = None) -> TaskSource:
    """`name`: of the part of a mixture that it is."""
    read = _reader(source, seed)
    order = seed if name is None else f"{seed}:{name}"
    filters = source.filters
    selection = Selection(
        build=_builder(source, name),
        holdout=_holdout(source.holdout),
        deduplicate=source.deduplicate,
        skip=source.skip,
        limit=source.limit,
        filters=lambda: [_filter(f"filters.{i}", entry) for i, entry in enumerate(filters)],
    )
    if isinstance(source, StreamableSection) and source.streaming:
        buffer = (source.shuffle_buffer or DEFAULT_BUFFER) if source.shuffle else None
        return TaskStream(read, selection, shuffle_buffer=buffer, seed=order)
    counts = Counts()
    tasks = list(selection.tasks(read(), counts))
    if (curriculum := source.curriculum) is None:
        return TaskList(tasks, counts, shuffle=source.shuffle, seed=order)
    return CurriculumSource(
        tasks,
        counts,
        column=curriculum.column,
        window=curriculum.window,
        min_weight=curriculum.min_weight,
        success_reward=curriculum.success_reward,
        success_threshold=curriculum.success_threshold,
        shuffle=source.shuffle,
        seed=order,
    )


def _filter(place: str, entry: FilterConfig) -> Filter:
    if entry.function is not None:
        return function_filter(entry.function, entry.params, place=place)
    assert entry.column is not None
    return column_filter(entry.column, place=place, **entry.conditions())


def _builder(source: SourceSection, name: str | None) -> TaskBuilder:
    return TaskBuilder(
        prompt_column=source.prompt_column,
        answer_column=source.answer_column,
        id_column=source.id_column,
        messages_column=source.messages_column,
        metadata_columns=source.metadata_columns,
        system_prompt=source.system_prompt,
        prompt_template=source.prompt_template,
        content_ids=source.deduplicate,
        constants=source.metadata if name is None else {**source.metadata, "source": name},
        id_prefix="" if name is None else f"{name}:",
    )


def _holdout(holdout: HoldoutConfig | None) -> tuple[float, str, int] | None:
    return None if holdout is None else (holdout.fraction, holdout.part, holdout.seed)


def _reader(source: SingleSourceConfig, seed: int) -> Callable[[], Iterable[Row | Task]]:
    """What opens a source's rows from the start."""
    match source:
        case ListSourceConfig():
            return lambda: _numbered(source.prompts, "prompts")
        case FileSourceConfig():
            if source.streaming:
                refuse_json(source.path, source.format)
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


def _numbered(values: Iterable[Any], name: str) -> Iterator[Row | Task]:
    for number, value in enumerate(values):
        yield value if isinstance(value, Task) else row_of(value, f"{name}[{number}]")
