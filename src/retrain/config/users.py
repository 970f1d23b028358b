"""Parties that are not the policy: simulated users, and who else may speak for an agent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from retrain.config.base import Section, VariableName
from retrain.config.model import ModelConfig


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


class ModelPlayer(Section):
    """`model`: another model, in the run's own process."""

    type: Literal["model"] = "model"
    model: ModelConfig
    """Loaded beside the policy; it never trains."""
    max_new_tokens: int = Field(128, ge=1)
    """Of one reply."""
    temperature: float = Field(1.0, ge=0)
    """Of its sampling; 0 is greedy."""


class ModelUser(ModelPlayer):
    system_prompt: str
    """A format string over the task's columns, `{prompt}` and `{answer}` among them."""


class EndpointPlayer(Section):
    """`openai`: a model behind an OpenAI-compatible chat endpoint."""

    type: Literal["openai"] = "openai"
    url: str
    """The API's base, such as `https://api.openai.com/v1`."""
    model: str
    """As the endpoint names it."""
    api_key_env: VariableName | None = None
    """The environment variable that holds the key. The key itself has no place in a config."""
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


class EndpointUser(EndpointPlayer):
    system_prompt: str
    """A format string over the task's columns, `{prompt}` and `{answer}` among them."""
