"""How far a policy is from a teacher, at each token.

The policy's log-probabilities of candidates are [..., K + 1]: of the teacher's K likeliest tokens,
and last of all other tokens together. A teacher's are [..., K], -inf where it has fewer than K.
With all of the vocabulary among the candidates both divergences are exact; with fewer they are
those of the two distributions with the other tokens merged into one, a lower bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrain.algorithms.masking import masked

LEAST_LOGPROB = -100.0
"""What a teacher's log-probability counts as at least, so that a token that it never gives has a
finite loss."""

LEAST_REST = -1e30
"""The policy's log-probability of all other tokens is below this where there are none."""


def sampled_reverse_kl(logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`log policy - log teacher` of tokens that the policy sampled, [B, T], without a gradient.

    Its mean over samples is KL(policy, teacher), and what a policy gradient takes off the advantage
    of each token by itself (on-policy distillation: Agarwal et al. 2024, arXiv:2306.13649; Gu et
    al. 2024, arXiv:2306.08543; Lu et al. 2025, "On-Policy Distillation"). Zero outside the mask and
    where the teacher's is NaN: it says nothing of that token.
    """
    speaks = mask & ~torch.isnan(teacher_logprobs)
    return masked(logprobs.detach() - teacher_logprobs.clamp(min=LEAST_LOGPROB), speaks)


def top_reverse_kl(candidates: Tensor, teacher: Tensor) -> Tensor:
    """KL(policy, teacher) over the teacher's likeliest tokens and the rest as one, [...].

    `sum_k p(k) (log p(k) - log t(k)) + p(rest) (log p(rest) - log t(rest))`, differentiable in the
    policy's. t(rest) counts as no less than what fp32 can tell from nothing.
    """
    given, rest, has_rest = _parts(candidates, teacher)
    held = torch.where(given, teacher, 0.0)
    own = torch.where(given, candidates[..., :-1], 0.0)
    heads = torch.where(given, own.exp() * (own - held.clamp(min=LEAST_LOGPROB)), 0.0).sum(-1)
    least = torch.finfo(torch.float32).eps
    tail = torch.where(has_rest, candidates[..., -1], 0.0)
    return heads + torch.where(has_rest, tail.exp() * (tail - rest.clamp(min=least).log()), 0.0)


def top_forward_kl(candidates: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, policy) over the teacher's likeliest tokens and the rest as one, [...].

    `sum_k t(k) (log t(k) - log p(k)) + t(rest) (log t(rest) - log p(rest))`, differentiable in the
    policy's (Hinton et al. 2015, arXiv:1503.02531, without its factor of the squared temperature).
    """
    given, rest, has_rest = _parts(candidates, teacher)
    held = torch.where(given, teacher, 0.0)
    own = torch.where(given, candidates[..., :-1], 0.0)
    heads = torch.where(given, held.exp() * (held - own), 0.0).sum(-1)
    tail = torch.where(has_rest, candidates[..., -1], 0.0)
    return heads + torch.where(has_rest, torch.xlogy(rest, rest) - rest * tail, 0.0)


def _parts(candidates: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which candidates there are, what the teacher leaves to other tokens, and whether there are
    any."""
    given = ~torch.isnan(teacher) & (teacher > -torch.inf)
    held = torch.where(given, teacher, -torch.inf).exp().sum(-1)
    return given, (1 - held).clamp(min=0), candidates[..., -1] > LEAST_REST
