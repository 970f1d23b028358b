"""The whole file: `TrainingConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.algorithm import AlgorithmConfig
from retrain.config.base import Section
from retrain.config.data import PromptSourceConfig
from retrain.config.environment import EnvironmentConfig, QAConfig
from retrain.config.model import ModelConfig
from retrain.config.rewards import RewardSetup
from retrain.config.stages import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    SandboxConfig,
    SFTConfig,
    TrackingConfig,
)

StageKind = Literal["sft", "rl", "eval"]


class StageConfig(Section):
    """One step of a pipeline: a kind, and what differs from the sections above for it."""

    kind: StageKind
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Names the stage's files and rows; by default its kind."""
    model: dict[str, Any] = Field(default_factory=dict)
    algorithm: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    prompt_source: dict[str, Any] = Field(default_factory=dict)
    reward_setup: dict[str, Any] = Field(default_factory=dict)
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    sft: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kind", mode="before")
    @classmethod
    def _built(cls, kind: Any) -> Any:
        if kind == "distill":
            raise ValueError("stage kind 'distill' is not built; there are: sft, rl, eval")
        return kind

    @model_validator(mode="after")
    def _one_model(self) -> StageConfig:
        if self.model:
            raise ValueError("a stage trains the model of the stage before it; model stands above")
        return self

    def overlays(self) -> dict[str, dict[str, Any]]:
        return self.model_dump(exclude={"kind", "name"}, exclude_defaults=True)


class TrainingConfig(Section):
    experiment_name: str = Field("experiment", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0)
    logging_level: Literal["debug", "info", "warning", "error"] = "warning"
    output_dir: str = "runs"
    model: ModelConfig
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    environment: EnvironmentConfig = Field(default_factory=QAConfig)
    prompt_source: PromptSourceConfig | None = None
    reward_setup: RewardSetup = Field(default_factory=RewardSetup)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig | None = None
    sft: SFTConfig | None = None
    stages: list[StageConfig] | None = Field(None, min_length=1)
    """A pipeline. Without it the run is one RL stage, evaluated before and after where
    `evaluation` is set."""

    @model_validator(mode="before")
    @classmethod
    def _not_built(cls, data: Any) -> Any:
        if isinstance(data, dict) and "distillation" in data:
            raise ValueError("section distillation is not built; remove it")
        return data

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Read and check a YAML (or TOML) file.

        Raises:
            UserError: every problem found, each with its path and the nearest valid key.
        """
        from retrain.config.load import load_config

        return load_config(path)
