"""The policy as it was: what a KL penalty measures the distance from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Reference:
    """A snapshot of the policy; `model()` gives it back for scoring.

    Of a full model it is a frozen copy. Of a PEFT model it is the same model with its adapters
    switched off, or with a copy of their weights put in where they no longer are an identity.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy: Any = policy
        self._copy: nn.Module | None = None
        self._adapters: list[Tensor] | None = None
        self.refresh()

    def refresh(self) -> None:
        """The reference is now the policy as it is."""
        with torch.no_grad():
            if not hasattr(self._policy, "disable_adapter"):
                self._refresh_copy()
            elif self._is_identity():
                self._adapters = None
            else:
                self._adapters = [p.detach().clone() for p in self._trainable()]

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of the policy, by the names of what trains of it; nothing where the model
        without its adapters is the reference."""
        names = [name for name, p in self._policy.named_parameters() if p.requires_grad]
        if self._copy is not None:
            kept = dict(self._copy.named_parameters())
            return {name: kept[name] for name in names}
        return dict(zip(names, self._adapters or [], strict=self._adapters is not None))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The reference is now what `tensors` gave."""
        if self._copy is None:
            names = [name for name, p in self._policy.named_parameters() if p.requires_grad]
            self._adapters = [tensors[name].clone() for name in names] if tensors else None
            return
        with torch.no_grad():
            for name, parameter in self._copy.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The reference, for forward passes without gradient inside the block only."""
        if self._copy is not None:
            yield self._copy
        elif self._adapters is None:
            with self._policy.disable_adapter():
                yield self._policy
        else:
            present = [parameter.data for parameter in self._trainable()]
            self._put(self._adapters)
            try:
                yield self._policy
            finally:
                self._put(present)

    def _refresh_copy(self) -> None:
        if self._copy is None:
            self._copy = copy.deepcopy(self._policy).requires_grad_(False).eval()
            return
        for kept, parameter in zip(self._copy.parameters(), self._policy.parameters(), strict=True):
            kept.copy_(parameter)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self._policy.parameters() if p.requires_grad]

    def _put(self, weights: list[Tensor]) -> None:
        for parameter, data in zip(self._trainable(), weights, strict=True):
            parameter.data = data

    def _is_identity(self) -> bool:
        """LoRA adds nothing while every B is zero."""
        ups = [p for name, p in self._policy.named_parameters() if "lora_B" in name]
        others = any(
            p.requires_grad and "lora_" not in name for name, p in self._policy.named_parameters()
        )
        return bool(ups) and not others and not any(bool(p.any()) for p in ups)
