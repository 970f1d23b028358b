"""The smaller sections: sandbox, checkpoint, evaluation, sft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section
from retrain.config.data import PromptSourceConfig, refuse_shares
from retrain.config.imitation import TraceData


class SandboxConfig(Section):
    type: Literal["auto", "jail", "monty", "http"] = "auto"
    """`jail`: full Python in confined processes, on Linux; `monty`: an interpreter for a subset of
    Python, anywhere; `http`: a server that speaks SandboxFusion's `/run_code`; `auto`: the jail
    where its self-test passes, else Monty. `retrain doctor` says what works here."""
    timeout_s: float = Field(5.0, gt=0)
    """Running time of one call; waiting for its turn is not counted."""
    memory_mb: int = Field(256, ge=1)
    """Of one session, beyond what is loaded before it starts."""
    max_output_chars: int = Field(4000, ge=16)
    """Of one call's output; the middle is left out."""
    max_concurrency: int = Field(64, ge=1)
    """Calls that run at the same time; further ones wait their turn."""
    stateful: bool = True
    """Variables last over a rollout's calls; `http` cannot."""
    packages: list[str] | None = None
    """Third-party packages that code can import, loaded before the first session: by default numpy
    and sympy in the jail, none elsewhere. Fewer start faster."""
    files: dict[str, str] = Field(default_factory=dict)
    """Name in the code's working directory: local path of a file it may read."""
    writable: bool = False
    """The jail gives each session a file system of its own in memory, of `memory_mb` at most."""
    bubblewrap: bool = False
    """Run the jail inside bubblewrap (`bwrap`), which has to be installed."""
    url: str | None = None
    """Of the server, for `http`."""


class KeepBestConfig(Section):
    """Checkpoints that are kept because a metric was best when they were saved."""

    metric: str
    """A name in metrics.jsonl, such as `reward/mean` or, with evaluation.every_steps,
    `eval/greedy/success`: its latest value counts."""
    mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower value is better."""
    count: int = Field(1, ge=1)
    """How many are kept."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    """Save during a stage; None saves at the end of each training stage only, and when the run is
    stopped by Ctrl-C, SIGTERM or an error."""
    keep_last: int = Field(2, ge=1)
    """How many of those a stage keeps; the one at its end is always kept."""
    keep_best: KeepBestConfig | None = None
    """Of those saved during a stage, also keep the best."""
    merge_lora: bool = False
    """Save merged weights instead of the adapter."""

    @model_validator(mode="after")
    def _something_to_keep(self) -> CheckpointConfig:
        if self.every_steps is None and self.changed("keep_last"):
            raise ValueError(
                f"keep_last {self.keep_last} does nothing without every_steps: only the checkpoint "
                "at a stage's end is saved, and kept; set every_steps, or remove keep_last"
            )
        if self.every_steps is None and self.keep_best is not None:
            raise ValueError(
                "keep_best does nothing without every_steps: there is nothing to choose from"
            )
        return self


class EvaluationMode(Section):
    name: str = Field(pattern=r"^[\w.= -]+$")
    """Names the mode's rows and files."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1 is off."""
    top_k: int = Field(0, ge=0)
    """Sample from this many tokens; 0 is off."""
    tools: bool = True
    """False: calls are answered with a message that the tools are switched off."""
    repeats: int = Field(1, ge=1)
    """Rollouts per task. The reported interval takes them for independent, which those of one task
    are not quite."""

    @model_validator(mode="after")
    def _greedy_is_one_rollout(self) -> EvaluationMode:
        if self.temperature == 0 and (self.repeats > 1 or self.top_p < 1 or self.top_k > 0):
            raise ValueError("repeats, top_p and top_k do nothing at temperature 0: it is greedy")
        return self


def _default_modes() -> list[EvaluationMode]:
    return [
        EvaluationMode(name="greedy", temperature=0.0),
        EvaluationMode(name="T=1", temperature=1.0),
    ]


class EvaluationConfig(Section):
    prompt_source: PromptSourceConfig
    """Held-out tasks."""
    every_steps: int | None = Field(None, ge=1)
    """Also during stages that train; None evaluates only where an eval stage stands, or before and
    after."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Of one MODEL turn; by default that of training."""
    modes: list[EvaluationMode] = Field(default_factory=_default_modes, min_length=1)
    """Each is run on every task."""
    agents: list[str] | None = Field(None, min_length=1)
    """Of several agents, whose rollouts count; by default those that train."""
    success_reward: str | None = None
    """The reward whose raw value decides success; None: the total reward."""
    success_threshold: float = 1.0
    """The value from which on a rollout counts as a success."""
    group_by: str | None = None
    """A metadata column: success is also reported for each of its values."""
    exclude: list[str] = Field(default_factory=list)
    """Values of `group_by` that are reported on their own but left out of the total."""

    @field_validator("prompt_source")
    @classmethod
    def _asks_each_once(cls, source: PromptSourceConfig) -> PromptSourceConfig:
        refuse_shares(source)
        return source

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        names = [mode.name for mode in self.modes]
        if len(set(names)) != len(names):
            raise ValueError(f"two evaluation modes have one name: {names}")
        if self.exclude and self.group_by is None:
            raise ValueError("exclude needs group_by")
        return self


class SFTConfig(TraceData):
    """Loss on the model's own messages; `evaluation.every_steps` evaluates on the way."""
