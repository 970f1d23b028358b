"""`prompt_source`: where tasks come from, and how a row becomes one."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from retrain.config.base import Section

FileFormat = Literal["auto", "txt", "json", "jsonl", "csv", "parquet"]


def template_columns(template: str) -> tuple[str, ...]:
    """Names of the columns that a format string asks for, in order of appearance.

    Raises:
        ValueError: the braces do not match, or a field is not a plain column name.
    """
    columns: list[str] = []
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or (spec and "{" in spec):
            raise ValueError(
                f"{{{name}}} is not a column name; write a literal brace as {{{{ or }}}}"
            )
        columns.append(name)
    return tuple(dict.fromkeys(columns))


class HoldoutConfig(Section):
    """One part of a deterministic split by content.

    A row's part depends on its own prompt (before template and system prompt) and `seed` only:
    two sources with the same `fraction` and `seed` and different `part`s never share a prompt,
    and adding rows moves none.
    """

    fraction: float = Field(0.25, gt=0.0, lt=1.0)
    """Expected share of prompts in the test part."""
    part: Literal["train", "test"]
    """Which side of the split this source gives."""
    seed: int = 0
    """Of the split; not the run's."""


class FilterConfig(Section):
    """Conditions that a row must meet to stay, all of them.

    They see the row as the source gives it, before columns are mapped. A value that is null meets
    `one_of` and `none_of` only, by what they list.
    """

    column: str | None = None
    """The column that the conditions are about, dotted into nested ones: `extra_info.level`."""
    one_of: list[Any] | None = Field(None, min_length=1)
    """Values that stay; text and number are one value where they read alike, as in CSV."""
    none_of: list[Any] | None = Field(None, min_length=1)
    """Values that do not stay."""
    min: float | None = Field(None, allow_inf_nan=False)
    """Least number; text is read as one."""
    max: float | None = Field(None, allow_inf_nan=False)
    """Greatest number; text is read as one."""
    min_chars: NonNegativeInt | None = None
    """Fewest characters of a text."""
    max_chars: NonNegativeInt | None = None
    """Most characters of a text."""
    matches: str | None = None
    """A regular expression that is found somewhere in the text."""
    function: str | None = None
    """`pkg.module:name`: called with a row as a dict, returns whether it stays."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    @field_validator("matches")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        asked = self.conditions()
        if (self.column is None) == (self.function is None):
            raise ValueError("a filter has either column, with conditions, or function")
        if self.function is not None and asked:
            raise ValueError(f"{', '.join(asked)}: has no effect with function: drop one")
        if self.function is None and self.params:
            raise ValueError("params has no effect without function")
        if self.column is not None and not asked:
            raise ValueError(
                f"asks nothing of column {self.column}; one of: {', '.join(_CONDITIONS)}"
            )
        for low, high in ((self.min, self.max), (self.min_chars, self.max_chars)):
            if low is not None and high is not None and low > high:
                raise ValueError(f"no value is at least {low:g} and at most {high:g}")
        return self

    def conditions(self) -> dict[str, Any]:
        """Those that are given, by key."""
        return self.model_dump(include=set(_CONDITIONS), exclude_none=True)


_CONDITIONS = ("one_of", "none_of", "min", "max", "min_chars", "max_chars", "matches")


class CurriculumConfig(Section):
    """Tasks of a level are drawn more often the closer its measured success is to one half.

    A level's share of the tasks drawn is its number of tasks times `max(4 p (1 - p), min_weight)`,
    where p = (successes + 1) / (rollouts + 2) over its latest `window` rollouts. Within a level
    every task comes once before any comes again.
    """

    column: str = Field(min_length=1)
    """The metadata column whose values are the levels."""
    window: PositiveInt = 64
    """Latest rollouts of a level that its success is measured over."""
    min_weight: float = Field(0.1, gt=0.0, le=1.0)
    """Least weight of a level, where 1 is that of a success of one half."""
    success_reward: str | None = None
    """The reward whose raw value decides success; null: the total reward."""
    success_threshold: float | None = Field(None, allow_inf_nan=False)
    """The value from which on a rollout is a success. With both of these null success is that of
    section `evaluation`, or a total reward of at least 1 where there is none."""


class SourceSection(Section):
    """What every source understands.

    Rows are filtered, then mapped, then held out, then deduplicated, then cut by `skip` and
    `limit` in the order of the source, then shuffled. A column `a.b` is the column of that name, or
    else b inside a.
    """

    filters: list[FilterConfig] = Field(default_factory=list)
    """What a row must meet to stay, in this order."""

    prompt_column: str = "prompt"
    """The user's message; a bare string in place of a row is its prompt."""
    answer_column: str | None = "answer"
    """Becomes `Task.answer`. The default may be absent from a row; any other name must be there."""
    id_column: str | None = None
    """Becomes `Task.id`; by default the id is a hash of the prompt."""
    messages_column: str | None = None
    """A column of OpenAI-style messages that is the whole prompt, instead of `prompt_column`."""
    metadata_columns: list[str] | None = None
    """Become `Task.metadata`; by default every column that is used for nothing else."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Constants that are added to the metadata of each task."""
    system_prompt: str | None = None
    """Opens every prompt."""
    prompt_template: str | None = None
    """A format string of column names; `{prompt}` is the value of `prompt_column`."""
    skip: NonNegativeInt = 0
    """Tasks left out at the start."""
    limit: PositiveInt | None = None
    """Most tasks kept; null keeps all."""
    shuffle: bool = True
    """A new order in every epoch, from the run's seed."""
    deduplicate: bool = True
    """Keep the first of the rows that render to one prompt."""
    holdout: HoldoutConfig | None = None
    """Keep one part of a split, so that training and evaluation share no prompt."""
    curriculum: CurriculumConfig | None = None
    """Draw tasks by measured success; needs all of them in memory."""

    @field_validator("prompt_template")
    @classmethod
    def _template_parses(cls, template: str | None) -> str | None:
        if template is not None and not template_columns(template):
            raise ValueError("names no column, so that every prompt would be the same")
        return template

    @field_validator("system_prompt")
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; leave the key out for no system prompt")
        return text

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.messages_column is not None:
            if self.prompt_template is not None:
                raise ValueError("prompt_template has no effect with messages_column: drop one")
            if self.prompt_column != "prompt":
                raise ValueError("prompt_column has no effect with messages_column: drop one")
        return self


