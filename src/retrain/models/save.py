"""Saving in Hugging Face format, for `AutoModelForCausalLM.from_pretrained` and for vLLM."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from retrain.models.load import Policy
from retrain.types import UserError

CRITIC_FILE = Path("critic", "critic.safetensors")
"""In a directory of its own: servers load every safetensors file beside the model's."""


def save_policy(
    policy: Policy,
    directory: Path,
    *,
    merge_lora: bool = False,
    critic: nn.Module | None = None,
) -> Path:
    """Write model and tokenizer to `directory`, which appears only when it is whole.

    A LoRA policy saves its adapter; with `merge_lora`, or when there is no base on disk that the
    adapter could be put on, it saves the merged weights. Of a critic it saves what trains.

    Raises:
        UserError: the disk is full or not writable.
    """
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    model: Any = policy.model
    try:
        beside.mkdir(parents=True)
        if hasattr(model, "merge_and_unload") and (merge_lora or policy.base is None):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(beside)
        policy.tokenizer.save_pretrained(beside)
        if critic is not None:
            (beside / CRITIC_FILE).parent.mkdir()
            save_file(_trained(critic), beside / CRITIC_FILE)
        if directory.exists():
            shutil.rmtree(directory)
        beside.rename(directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"checkpoint {directory} cannot be written: {reason}",
            "Free some space, or choose another output_dir.",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def load_critic(critic: nn.Module, directory: Path) -> None:
    """Put the weights that `save_policy` saved into a critic of the same make.

    Raises:
        UserError: the checkpoint has no critic, or one of another make.
    """
    path = directory / CRITIC_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
            "Give the directory of a checkpoint that a PPO stage saved.",
        ) from error
    own = _trained(critic)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(
            f"the critic in {path} is of another make than this one",
            "Use the model and the critic.backbone that it was saved with.",
        )
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


def _trained(critic: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().contiguous() for n, p in critic.named_parameters() if p.requires_grad}
