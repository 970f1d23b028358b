"""Saving in Hugging Face format, for `AutoModelForCausalLM.from_pretrained` and for vLLM."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retrain.models.load import Policy
from retrain.types import UserError


def save_policy(policy: Policy, directory: Path, *, merge_lora: bool = False) -> Path:
    """Write model and tokenizer to `directory`, which appears only when it is whole.

    A LoRA policy saves its adapter; with `merge_lora`, or when there is no base on disk that the
    adapter could be put on, it saves the merged weights.

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
