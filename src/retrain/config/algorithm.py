"""`algorithm`: how rewards become gradients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section


class Optimization(Section):
    """What every training stage has: optimizer, schedule, clipping, micro-batches."""

    learning_rate: float = Field(1e-5, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the matrices inside the layers, AdamW on the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where linear and cosine schedules end, as a share of the learning rate."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most padded tokens of one forward pass; gradients accumulate over as many as it takes."""


class Hyperparameters(Optimization):
    """GRPO (Shao et al., 2024), with DAPO's clip-higher (Yu et al., 2025) on by default."""

    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps on one batch of rollouts; each sampled token trains once in each."""
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(256, ge=1)
    """Of one MODEL turn."""
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    normalize_std: bool = True
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"

    @model_validator(mode="before")
    @classmethod
    def _no_truncated_sampling(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in ("top_p", "top_k"):
                if key in data:
                    raise ValueError(
                        f"{key} is refused for training: it makes the engine sample from a "
                        "truncated distribution that the learner cannot reproduce; "
                        f"use {key} in evaluation.modes"
                    )
            if data.get("group_size") == 1:
                raise ValueError(
                    "group_size 1 gives every rollout an advantage of zero under GRPO; "
                    "use at least 2, better 8"
                )
        return data


class AlgorithmConfig(Section):
    name: str = "grpo"
    backend: str = "torch"
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)

    @field_validator("name")
    @classmethod
    def _built_algorithm(cls, name: str) -> str:
        if name != "grpo":
            raise ValueError(f"algorithm {name!r} is not built; the one there is: grpo")
        return name

    @field_validator("backend")
    @classmethod
    def _built_backend(cls, backend: str) -> str:
        if backend != "torch":
            raise ValueError(f"backend {backend!r} is not built; the one there is: torch")
        return backend
