"""`model`: which policy trains, where it comes from, and how it is adapted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from retrain.config.base import Section


class LoraConfig(Section):
    """LoRA through peft (Hu et al., 2021)."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0.0, le=0.0)
    """Must be 0: with dropout, what the learner computes is not what the engine sampled from."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules to adapt."""


class TokenizerFromScratch(Section):
    """A byte-level BPE trained on the spot; single digits, special tokens kept whole."""

    vocab_size: int = Field(512, ge=258)
    """Most entries, special tokens included."""
    corpus: str
    """Import path of a function that returns the texts to train on."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that function."""
    special_tokens: list[str] = Field(default_factory=list)
    """Besides `<|endoftext|>`, which ends a turn."""


class FromScratch(Section):
    """A seeded, randomly initialised transformers model and its tokenizer."""

    model_type: str = "qwen3"
    """Any causal LM type that transformers knows."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that type's config class."""
    tokenizer: TokenizerFromScratch
    """Trained before the model is made; it decides the model's vocabulary."""


class ModelConfig(Section):
    name_or_path: str | None = None
    """A hub id or a directory in Hugging Face format."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    from_scratch: FromScratch | None = None
    """Make the model here instead; nothing is downloaded."""
    loader: Literal["huggingface", "unsloth"] = "huggingface"
    """`unsloth` must be installed by you; it is not an extra."""
    torch_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the weights; `auto` takes that of the checkpoint."""
    device: str = "auto"
    """`auto` is cuda where there is one, else cpu."""
    trust_remote_code: bool = False
    """Let the hub's repository run its own code."""
    attn_implementation: str | None = None
    """As transformers names it, such as sdpa or eager."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    peft: LoraConfig | None = None
    """Train a LoRA adapter instead of all weights."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.name_or_path is None) == (self.from_scratch is None):
            raise ValueError("set exactly one of name_or_path and from_scratch")
        if self.loader == "unsloth" and self.attn_implementation is not None:
            raise ValueError(
                "attn_implementation does nothing with loader: unsloth, which brings its own; "
                "remove it"
            )
        if self.from_scratch is not None:
            for key in ("revision", "attn_implementation"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} needs name_or_path; it does nothing from_scratch")
            if self.trust_remote_code:
                raise ValueError("trust_remote_code needs name_or_path")
            if self.loader != "huggingface":
                raise ValueError("loader: unsloth needs name_or_path")
            if self.torch_dtype == "auto":
                raise ValueError(
                    "torch_dtype: auto needs name_or_path: there is no checkpoint whose type it "
                    "could take; use float32 or bfloat16"
                )
        return self
