"""The critic: what the rest of a rollout is worth, before each token is sampled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from retrain.models.forward import architecture_setting
from retrain.models.scores import predictor_states


class Critic(nn.Module):
    """A value head, on hidden states of a backbone of its own or on the policy's.

    V(s_t) is read from the state that token t is predicted from. The head starts at zero.

    Args:
        policy: a causal LM; `own_backbone` copies it, and trains of the copy what trains of it.
    """

    def __init__(self, policy: nn.Module, *, own_backbone: bool = True) -> None:
        super().__init__()
        first = next(policy.parameters())
        self.head = nn.Linear(architecture_setting(policy, "hidden_size"), 1, device=first.device)
        if first.dtype == torch.float64:
            self.head.double()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.backbone: Any = _headless(policy) if own_backbone else None

    def values(
        self,
        token_ids: Tensor,
        mask: Tensor,
        policy_hidden: Tensor | None = None,
        *,
        share_prefixes: bool = True,
    ) -> Tensor:
        """[M] values before each masked token of `token_ids` [B, T], in `mask.nonzero()` order.

        `policy_hidden` [M, D] are the policy's states, which a critic without a backbone needs.
        """
        if self.backbone is None:
            assert policy_hidden is not None
            hidden = policy_hidden
        else:
            hidden = predictor_states(self.backbone, token_ids, mask, share_prefixes=share_prefixes)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values


def _headless(policy: nn.Module) -> nn.Module:
    """A copy whose output head takes no gradient: values are read below it."""
    backbone = copy.deepcopy(policy)
    inner: Any = backbone
    head = inner.get_output_embeddings()
    tied = head.weight is inner.get_input_embeddings().weight
    if not tied:
        head.requires_grad_(False)
    return backbone
