"""Tools by name, and how calls of them are written and results put back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retrain.config.base import Section
from retrain.types import TagConfig


class ToolConfig(Section):
    """A tool by name (`python`) or import path (`pkg.module:name`, `tools.py:name`)."""

    name: str
    """A built-in name or an import path."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the built-in tool, or of the constructor of a tool class."""
    max_calls: int | None = Field(None, ge=1)
    """Of a rollout; a further one is answered with that. Of each tool, where the name stands for
    several."""


class TagsFormat(Section):
    """A call is written between two tags, and its result put back between two others.

    Where a task has one tool, the text between the tags is its first argument. With several, or
    where the tool needs more than one argument, it is a JSON object
    `{"name": ..., "arguments": {...}}`, which always names a tool.
    """

    type: Literal["tags"] = "tags"
    tool_start: str = TagConfig.tool_start
    """Opens a call."""
    tool_end: str = TagConfig.tool_end
    """Closes a call; generation stops there."""
    response_start: str = TagConfig.response_start
    """Put before a result."""
    response_end: str = TagConfig.response_end
    """Put after a result."""
    answer_end: str | None = Field(None, min_length=1)
    """A closing tag at which generation stops too, such as `</answer>`."""

    def tags(self) -> TagConfig:
        return TagConfig(self.tool_start, self.tool_end, self.response_start, self.response_end)

    @model_validator(mode="after")
    def _valid_tags(self) -> TagsFormat:
        self.tags()
        return self


class FencedFormat(Section):
    """A call is a fenced code block of `language`; its result is a fenced block of `output`."""

    type: Literal["fenced"] = "fenced"
    language: str = Field("python", pattern=r"^[\w+-]+$")
    """Label of the blocks that are calls."""
    output: str = Field("output", pattern=r"^[\w+-]+$")
    """Label of the blocks that hold results."""


class NativeFormat(Section):
    """The calls that the tokenizer's own chat template writes."""

    type: Literal["native"] = "native"


ToolFormatConfig = Annotated[TagsFormat | FencedFormat | NativeFormat, Field(discriminator="type")]
