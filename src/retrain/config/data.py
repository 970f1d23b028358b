"""`prompt_source`: where tasks come from, and how a row becomes one."""

from __future__ import annotations

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


class SourceSection(Section):
    """What every source understands.

    Rows are mapped, then held out, then deduplicated, then cut by `skip` and `limit` in the
    order of the source, then shuffled.
    """

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
    """The dataset's own split, as the hub names it."""


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


PromptSourceConfig = Annotated[
    ListSourceConfig
    | FileSourceConfig
    | HFDatasetSourceConfig
    | ReasoningGymSourceConfig
    | PythonSourceConfig,
    Field(discriminator="type"),
]
