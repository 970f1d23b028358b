"""`algorithm`: how rewards become gradients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section


class Optimization(Section):
    """What every training stage has: optimizer, schedule, clipping, micro-batches."""

    learning_rate: float = Field(1e-5, gt=0)
    """The highest one, after warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the matrices inside the layers, AdamW on the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where linear and cosine schedules end, as a share of the learning rate."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null leaves them alone."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most padded tokens of one forward pass; gradients accumulate over as many as it takes."""


class Hyperparameters(Optimization):
    """GRPO (Shao et al., 2024), with DAPO's clip-higher (Yu et al., 2025) on by default."""

    steps: int = Field(100, ge=1)
    """Of sampling and learning."""
    prompts_per_step: int = Field(16, ge=1)
    """Tasks drawn in a step; each makes one group."""
    group_size: int = Field(8, ge=2)
    """Rollouts of one task, compared with each other."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps on one batch of rollouts; each sampled token trains once in each."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; the learner divides its logits by it too."""
    max_new_tokens: int = Field(256, ge=1)
    """Of one MODEL turn."""
    clip_low: float = Field(0.2, gt=0)
    """The probability ratio counts down to 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """The probability ratio counts up to 1 + clip_high."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation; off, as in Dr. GRPO."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: every token of the batch weighs the same. `sequence_mean`: every rollout
    does."""

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
    """`grpo`; no other is built."""
    backend: str = "torch"
    """`torch`; no other is built."""
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    """Of the algorithm, and of its optimizer."""

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
