"""Optimizers and schedules against their definitions."""

import copy

import pytest
import torch
from torch import nn

from retrain.learner.muon import Muon, orthogonalise
from retrain.learner.optim import Schedule, make_optimizers


def test_muon_takes_the_steps_of_torch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(8, 24), (24, 8), (8, 24), (16, 16)]]
    theirs = copy.deepcopy(ours)
    a = Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(
        theirs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    for mine, other in zip(ours, theirs, strict=True):
        moved = 4 * 0.01 * 0.2 * max(mine.shape) ** 0.5
        assert (mine - other).abs().max() < 0.05 * moved  # torch rounds to bf16 on the way


def test_orthogonalise_flattens_the_spectrum() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 20) @ torch.diag(torch.linspace(0.2, 5, 20))
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_muon_gets_the_matrices_inside_the_layers_only() -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(5, 4),
            "proj": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "lm_head": nn.Linear(4, 5, bias=False),
        }
    )
    muon, adamw = make_optimizers(
        model.named_parameters(),
        name="muon",
        learning_rate=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.3,
    )
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(4, 4)]
    decayed, free = adamw.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (5, 4)]
    assert decayed["weight_decay"] == 0.3
    assert all(p.ndim == 1 for p in free["params"]) and free["weight_decay"] == 0.0


def test_schedules_by_hand() -> None:
    linear = Schedule("linear", total_steps=11, warmup_steps=0, min_ratio=0.1)
    assert linear.factor(0) == 1.0
    assert linear.factor(5) == pytest.approx(0.55)
    assert linear.factor(10) == pytest.approx(0.1)
    assert linear.factor(99) == pytest.approx(0.1)
    cosine = Schedule("cosine", total_steps=13, warmup_steps=2, min_ratio=0.2)
    assert [cosine.factor(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.factor(7) == pytest.approx(0.6)
    assert cosine.factor(12) == pytest.approx(0.2)
    assert Schedule("constant", 5, 2).factor(4) == 1.0
