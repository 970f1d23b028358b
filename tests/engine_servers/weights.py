"""Models as a server holds them: the policy, what it was before, and adapters on top."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retrain.engines.torch_engine import TorchEngine

MAX_SLOTS = 64

_LOADING = threading.Lock()
"""Loading changes what transformers keeps for all threads: servers of one process take turns."""


@dataclass(eq=False)
class Weights:
    """A model, and the engine that samples from it."""

    model: Any
    engine: TorchEngine


@dataclass(frozen=True)
class Adapter:
    name: str
    path: str
    weights: Weights


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def load_weights(directory: Path, *, head_of: Any = None) -> Weights:
    """The model of a directory; with the output head of another one, if that is given.

    Raises:
        OSError, ValueError: there is none.
    """
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a directory with a config.json")
    with _LOADING:
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        for more in directory.glob("*.safetensors"):  # as real servers do
            if more.name != "model.safetensors":
                model.load_state_dict(load_file(more), strict=False)
    if head_of is not None:
        model.set_output_embeddings(copy.deepcopy(head_of.get_output_embeddings()))
    return ready(model)


def load_adapter(base: Weights, directory: Path) -> Weights:
    """A copy of the base with a PEFT adapter on top.

    Raises:
        OSError, ValueError: the directory holds none that fits.
    """
    from peft import PeftModel

    with _LOADING:
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(directory)).eval()
    return ready(model)


def adapter_rank(directory: Path) -> int:
    """
    Raises:
        OSError, ValueError: the directory holds no adapter.
    """
    found: int = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return found


def ready(model: Any) -> Weights:
    model.requires_grad_(False)
    return Weights(model, TorchEngine(model, max_slots=MAX_SLOTS, num_threads=1))
