"""Saving in Hugging Face format, for `AutoModelForCausalLM.from_pretrained` and for vLLM."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from retrain.models.forward import unwrap
from retrain.models.load import Policy
from retrain.types import UserError

CRITIC_FILE = Path("critic", "critic.safetensors")
"""In a directory of its own: servers load every safetensors file beside the model's."""

UNTIED_FILE = "untied.safetensors"
"""The output layer, where a tied model is saved as an untied one."""


def save_policy(
    policy: Policy,
    directory: Path,
    *,
    merge_lora: bool = False,
    critic: nn.Module | None = None,
) -> Path:
    """Write model and tokenizer into `directory`, which is made if it is not there.

    A LoRA policy saves its adapter; with `merge_lora`, or when there is no base on disk that the
    adapter could be put on, it saves the merged weights. Of a critic it saves what trains.

    Raises:
        OSError: the disk is full or not writable.
    """
    model: Any = policy.model
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload") and (merge_lora or policy.base is None):
        model = copy.deepcopy(model).merge_and_unload()
    with _as_os_errors(), _without_progress_bars():
        model.save_pretrained(directory)
        policy.tokenizer.save_pretrained(directory)
        if critic is not None:
            (directory / CRITIC_FILE).parent.mkdir(exist_ok=True)
            save_file(trained(critic), directory / CRITIC_FILE)
    _share(directory)
    return directory


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or not writable.
    """
    with _as_os_errors():
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(_mode(path.parent))


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Those of transformers, which shows one for each file."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()  # type: ignore[no-untyped-call]


def holds(directory: Path, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the model files in a directory have tensors of these names and shapes."""
    found: dict[str, list[int]] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return all(found.get(name) == list(tensor.shape) for name, tensor in weights.items())


def restore(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into what trains of a module.

    Raises:
        UserError: they are not those of a module of this make.
    """
    own = trained(module)
    if {n: t.shape for n, t in own.items()} != {n: weights[n].shape for n in own if n in weights}:
        raise UserError(
            f"the weights saved are not those of this {type(module).__name__}",
            "Resume with the model, and the packages, that the run began with.",
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


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
    own = trained(critic)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(
            f"the critic in {path} is of another make than this one",
            "Use the model and the critic.backbone that it was saved with.",
        )
    restore(critic, saved)


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name."""
    return {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}


def _share(root: Path) -> None:
    """Let whoever may read the directory read its files: safetensors makes them the owner's."""
    for path in root.rglob("*"):
        if path.is_file():
            path.chmod(_mode(root))


def _mode(directory: Path) -> int:
    """Of a file that those may read, and write, who may list or change its directory."""
    return directory.stat().st_mode & 0o666


def save_adapter(policy: Policy, directory: Path) -> None:
    """Write the LoRA adapter alone.

    Raises:
        OSError: the disk is full or not writable.
    """
    model: Any = policy.model
    with _as_os_errors(), _without_progress_bars():
        model.save_pretrained(directory)
    _share(directory)


def save_untied(model: nn.Module, directory: Path) -> None:
    """Make the saved model of a directory one whose output layer has weights of its own, equal to
    those of the embeddings that it shares in `model`.

    Raises:
        OSError: the disk is full or not writable.
    """
    plain = unwrap(model)
    output: Any = plain.get_output_embeddings()
    name = next(name for name, module in plain.named_modules() if module is output)
    save_tensors({f"{name}.weight": output.weight}, directory / UNTIED_FILE)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["weight_map"][f"{name}.weight"] = UNTIED_FILE
        index.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    config = directory / "config.json"
    changed = json.loads(config.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    config.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
