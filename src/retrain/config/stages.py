"""The smaller sections: engine, sandbox, checkpoint, tracking, evaluation, sft."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.algorithm import Optimization
from retrain.config.base import Section
from retrain.config.data import PromptSourceConfig


class EngineConfig(Section):
    type: str = "torch"
    max_slots: int = Field(128, ge=1)
    """Sequences decoded together."""
    context_limit: int | None = Field(None, ge=2)
    """Most tokens of a sequence; by default what the model's config says."""

    @field_validator("type")
    @classmethod
    def _built(cls, value: str) -> str:
        if value != "torch":
            raise ValueError(f"engine {value!r} is not built; the one there is: torch")
        return value


class SandboxConfig(Section):
    type: str = "auto"
    timeout_s: float = Field(5.0, gt=0)
    memory_mb: int = Field(256, ge=1)
    max_output_chars: int = Field(4000, ge=16)
    max_concurrency: int = Field(64, ge=1)

    @field_validator("type")
    @classmethod
    def _built(cls, value: str) -> str:
        if value not in ("auto", "monty"):
            raise ValueError(f"sandbox {value!r} is not built; there are: auto, monty")
        return value


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1)
    """Save during a stage; None saves at the end of each training stage only."""
    keep_last: int = Field(2, ge=1)
    """How many of those a stage keeps; the one at its end is always kept."""
    merge_lora: bool = False
    """Save merged weights instead of the adapter."""


class TrackingConfig(Section):
    rollouts: bool = True
    """Write every rollout, tokens included."""
    plots: bool = True
    transcripts: int = Field(3, ge=0)
    """Rollouts written out as text after each evaluation."""
    progress: Literal["auto", "on", "off"] = "auto"
    """`auto`: a live display when standard output is a terminal."""


class EvaluationMode(Section):
    name: str = Field(pattern=r"^[\w.= -]+$")
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    tools: bool = True
    """False: calls are answered with a message that the tools are switched off."""
    repeats: int = Field(1, ge=1)
    """Rollouts per task."""


def _default_modes() -> list[EvaluationMode]:
    return [
        EvaluationMode(name="greedy", temperature=0.0),
        EvaluationMode(name="T=1", temperature=1.0),
    ]


class EvaluationConfig(Section):
    prompt_source: PromptSourceConfig
    every_steps: int | None = Field(None, ge=1)
    """Also during RL; None evaluates only where an eval stage stands, or before and after."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Of one MODEL turn; by default that of training."""
    modes: list[EvaluationMode] = Field(default_factory=_default_modes, min_length=1)
    success_reward: str | None = None
    """The reward whose raw value decides success; None: the total reward."""
    success_threshold: float = 1.0
    group_by: str | None = None
    """A metadata column: success is also reported for each of its values."""
    exclude: list[str] = Field(default_factory=list)
    """Values of `group_by` that are reported on their own but left out of the total."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        names = [mode.name for mode in self.modes]
        if len(set(names)) != len(names):
            raise ValueError(f"two evaluation modes have one name: {names}")
        if self.exclude and self.group_by is None:
            raise ValueError("exclude needs group_by")
        return self


class SFTConfig(Optimization):
    dataset: str
    """JSONL, JSON or Parquet of messages or prompt/completion rows, or an import path
    `pkg.module:name` of a function that returns such rows."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that function."""
    steps: int | None = Field(None, ge=1)
    """None: as many as `epochs` takes."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    shuffle: bool = True

    @model_validator(mode="after")
    def _params_have_a_function(self) -> SFTConfig:
        if self.params and ":" not in self.dataset:
            raise ValueError("params needs dataset to be an import path, pkg.module:name")
        return self
