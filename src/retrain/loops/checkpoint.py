"""What a checkpoint holds besides the policy, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retrain.learner import Critic, Reference, TorchLearner
from retrain.models import Policy, holds, load_critic, restore, save_tensors, trained
from retrain.models.save import CRITIC_FILE
from retrain.tracking.checkpoints import Checkpoint
from retrain.types import UserError

STATE_FILE = Path("resume", "state.json")
TENSORS_FILE = Path("resume", "tensors.safetensors")


@dataclass
class RunState:
    """Where a run stands. Groups under way are none of it: a step that is not finished is sampled
    again, with the same seeds."""

    stage: str
    step: int
    """Steps of the stage that are done."""
    finished: bool
    """Whether the stage is done."""
    version: int
    """Of the policy."""
    evaluated: bool = True
    """Whether the evaluation that is due after `step` has been made."""
    position: dict[str, int | str] = field(default_factory=dict)
    """In the stage's data."""
    updates: int = 0
    """Of the stage's learner."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """Of rewards that have a state, by name."""
    critic: str | None = None
    """The critic's backbone."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """Of evaluations, for the table at the end."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Of the files of the run that only grow, in bytes."""


@dataclass(frozen=True)
class Training:
    """What a stage that trains has in memory besides the policy."""

    learner: TorchLearner
    reference: Reference | None = None

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"learner/{name}": t for name, t in self.learner.tensors().items()}
        if self.reference is not None:
            kept |= {f"reference/{name}": t for name, t in self.reference.tensors().items()}
        return kept

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        self.learner.restore(_below("learner/", tensors), updates)
        if self.reference is not None:
            self.reference.restore(_below("reference/", tensors))


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read back."""

    path: Path
    state: RunState
    tensors: dict[str, Tensor]
    random_state: dict[str, Any]

    def put_policy(self, policy: Policy) -> None:
        """The policy's weights are now those of the checkpoint.

        Raises:
            UserError: they do not fit the model.
        """
        weights = _below("policy/", self.tensors)
        if not weights:
            for file in sorted(self.path.glob("*.safetensors")):
                weights |= load_file(file)
        restore(policy.model, weights)

    def critic(self, policy: Policy) -> Critic | None:
        """The critic of the checkpoint, if it has one."""
        if self.state.critic is None:
            return None
        critic = Critic(policy.model, own_backbone=self.state.critic == "own")
        load_critic(critic, self.path)
        return critic

    def put_random_state(self) -> None:
        """Go on with the numbers that Python's, NumPy's and torch's own generators would give."""
        version, words, gauss = self.random_state["python"]
        random.setstate((version, tuple(words), gauss))
        legacy = self.random_state["numpy"]
        key = np.array(legacy["state"]["key"], dtype=np.uint32)
        np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
        torch.set_rng_state(self.tensors["random/torch"])
        if "random/cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["random/cuda"])


def write_state(
    directory: Path, state: RunState, policy: Policy, training: Training | None
) -> None:
    """Write everything but the policy's own files, which are there already, into a checkpoint.

    The policy's weights are written here too where its own files do not hold them one by one, as
    after merging an adapter.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors = {} if training is None else training.tensors()
    weights = trained(policy.model)
    if not holds(directory, weights):
        tensors |= {f"policy/{name}": tensor for name, tensor in weights.items()}
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    (directory / STATE_FILE).parent.mkdir()
    save_tensors(tensors, directory / TENSORS_FILE)
    record = asdict(state) | {"random": {"python": random.getstate(), "numpy": _numpy_state()}}
    (directory / STATE_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_saved(checkpoint: Checkpoint) -> Saved:
    """The state in a checkpoint.

    Raises:
        UserError: it has none, or one of another version.
    """
    path = checkpoint.path
    try:
        record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        random_state = record.pop("random")
        state = RunState(**record)
        return Saved(path, state, load_file(path / TENSORS_FILE), random_state)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be resumed from: {type(error).__name__}: {error}",
            "It was written by another version of retrain; name it as model.name_or_path to begin "
            "a new run with its weights.",
        ) from error


def backbone(critic: Critic | None) -> str | None:
    """The kind of a critic, as its config key has it."""
    if critic is None:
        return None
    return "shared" if critic.backbone is None else "own"


def has_critic(path: Path) -> bool:
    return (path / CRITIC_FILE).is_file()


def _numpy_state() -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=False)
    inner = {**legacy["state"], "key": legacy["state"]["key"].tolist()}
    return {**legacy, "state": inner}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
