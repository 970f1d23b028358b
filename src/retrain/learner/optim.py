"""Optimizers and schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from retrain.learner.muon import Muon

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate's share of its peak, by step; linear warm-up, then the named curve."""

    name: ScheduleName = "constant"
    total_steps: int = 1
    warmup_steps: int = 0
    min_ratio: float = 0.1

    def factor(self, step: int) -> float:
        """Of update `step`, counted from 0; the last of `total_steps` has `min_ratio`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        span = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        if self.name == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return 1.0 - (1.0 - self.min_ratio) * progress


def make_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: OptimizerName,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> list[torch.optim.Optimizer]:
    """AdamW on everything; or Muon on the matrices inside the layers and AdamW on the rest.

    Muon is scaled to match AdamW's update size, so one learning rate serves both. Embeddings,
    heads, norms and biases stay with AdamW; norms and biases do not decay.
    """
    matrices: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter_name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and 1 not in parameter.shape and not _is_table(parameter_name):
            matrices.append(parameter)
        else:
            tables.append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon" and matrices:
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay))
        matrices = []
    groups = [
        {"params": [*matrices, *tables], "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = learning_rate
    return optimizers


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What optimizers remember of the steps they made, by `optimizer/parameter/name`."""
    return {
        f"{number}/{parameter}/{name}": tensor
        for number, optimizer in enumerate(optimizers)
        for parameter, remembered in optimizer.state_dict()["state"].items()
        for name, tensor in remembered.items()
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, into optimizers of the same make."""
    remembered: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        number, parameter, name = key.split("/")
        remembered[int(number)].setdefault(int(parameter), {})[name] = tensor
    for optimizer, state in zip(optimizers, remembered, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _is_table(parameter_name: str) -> bool:
    return any(part in parameter_name for part in ("embed", "lm_head", "wte", "wpe"))
