"""`environment` of other packages: Gymnasium, OpenEnv, verifiers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from retrain.config.base import Section
from retrain.config.formats import ToolFormatConfig


class GymnasiumConfig(Section):
    """`gymnasium`: a text environment with Gymnasium's interface.

    Its `reset` is given the columns `seed` and `options` of the prompt source; without a `seed` it
    follows from the task, so that the rollouts of a group begin alike.
    """

    type: Literal["gymnasium"] = "gymnasium"
    id: str = Field(min_length=1)
    """What `gymnasium.make` knows (`Name-v0`, `pkg.module:Name-v0`), or the import path of a class
    (`pkg.module:Class`, `path/to/file.py:Class`)."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of `gymnasium.make`, or of the class."""
    action: Literal["text", "number", "choice"] = "text"
    """What the model's words become: themselves, numbers of the shape of the action space, or the
    place of a name among `choices`."""
    choices: list[str] = Field(default_factory=list)
    """Names of a Discrete space's actions, in their order, for `action: choice`."""
    action_pattern: str | None = None
    """A regular expression; the first group of its last match is the action. By default the last
    line is."""
    observation_field: str | None = None
    """The entry to show, where an observation is a mapping; by default `text`, or all as JSON."""
    observations: list[str] = Field(default_factory=list)
    """What to show for each number of a Discrete observation space, in their order."""
    max_steps: int = Field(10, ge=1)
    """Most MODEL turns of a rollout."""
    invalid_reward: float = Field(0.0, allow_inf_nan=False)
    """Of a turn whose words are no action; the model reads why."""

    @model_validator(mode="after")
    def _choices_act(self) -> GymnasiumConfig:
        if (self.action == "choice") != bool(self.choices):
            raise ValueError("choices and action: choice need each other")
        if self.observations and self.observation_field is not None:
            raise ValueError("observations are numbers, which have no observation_field")
        return self


class OpenEnvConfig(Section):
    """`openenv`: an environment behind an OpenEnv server, a session a rollout.

    Its `reset` is given the columns `seed` and `options` of the prompt source; without a `seed` it
    follows from the task, so that the rollouts of a group begin alike.
    """

    type: Literal["openenv"] = "openenv"
    url: str = Field(pattern=r"^(http|ws)s?://.")
    """The server's, such as `http://127.0.0.1:8000`."""
    client: str | None = None
    """Import path of the environment's `EnvClient`; by default OpenEnv's generic one."""
    action: str | None = None
    """Import path of the client's action class; by default an action is a mapping."""
    action_field: str | None = "message"
    """The action's field that takes the model's words; null reads them as a JSON object."""
    action_pattern: str | None = None
    """A regular expression; the first group of its last match is the action. By default the last
    line is."""
    observation_field: str | None = None
    """The field to show; by default `text`, or all as JSON."""
    tool_format: ToolFormatConfig | None = None
    """For an environment of MCP tools: how the model writes calls. A call is then an action, and
    words without one end the rollout."""
    max_steps: int = Field(10, ge=1)
    """Most MODEL turns of a rollout."""
    invalid_reward: float = Field(0.0, allow_inf_nan=False)
    """Of a turn whose words are no action; the model reads why."""
    timeout_s: float = Field(60.0, gt=0)
    """Of one answer of the server."""
    max_sessions: int = Field(1, ge=1)
    """Most sessions at once, no more than the server's `max_concurrent_envs`; further rollouts
    wait."""

    @model_validator(mode="after")
    def _tools_or_words(self) -> OpenEnvConfig:
        words = self.changed("client", "action", "action_field", "action_pattern")
        if self.tool_format is not None and words:
            raise ValueError(
                f"{' and '.join(words)}: nothing to act on with tool_format, which makes actions "
                "of calls"
            )
        return self


class VerifiersConfig(Section):
    """`verifiers`: an environment of the package `verifiers` (0.4), which runs its own rollouts;
    the policy answers what its harness asks. Its rewards are the environment's."""

    type: Literal["verifiers"] = "verifiers"
    env: dict[str, Any] = Field(default_factory=dict)
    """The package's own `env` block: `taskset: {id: ...}`, the agents' `harness` and `runtime`."""
    path: str | None = None
    """Instead of `env`, the import path of a function that returns a `verifiers.v1.Env`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function."""
    tool_format: ToolFormatConfig | None = None
    """How the model writes calls of the environment's tools; needed where it has some."""

    @model_validator(mode="after")
    def _one_source(self) -> VerifiersConfig:
        if bool(self.env) == (self.path is not None):
            raise ValueError("set exactly one of env and path")
        if self.params and self.path is None:
            raise ValueError("params are those of path, which is missing")
        return self
