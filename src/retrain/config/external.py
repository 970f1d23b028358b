"""`environment`, `type: external`: a program of the user's, which asks the policy over HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from retrain.config.base import Section
from retrain.config.formats import ToolFormatConfig


class ExternalConfig(Section):
    """`external`: a program of yours runs for each rollout and asks the policy by the API of OpenAI
    or Anthropic; it imports nothing of retrain.

    Where to ask, and by which key, stands in the variables that the SDKs read: `OPENAI_BASE_URL`,
    `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY`; the task, as JSON, in
    `RETRAIN_TASK`.
    """

    type: Literal["external"] = "external"
    command: list[str] | None = Field(None, min_length=1)
    """The program and its arguments; no shell reads them. `{prompt}`, `{id}` and `{column}` stand
    for the task's; braces that are meant as such are written twice."""
    function: str | None = None
    """Instead of `command`, `pkg.module:name` or `path/to/file.py:name`: called with the task, a
    dictionary, in a process of its own. The number that it returns, or the `reward` of a
    dictionary, is the reward."""
    preload: bool = True
    """Import the function's module once, before the tasks: each then costs a fork. false imports it
    for each task, which a module needs that makes its client when it is imported."""
    working_dir: str | None = None
    """Where programs run; by default where the run does."""
    env: dict[str, str | None] = Field(default_factory=dict)
    """Further environment variables; null passes on the run's own value, which variables that look
    like keys, and those of OpenAI's and Anthropic's SDKs, need."""
    pass_answer: bool = False
    """The program is told the task's answer, too."""
    timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Of a program, the time that it waits for the policy included."""
    kill_after_s: float = Field(5.0, gt=0, allow_inf_nan=False)
    """A program that is to end is sent SIGTERM, and after this SIGKILL."""
    ends_on_reward: bool = False
    """The program's reward call ends it; by default it goes on until it ends."""
    on_failure: Literal["mask", "score"] = "mask"
    """Of a program that fails or is late after the policy has spoken: `mask` tries again, then
    leaves the rollout out; `score` takes the rollout as it stands."""
    output_dir: str | None = None
    """A directory that keeps what each program printed, a file a rollout."""
    tool_format: ToolFormatConfig | None = None
    """How the model writes calls; needed where the program's requests have tools."""
    describe_tools: bool = False
    """Tell the model of a request's tools in the system message (tags and fenced)."""

    @model_validator(mode="after")
    def _one_program(self) -> ExternalConfig:
        if (self.command is None) == (self.function is None):
            raise ValueError("set exactly one of command and function")
        if self.command is not None and not self.preload:
            raise ValueError("preload: false does nothing with command: nothing is imported")
        return self

    @model_validator(mode="after")
    def _tools_to_describe(self) -> ExternalConfig:
        if self.describe_tools and (self.tool_format is None or self.tool_format.type == "native"):
            raise ValueError(
                "describe_tools needs a tool_format of type tags or fenced: the chat template "
                "describes native tools itself"
            )
        return self
