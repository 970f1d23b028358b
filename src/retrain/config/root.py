"""The whole file: `TrainingConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from retrain.config.agents import AgentsConfig
from retrain.config.algorithm import TOKEN_ADVANTAGES, AlgorithmConfig
from retrain.config.base import Section
from retrain.config.data import PromptSourceConfig
from retrain.config.distillation import DistillationConfig
from retrain.config.engine import EngineConfig, TorchEngineConfig
from retrain.config.environment import EnvironmentConfig, QAConfig
from retrain.config.gateway import GatewayConfig
from retrain.config.guided import unfit_for_a_group_of_one
from retrain.config.model import ModelConfig
from retrain.config.monitors import MonitorsConfig
from retrain.config.rewards import RewardConfig, RewardSetup
from retrain.config.rollout import RolloutConfig
from retrain.config.stages import (
    CheckpointConfig,
    EvaluationConfig,
    SandboxConfig,
    SFTConfig,
)
from retrain.config.teachers import OnPolicyDistillation
from retrain.config.tracking import TrackingConfig

StageKind = Literal["sft", "rl", "distill", "eval"]

_BY_ROLLOUTS = (
    "algorithm",
    "environment",
    "prompt_source",
    "reward_setup",
    "rollout",
    "checkpoint",
    "monitors",
    "evaluation",
)

READ_BY: dict[StageKind, tuple[str, ...]] = {
    "sft": (
        "algorithm",
        "environment",
        "reward_setup",
        "rollout",
        "checkpoint",
        "evaluation",
        "sft",
    ),
    "rl": _BY_ROLLOUTS,
    "distill": (*_BY_ROLLOUTS, "distillation"),
    "eval": ("algorithm", "environment", "reward_setup", "rollout", "evaluation"),
}
"""The sections that a stage of each kind may overlay, since it reads them."""

_TO_ACT = ("algorithm", "reward_setup", "rollout", "evaluation")
"""Of SFT, those that it reads to be evaluated only."""


class StageConfig(Section):
    """One step of a pipeline: a kind, and what differs from the sections above for it."""

    kind: StageKind
    """What the stage does."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Names the stage's files and rows; by default its kind."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Refused: a stage trains the model of the stage before it."""
    algorithm: dict[str, Any] = Field(default_factory=dict)
    """Keys that replace those of the section above, for this stage."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    prompt_source: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    reward_setup: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    rollout: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    monitors: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    sft: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""
    distillation: dict[str, Any] = Field(default_factory=dict)
    """As for algorithm."""

    @model_validator(mode="after")
    def _one_model(self) -> StageConfig:
        if self.model:
            raise ValueError("a stage trains the model of the stage before it; model stands above")
        return self

    @model_validator(mode="after")
    def _overlays_act(self) -> StageConfig:
        idle = [name for name in self.overlays() if name not in (*READ_BY[self.kind], "model")]
        if idle:
            raise ValueError(
                f"{' and '.join(idle)}: nothing of it acts in a stage of kind {self.kind}, which "
                f"reads {', '.join(READ_BY[self.kind])}; move it to the stage that it is for"
            )
        return self

    def overlays(self) -> dict[str, dict[str, Any]]:
        return self.model_dump(exclude={"kind", "name"}, exclude_defaults=True)


