"""What a checkpoint holds besides the policy, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import base64
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
    position: dict[str, Any] = field(default_factory=dict)
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
    generators: dict[str, Any] = field(default_factory=dict)
    """The states of Python's, NumPy's and torch's own random generators."""

    def put_generators(self) -> None:
        """Go on with the numbers that the generators would have given."""
        version, words, gauss = self.generators["python"]
        random.setstate((version, tuple(words), gauss))
        numpy = self.generators["numpy"]
        key = np.array(numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
        torch.set_rng_state(_unpacked(self.generators["torch"]))
        if "cuda" in self.generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(_unpacked(self.generators["cuda"]))


def generators() -> dict[str, Any]:
    """What `RunState.generators` holds, as JSON has it."""
    numpy: Any = np.random.get_state(legacy=False)
    states = {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _packed(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _packed(torch.cuda.get_rng_state())
    return states


def _packed(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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

    def restore(self, saved: Saved) -> None:
        """Put back what a checkpoint of the same stage has."""
        self.learner.restore(_below("learner/", saved.tensors), saved.state.updates)
        if self.learner.critic is not None:
            load_critic(self.learner.critic, saved.path)
        if self.reference is not None:
            self.reference.restore(_below("reference/", saved.tensors))


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read back."""

    path: Path
    state: RunState
    tensors: dict[str, Tensor]

    def check_steps(self, steps: int) -> None:
        """
        Raises:
            UserError: the stage is to end after fewer steps than it has made.
        """
        if self.state.step > steps:
            raise UserError(
                f"{self.state.stage} is to have {steps} steps now, and has made {self.state.step}",
                "Give at least as many, or start a new run.",
            )

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
    (directory / STATE_FILE).parent.mkdir()
    save_tensors(tensors, directory / TENSORS_FILE)
    text = json.dumps(asdict(state)) + "\n"
    (directory / STATE_FILE).write_text(text, encoding="utf-8")


def read_saved(checkpoint: Checkpoint) -> Saved:
    """The state in a checkpoint.

    Raises:
        UserError: it has none, or one of another version.
    """
    path = checkpoint.path
    try:
        state = RunState(**json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
        return Saved(path, state, load_file(path / TENSORS_FILE))
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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