class StreamableSection(SourceSection):
    streaming: bool = False
    """Read row by row in every epoch. `deduplicate` still keeps one hash per row."""
    shuffle_buffer: PositiveInt | None = None
    """Rows among which a stream is shuffled; 1,000 by default."""

    @model_validator(mode="after")
    def _buffer_acts(self) -> Self:
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle):
            raise ValueError("shuffle_buffer acts only with streaming: true and shuffle: true")
        return self

    @model_validator(mode="after")
    def _levels_are_known(self) -> Self:
        if self.streaming and self.curriculum is not None:
            raise ValueError("curriculum needs every task in memory: set streaming: false")
        return self


class ListSourceConfig(SourceSection):
    type: Literal["list"]
    prompts: list[str | dict[str, Any]] = Field(min_length=1)
    """Strings, or rows with columns."""


class FileSourceConfig(StreamableSection):
    """A data file, or a directory whose data files are read in order of their names.

    `auto` goes by the suffix. A txt file has one prompt per line. JSON cannot be streamed.
    """

    type: Literal["file"]
    path: str = Field(min_length=1)
    """Relative to the working directory."""
    format: FileFormat = "auto"
    """`auto` goes by the suffix."""


class HFDatasetSourceConfig(StreamableSection):
    """A hub id, a directory of data files, or what `Dataset.save_to_disk` wrote."""

    type: Literal["hf_dataset"]
    path: str = Field(min_length=1)
    """A hub id or a directory."""
    name: str | None = None
    """The dataset's configuration, for datasets that have several."""
    split: str = Field("train", min_length=1)
    """The dataset's own split, or a part of it: `train[:100]`, `train[80%:]`, `train+test`. A
    stream can be cut at rows only."""


class ReasoningGymSourceConfig(SourceSection):
    """Generated tasks of reasoning-gym; `retrain.data.reasoning_gym:score` is their reward.

    Rows have the columns prompt, answer and entry. Item i is drawn from seed + i, so two seeds
    close together share tasks: use `holdout` to keep evaluation apart from training.
    """

    type: Literal["reasoning_gym"]
    dataset: str = Field(min_length=1)
    """Its name in reasoning-gym."""
    size: PositiveInt = 500
    """Tasks generated."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Passed to the dataset; `seed` is the run's unless it is given here."""

    @field_validator("params")
    @classmethod
    def _size_has_a_key(cls, params: dict[str, Any]) -> dict[str, Any]:
        if "size" in params:
            raise ValueError("size is a key of its own, beside params")
        return params


class PythonSourceConfig(StreamableSection):
    """A callable that returns an iterable of dict rows, strings or `Task`s.

    With `streaming` it is called once per epoch and may return a generator without end.
    """

    type: Literal["python"]
    function: str = Field(min_length=1)
    """`pkg.module:name`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""


SingleSourceConfig = Annotated[
    ListSourceConfig
    | FileSourceConfig
    | HFDatasetSourceConfig
    | ReasoningGymSourceConfig
    | PythonSourceConfig,
    Field(discriminator="type"),
]


class MixturePart(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Opens the ids of its tasks and is their metadata `source`."""
    weight: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """Its share of the tasks drawn is this over the sum of all."""
    source: SingleSourceConfig
    """Any source but another mixture."""

    @field_validator("source", mode="before")
    @classmethod
    def _flat(cls, source: Any) -> Any:
        if isinstance(source, dict) and source.get("type") == "mixture":
            raise ValueError("a mixture inside a mixture: list its sources in the outer one")
        return source


class MixtureSourceConfig(Section):
    """Several sources, interleaved by weight; each goes through epochs of its own.

    The order of sources depends on the weights alone: after any number of tasks each source has
    had its share, to within a task or two. Training has no end; an evaluation asks every task once.
    """

    type: Literal["mixture"]
    sources: list[MixturePart] = Field(min_length=2)
    """What is mixed."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.name for part in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources of a mixture have one name: {', '.join(names)}")
        return self


PromptSourceConfig = Annotated[
    ListSourceConfig
    | FileSourceConfig
    | HFDatasetSourceConfig
    | ReasoningGymSourceConfig
    | PythonSourceConfig
    | MixtureSourceConfig,
    Field(discriminator="type"),
]


def single_sources(
    source: PromptSourceConfig,
) -> list[tuple[str, SourceSection]]:
    """The sources that a mixture holds, or the one that there is, each with its dotted place."""
    if isinstance(source, MixtureSourceConfig):
        return [(f"sources.{i}.source.", part.source) for i, part in enumerate(source.sources)]
    return [("", source)]


def refuse_shares(source: PromptSourceConfig) -> None:
    """
    Raises:
        ValueError: a key that says how often tasks are drawn, where each is asked once.
    """
    if isinstance(source, MixtureSourceConfig) and any(
        part.changed("weight") for part in source.sources
    ):
        raise ValueError("weight has no effect: an evaluation asks every task once")
    for place, single in single_sources(source):
        if single.curriculum is not None:
            raise ValueError(f"{place}curriculum has no effect: an evaluation asks every task once")
