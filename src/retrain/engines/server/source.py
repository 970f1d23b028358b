"""The policy that trains, written down for servers."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retrain.models import Policy, save_policy
from retrain.models.forward import unwrap
from retrain.models.save import save_adapter, save_untied
from retrain.models.scores import selected_logprobs

_AT_FIRST = (
    "It may run in another dtype than model.torch_dtype (give it --dtype), run another model, or "
    "give log-probabilities before temperature (vLLM wants --logprobs-mode processed_logprobs)."
)
_LATER = "It may have kept earlier weights."
_TIED = (
    " This model ties its embeddings: vLLM on a CPU keeps its old output layer; set "
    "engine.untie_embeddings: true, and let the run start the server, or start it from an untied "
    "copy of the model."
)


class PolicySource:
    """`weights.Source` over a policy in this process.

    Args:
        adapter: give servers the LoRA adapter only; else the whole model, with one merged into it.
        untie: write tied embeddings twice, as an untied model has them; None does so for servers
            on CPUs.
    """

    def __init__(self, policy: Policy, *, adapter: bool, untie: bool | None = None) -> None:
        self._policy = policy
        self.adapter = adapter
        self._untie = untie

    def serve_on_cpu(self) -> None:
        if self._untie is None:
            self._untie = True

    def advice(self, first: bool) -> str:
        tied = self.tied and not (self._untie or self.adapter)
        return (_AT_FIRST if first else _LATER) + (_TIED if tied else "")

    @property
    def tied(self) -> bool:
        """Whether the output layer is that of the embeddings."""
        return bool(unwrap(self._policy.model).config.tie_word_embeddings)

    def write(self, directory: Path) -> None:
        model: Any = self._policy.model
        if self.adapter:
            save_adapter(self._policy, directory)
            return
        save_policy(self._policy, directory, merge_lora=hasattr(model, "merge_and_unload"))
        if self._untie and self.tied:
            save_untied(self._policy.model, directory)

    def write_base(self, directory: Path) -> Path | str:
        base = self._policy.base
        if base is not None and (local := Path(base).expanduser()).exists():
            return local.resolve()
        model: Any = copy.deepcopy(self._policy.model)
        save_policy(Policy(model.unload(), self._policy.tokenizer), directory)
        return directory

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int], temperature: float) -> array[float]:
        model = self._policy.model
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        ids = torch.tensor([list(token_ids)], device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        lengths = torch.tensor([len(token_ids)], device=device)
        found = selected_logprobs(model, ids, lengths, mask, temperature)[0]
        model.train(training)
        return array("f", found.tolist())
