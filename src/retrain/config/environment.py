"""`environment`: what the policy acts in, with which tools, and how it calls them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retrain.config.adapters import GymnasiumConfig, OpenEnvConfig, VerifiersConfig
from retrain.config.agents import AgentsConfig
from retrain.config.base import Section
from retrain.config.external import ExternalConfig
from retrain.config.formats import TagsFormat, ToolConfig, ToolFormatConfig
from retrain.config.users import EndpointUser, ModelUser, ScriptedUser


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
    ToolEnvironmentConfig
    | QAConfig
    | DialogueConfig
    | AgentsConfig
    | GymnasiumConfig
    | OpenEnvConfig
    | VerifiersConfig
    | ExternalConfig
    | PythonEnvironmentConfig,
    Field(discriminator="type"),
]