class TrainingConfig(Section):
    experiment_name: str = Field("experiment", pattern=r"^[\w.-]+$")
    """Names the run directory."""
    seed: int = Field(0, ge=0)
    """All randomness of the run follows from it."""
    logging_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Of messages on standard error."""
    output_dir: str = "runs"
    """Where run directories are made."""
    model: ModelConfig
    """Which policy trains."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    """How rewards become gradients."""
    environment: EnvironmentConfig = Field(default_factory=QAConfig)
    """What the policy acts in."""
    prompt_source: PromptSourceConfig | None = None
    """Where tasks come from; RL needs it."""
    reward_setup: RewardSetup = Field(default_factory=RewardSetup)
    """What a rollout is worth."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """How long rollouts may take, and what happens to those that infrastructure loses."""
    engine: EngineConfig = Field(default_factory=TorchEngineConfig)
    """What samples."""
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    """Where code that the model wrote runs."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When weights are saved."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """What a run writes down and shows."""
    monitors: MonitorsConfig = Field(default_factory=MonitorsConfig)
    """When a step of RL is worth a warning."""
    evaluation: EvaluationConfig | None = None
    """On which tasks, how, and what counts as success."""
    sft: SFTConfig | None = None
    """Traces to imitate, and how."""
    distillation: DistillationConfig | None = None
    """Other agents to learn from, by their words or by their log-probabilities."""
    gateway: GatewayConfig | None = None
    """What `retrain gateway` serves."""
    stages: list[StageConfig] | None = Field(None, min_length=1)
    """A pipeline. Without it the run is one stage: of kind distill where `distillation` is set, of
    kind sft where `sft` is and there is no `prompt_source`, else of kind rl; evaluated before and
    after where `evaluation` is set."""

    @model_validator(mode="after")
    def _lora_to_merge(self) -> TrainingConfig:
        if self.checkpoint.merge_lora and self.model.peft is None:
            raise ValueError(
                "checkpoint.merge_lora does nothing without model.peft: there is no adapter; "
                "remove merge_lora, or add model.peft"
            )
        return self

    @model_validator(mode="after")
    def _adapter_to_serve(self) -> TrainingConfig:
        engine = self.engine
        if isinstance(engine, TorchEngineConfig):
            return self
        if engine.weights == "lora" and self.model.peft is None:
            raise ValueError(
                "engine.weights: lora needs an adapter, and the model has none; add model.peft, or "
                "use weights: full"
            )
        if engine.untie_embeddings and self.model.peft is not None and engine.weights != "full":
            raise ValueError(
                "engine.untie_embeddings does nothing here: only an adapter is loaded; remove it"
            )
        return self

    @model_validator(mode="after")
    def _somebody_trains(self) -> TrainingConfig:
        section = self.environment
        if isinstance(section, AgentsConfig) and self.prompt_source is not None:
            trains = [
                a for a in section.agents.values() if a.trainable and a.player.type == "policy"
            ]
            if not trains:
                raise ValueError(
                    "environment.agents: no agent trains; leave one trainable that policy plays"
                )
        return self

    @model_validator(mode="after")
    def _agents_exist(self) -> TrainingConfig:
        named = dict(self._agents_named())
        if not named:
            return self
        section = self.environment
        if not isinstance(section, AgentsConfig):
            raise ValueError(
                f"{next(iter(named))}: there is one agent only; it needs environment.type: agents"
            )
        for place, agents in named.items():
            for agent in agents:
                if agent not in section.agents:
                    known = ", ".join(section.agents)
                    raise ValueError(f"{place}: there is no agent {agent!r}; there are {known}")
        return self

    def _agents_named(self) -> Iterator[tuple[str, list[str]]]:
        """The keys that name agents, and the names."""
        if self.evaluation is not None and self.evaluation.agents is not None:
            yield "evaluation.agents", self.evaluation.agents
        setup = self.reward_setup
        for kind in ("step", "rollout", "group"):
            rewards: dict[str, RewardConfig] = getattr(setup, f"{kind}_reward_configs")
            for name, reward in rewards.items():
                if reward.agents is not None:
                    yield f"reward_setup.{kind}_reward_configs.{name}.agents", reward.agents

    @model_validator(mode="after")
    def _groups_compare(self) -> TrainingConfig:
        reason = unfit_for_a_group_of_one(self.algorithm.hyperparameters)
        if reason is not None and rewards_train("distill", self):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _rollouts_survive(self) -> TrainingConfig:
        least, settings = self.rollout.min_group_size, self.algorithm.hyperparameters
        if least is not None and least > settings.group_size:
            raise ValueError(
                f"rollout.min_group_size {least} is more than group_size {settings.group_size}: "
                "no group would ever teach; lower it"
            )
        compared = settings.advantage not in TOKEN_ADVANTAGES
        if least == 1 and compared and settings.kl is None and settings.entropy_coefficient == 0:
            raise ValueError(
                f"rollout.min_group_size 1 does nothing for {settings.advantage}: the one rollout "
                "left of a group has nothing to be compared with; use at least 2, or remove it"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Read and check a YAML (or TOML) file.

        Raises:
            UserError: every problem found, each with its path and the nearest valid key.
        """
        from retrain.config.load import load_config

        return load_config(path)


def evaluates(config: TrainingConfig) -> bool:
    """Whether stages that train are evaluated on the way."""
    return config.evaluation is not None and config.evaluation.every_steps is not None


def rolls_out(kind: StageKind, config: TrainingConfig) -> bool:
    """Whether a stage learns from rollouts that it samples, step by step."""
    return kind == "rl" or (
        kind == "distill" and isinstance(config.distillation, OnPolicyDistillation)
    )


def generates(kind: StageKind, config: TrainingConfig) -> bool:
    """Whether a stage samples rollouts: to learn from them, or to be evaluated."""
    return kind == "eval" or rolls_out(kind, config) or evaluates(config)


def reads(kind: StageKind, config: TrainingConfig) -> tuple[str, ...]:
    """The sections that a stage reads as it is configured."""
    if kind == "sft" and not evaluates(config):
        return tuple(name for name in READ_BY[kind] if name not in _TO_ACT)
    return READ_BY[kind]


def rewards_train(kind: StageKind, config: TrainingConfig) -> bool:
    """Whether rewards do, in a stage that learns from rollouts, and not teachers alone."""
    section = config.distillation
    only_taught = isinstance(section, OnPolicyDistillation) and section.task_reward == 0
    return kind != "distill" or not only_taught
