"""A model and its tokenizer: from a hub or a directory, or from scratch; LoRA on top."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retrain.config.model import FromScratch, LoraConfig, ModelConfig
from retrain.importing import import_object
from retrain.models.tokenizer import train_tokenizer
from retrain.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A causal LM and its tokenizer. `base` is where the weights below an adapter came from."""

    model: nn.Module
    tokenizer: Any
    base: str | None = None


def load_policy(config: ModelConfig, *, seed: int = 0) -> Policy:
    """Load or make the policy, on its device, ready to train.

    Dropout is switched off everywhere: with it, what the learner computes would not be what the
    engine sampled from.

    Raises:
        UserError: no such model, no tokenizer, unknown LoRA targets, or unsloth not installed.
    """
    if config.from_scratch is not None:
        model, tokenizer = _from_scratch(config.from_scratch, _dtype(config.torch_dtype), seed)
    elif config.loader == "unsloth":
        model, tokenizer = _from_unsloth(config)
    else:
        model, tokenizer = _from_pretrained(config)
    if config.peft is not None:
        model = _add_lora(model, config.peft, seed)
    _switch_off_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.to(_device(config.device))
    return Policy(model, tokenizer, config.name_or_path)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"model.device: {name!r} is no device", "Use auto, cpu, cuda or cuda:N."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is cuda, but there is no CUDA device here", "Use auto.")
    return device


def _dtype(name: str) -> torch.dtype | str:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name, "auto")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _from_scratch(spec: FromScratch, dtype: torch.dtype | str, seed: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    corpus = import_object(spec.tokenizer.corpus, "corpus function")
    if not callable(corpus):
        raise UserError(f"model.from_scratch.tokenizer.corpus: {spec.tokenizer.corpus} is no function")
    tokenizer = train_tokenizer(
        corpus(**spec.tokenizer.params),
        vocab_size=spec.tokenizer.vocab_size,
        special_tokens=spec.tokenizer.special_tokens,
    )
    settings = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **spec.config,
    }
    try:
        with _seeded(seed):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(spec.model_type, **settings)
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model.from_scratch: no {spec.model_type!r} model with this config: {error}",
            "Check model_type and config against the transformers documentation.",
        ) from error
    return (model if dtype == "auto" else model.to(dtype)), tokenizer


def _from_pretrained(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    name = str(config.name_or_path)
    adapter = Path(name, "adapter_config.json").is_file()
    if Path(name).is_dir() and not adapter and not Path(name, "config.json").is_file():
        raise UserError(
            f"model directory {name} has no config.json",
            "Give a directory in Hugging Face format, a run's checkpoints/<name> for example.",
        )
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model directory {name} does not exist", "Check model.name_or_path.")
    remote = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **remote)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(name).is_dir():
            raise UserError(
                f"model directory {name} has no tokenizer that loads: {_first_line(error)}",
                "Save one beside the weights with tokenizer.save_pretrained.",
            ) from error
        raise _not_found(name, error) from error
    arguments: dict[str, Any] = {"dtype": _dtype(config.torch_dtype), **remote}
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    try:
        if adapter:
            from peft import AutoPeftModelForCausalLM  # noqa: PLC0415

            return AutoPeftModelForCausalLM.from_pretrained(
                name, **arguments
            ).merge_and_unload(), tokenizer
        return AutoModelForCausalLM.from_pretrained(name, **arguments), tokenizer
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _not_found(name, error) from error


def _not_found(name: str, error: Exception) -> UserError:
    return UserError(
        f"model {name} cannot be loaded: {_first_line(error)}",
        "Check model.name_or_path: a hub id that this machine can reach, or a directory.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_unsloth(config: ModelConfig) -> tuple[Any, Any]:
    if importlib.util.find_spec("unsloth") is None:
        raise UserError(
            "model.loader is unsloth, which is not installed",
            "pip install unsloth, or set model.loader: huggingface.",
        )
    from unsloth import FastLanguageModel  # noqa: PLC0415

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=config.name_or_path,
        dtype=None if config.torch_dtype == "auto" else _dtype(config.torch_dtype),
        load_in_4bit=False,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def _add_lora(model: nn.Module, lora: LoraConfig, seed: int) -> Any:
    from peft import LoraConfig as PeftLoraConfig  # noqa: PLC0415
    from peft import get_peft_model  # noqa: PLC0415

    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with _seeded(seed):
            return get_peft_model(model, settings)  # type: ignore[arg-type]
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
        raise UserError(
            f"model.peft.target_modules: {lora.target_modules} not found in this model",
            f"Its linear modules: {', '.join(names)}.",
        ) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _switch_off_dropout(model: nn.Module) -> None:
    changed = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            changed += 1
        for name in ("attention_dropout", "attn_dropout"):
            value = module.__dict__.get(name)
            if isinstance(value, float) and value > 0:
                module.__dict__[name] = 0.0
                changed += 1
    if changed:
        logger.info("switched off dropout in %d modules", changed)
