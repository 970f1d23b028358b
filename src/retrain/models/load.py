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

from retrain.config.model import FromScratch, LoraConfig, ModelConfig, TokenizerFromScratch
from retrain.importing import import_object, suggest
from retrain.models.forward import is_causal, unwrap
from retrain.models.tokenizer import train_tokenizer
from retrain.types import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A causal LM and its tokenizer."""

    model: nn.Module
    tokenizer: Any
    base: str | None = None
    """Where the weights below a new adapter can be loaded from; None when no place holds them."""


def load_policy(config: ModelConfig, *, seed: int = 0) -> Policy:
    """Load or make the policy, on its device, ready to train.

    Dropout is switched off everywhere: with it, what the learner computes would not be what the
    engine sampled from.

    Raises:
        UserError: no such model, no tokenizer, a model that is not causal, unknown LoRA targets,
            or unsloth not installed.
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
    model.to(choose_device(config.device))
    if not is_causal(model):
        raise UserError(
            f"{type(unwrap(model)).__name__} lets a token see those after it: it is no causal "
            "language model",
            "Choose a decoder-only model.",
        )
    return Policy(model, tokenizer, _base(config))


def _base(config: ModelConfig) -> str | None:
    """None from scratch, and over an adapter: that one was merged, so no place holds the sum."""
    name = config.name_or_path
    return None if name is None or _is_adapter(_local(name)) else name


def _local(name: str) -> Path:
    return Path(name).expanduser()


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def check_origin(config: ModelConfig) -> str:
    """Where the policy will come from, checked as far as that goes without loading weights.

    Raises:
        UserError: a directory without a model or a tokenizer, or a corpus that does not import.
    """
    choose_device(config.device)
    adapted = "" if config.peft is None else f", LoRA of rank {config.peft.r}"
    if config.from_scratch is not None:
        import_object(config.from_scratch.tokenizer.corpus, "corpus function")
        return f"{config.from_scratch.model_type} from scratch{adapted}"
    name = str(config.name_or_path)
    _check_unsloth(config)
    if not _is_local(name):
        return f"{name} from the hub, fetched by the run unless it is cached{adapted}"
    _check_directory(name, config.revision)
    return f"{name}{adapted}"


def choose_device(name: str) -> torch.device:
    """The device that `model.device` stands for here.

    Raises:
        UserError: there is no such device.
    """
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
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer(
        _corpus(spec.tokenizer),
        vocab_size=spec.tokenizer.vocab_size,
        special_tokens=spec.tokenizer.special_tokens,
    )
    vocab_size = spec.config.get("vocab_size", len(tokenizer))
    if not isinstance(vocab_size, int) or vocab_size < len(tokenizer):
        raise UserError(
            f"model.from_scratch.config: vocab_size is {spec.config['vocab_size']}; "
            f"the tokenizer has {len(tokenizer)} entries",
            "Leave it out: it is then the tokenizer's.",
        )
    settings = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **spec.config,
    }
    try:
        _refuse_unknown(spec, AutoConfig.for_model(spec.model_type))
        with _seeded(seed):
            architecture = AutoConfig.for_model(spec.model_type, **settings)
            model = AutoModelForCausalLM.from_config(architecture)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model.from_scratch: no {spec.model_type!r} model with this config: {error}",
            "Check model_type and config against the transformers documentation.",
        ) from error
    return (model if dtype == "auto" else model.to(dtype)), tokenizer


def _corpus(spec: TokenizerFromScratch) -> list[str]:
    place = f"model.from_scratch.tokenizer.corpus: {spec.corpus}"
    corpus = import_object(spec.corpus, "corpus function")
    if not callable(corpus):
        raise UserError(f"{place} is no function")
    try:
        texts = list(corpus(**spec.params))
    except Exception as error:
        raise UserError(f"{place} raised {type(error).__name__}: {error}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place} must return strings, and at least one")
    return texts


def _refuse_unknown(spec: FromScratch, default: Any) -> None:
    """transformers keeps keys that no architecture reads; here each must be one of the type's."""
    for key in spec.config:
        if not hasattr(default, key):
            raise UserError(
                f"model.from_scratch.config: {spec.model_type} has no setting {key!r}",
                suggest(key, default.to_dict(), "its settings"),
            )


def _from_pretrained(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(config.name_or_path)
    if _is_local(name):
        _check_directory(name, config.revision)
        name = str(_local(name).resolve())  # an adapter's own config will name its base by this
    adapter = _is_adapter(Path(name))
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
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(
                name, **arguments
            ).merge_and_unload(), tokenizer
        return AutoModelForCausalLM.from_pretrained(name, **arguments), tokenizer
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _not_found(name, error) from error


def _is_local(name: str) -> bool:
    """A path, rather than a hub id: `organisation/name` is one only if it is not a directory."""
    return _local(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_directory(name: str, revision: str | None) -> None:
    directory = _local(name)
    if revision is not None:
        raise UserError(
            f"model.revision {revision!r} does nothing for the directory {name}", "Remove it."
        )
    if not directory.is_dir():
        raise UserError(f"model directory {name} does not exist", "Check model.name_or_path.")
    if not any((directory / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise UserError(
            f"model directory {name} has no config.json",
            "Give a directory in Hugging Face format, a run's checkpoints/<name> for example.",
        )
    if not any(any(directory.glob(names)) for names in ("tokenizer*", "vocab*", "*.model")):
        raise UserError(
            f"model directory {name} has no tokenizer",
            "Save one beside the weights with tokenizer.save_pretrained.",
        )


def _not_found(name: str, error: Exception) -> UserError:
    return UserError(
        f"model {name} cannot be loaded: {_first_line(error)}",
        "Check model.name_or_path: a hub id that this machine can reach, or a directory.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_unsloth(config: ModelConfig) -> None:
    if config.loader == "unsloth" and importlib.util.find_spec("unsloth") is None:
        raise UserError(
            "model.loader is unsloth, which is not installed",
            "pip install unsloth, or set model.loader: huggingface.",
        )


def _from_unsloth(config: ModelConfig) -> tuple[Any, Any]:
    _check_unsloth(config)
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=config.name_or_path,
        dtype=None if config.torch_dtype == "auto" else _dtype(config.torch_dtype),
        load_in_4bit=False,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def _add_lora(model: nn.Module, lora: LoraConfig, seed: int) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with _seeded(seed):
            return get_peft_model(model, settings)
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
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float) and value > 0:
                module.__dict__[name] = 0.0
                changed += 1
    if changed:
        logger.info("switched off dropout in %d modules", changed)
