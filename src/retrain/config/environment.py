"""`environment`: what the policy acts in, with which tools, and how it calls them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section
from retrain.config.model import ModelConfig
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

    With one tool the text between the tags is its first argument. With several it is a JSON
    object `{"name": ..., "arguments": {...}}`.
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


class ToolEnvironmentConfig(Section):
    """`smolagent`: a conversation with tools, until the model answers without calling one."""

    type: Literal["smolagent"] = "smolagent"
    tools: list[str | ToolConfig] = Field(default_factory=list)
    """Names or import paths, or mappings with `name` and `params`."""
    tool_format: ToolFormatConfig = Field(default_factory=TagsFormat)
    """How calls are written and results put back."""
    max_steps: int = Field(10, ge=1)
    """Most MODEL turns of a rollout."""
    tool_timeout_s: float = Field(30.0, gt=0)
    """Of one attempt at a call, unless the tool has a `timeout_s` of its own."""
    tool_retries: int = Field(2, ge=0)
    """Of a call whose infrastructure failed."""
    max_output_chars: int = Field(4000, ge=16)
    """Of one tool result; the middle is left out."""
    max_tool_calls: int | None = Field(None, ge=1)
    """Of a rollout, all tools together; a further one is answered with that."""
    tools_column: str | None = None
    """A column of the prompt source that lists the names of the tools that a task has; by default
    each has all."""
    describe_tools: bool = False
    """Open with a system message about the tools and how to call them (tags and fenced)."""

    @model_validator(mode="after")
    def _tools_to_act_on(self) -> ToolEnvironmentConfig:
        keys = [key for key in type(self).model_fields if key not in ("type", "tools")]
        if not self.tools and (idle := self.changed(*keys)):
            raise ValueError(
                f"{' and '.join(idle)}: nothing to act on, since the environment has no tools; "
                "list some under tools, or use type: qa"
            )
        return self

    @model_validator(mode="after")
    def _native_describes(self) -> ToolEnvironmentConfig:
        if self.describe_tools and self.tool_format.type == "native":
            raise ValueError(
                "describe_tools does nothing with native tool calls: the chat template "
                "describes the tools itself"
            )
        return self

    def tool_list(self) -> list[ToolConfig]:
        return [ToolConfig(name=t) if isinstance(t, str) else t for t in self.tools]


class QAConfig(Section):
    """`qa`: one question, one answer."""

    type: Literal["qa"] = "qa"


class ScriptedUser(Section):
    type: Literal["scripted"] = "scripted"
    replies: list[str] = Field(default_factory=list)
    """What the user says, in order, in every rollout."""
    replies_column: str | None = None
    """A column of the prompt source that holds each task's own list of replies."""

    @model_validator(mode="after")
    def _one_source(self) -> ScriptedUser:
        if bool(self.replies) == (self.replies_column is not None):
            raise ValueError("set exactly one of replies and replies_column")
        return self


class ModelUser(Section):
    type: Literal["model"] = "model"
    model: ModelConfig
    """Loaded beside the policy; it never trains."""
    system_prompt: str
    """A format string over the task's columns, `{prompt}` and `{answer}` among them."""
    max_new_tokens: int = Field(128, ge=1)
    """Of one reply."""
    temperature: float = Field(1.0, ge=0)
    """Of its sampling; 0 is greedy."""


class EndpointUser(Section):
    """`openai`: a model behind an OpenAI-compatible chat endpoint."""

    type: Literal["openai"] = "openai"
    url: str
    """The API's base, such as `https://api.openai.com/v1`."""
    model: str
    """As the endpoint names it."""
    api_key_env: str | None = None
    """The environment variable that holds the key. The key itself has no place in a config."""
    system_prompt: str
    """A format string over the task's columns, `{prompt}` and `{answer}` among them."""
    max_new_tokens: int = Field(128, ge=1)
    """Of one reply."""
    temperature: float = Field(1.0, ge=0)
    """Of its sampling; 0 is greedy."""
    timeout_s: float = Field(60.0, gt=0)
    """Of one attempt at a reply."""
    retries: int = Field(3, ge=0)
    """Further attempts where the endpoint fails or is busy; after them the rollout's attempt has
    failed."""
    max_concurrency: int = Field(16, ge=1)
    """Most requests at once; further ones wait for their turn."""

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(  # without the value, which may be a key
                "not the name of an environment variable; name the one that holds the key"
            )
        return name


class DialogueConfig(Section):
    """`dialogue`: turns between the policy and a simulated user."""

    type: Literal["dialogue"] = "dialogue"
    user: Annotated[ScriptedUser | ModelUser | EndpointUser, Field(discriminator="type")]
    """Who answers the policy."""
    max_turns: int = Field(10, ge=1)
    """Most MODEL turns of a rollout."""
    stop_phrase: str | None = None
    """A user reply that contains it ends the dialogue."""


class PythonEnvironmentConfig(Section):
    """`python`: an Environment of your own, by import path."""

    type: Literal["python"] = "python"
    path: str
    """`pkg.module:Class` or `path/to/file.py:Class`, a subclass of `retrain.Environment`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""


EnvironmentConfig = Annotated[
    ToolEnvironmentConfig | QAConfig | DialogueConfig | PythonEnvironmentConfig,
    Field(discriminator="type"),
]
