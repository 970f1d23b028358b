"""Traces of unlike lengths in one row: no padding is run, and none of them sees another."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from retrain.learner import TorchLearner, collate, sft_loss
from retrain.models.scores import scores
from retrain.models.tree import build_tree, packs_exactly
from retrain.types import Sample
from test_learner import exact, gradients
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_qwen3

LENGTHS = (3, 41, 7, 90, 12, 5, 150, 28)
MODELS = [tiny_qwen3, tiny_llama, tiny_gpt2]


def ragged(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Sample]:
    """Traces that begin with different tokens; about half of their tokens train."""
    generator = random.Random(seed)
    samples = []
    for number, length in enumerate(lengths):
        words = [generator.randrange(1, VOCAB) for _ in range(length - 1)]
        trains = [int(generator.random() < 0.5) for _ in range(length - 2)]
        samples.append(
            Sample(
                token_ids=array("i", [number + 1, *words]),
                loss_mask=array("B", [0, *trains, 1]),
                rollout_id=str(number),
                group_id=None,
                objective="cross_entropy",
                behavior_logprobs=array("f", bytes(4 * length)),
            )
        )
    return samples


def trained(
    model: Any, samples: Sequence[Sample], **settings: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    learner = TorchLearner(model, learning_rate=1e-3, **settings)
    return learner.forward_backward(samples, sft_loss)["loss"], gradients(model)


def tokens_run(model: Any, samples: Sequence[Sample]) -> list[int]:
    """Of each forward pass."""
    run: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: run.append(inputs[0].numel())
    )
    TorchLearner(model, learning_rate=1e-3).forward_backward(samples, sft_loss)
    hook.remove()
    return run


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_pack_has_the_loss_and_the_gradient_of_the_traces_alone(
    make: Callable[[], Any],
) -> None:
    model, samples = exact(make), ragged()
    assert packs_exactly(model)
    tokens = sum(sum(sample.loss_mask) for sample in samples)
    alone: dict[str, torch.Tensor] = {}
    total = 0.0
    for sample in samples:
        own = sum(sample.loss_mask) / tokens
        loss, gradient = trained(model, [sample], share_prefixes=False)
        total += own * loss
        alone = {name: alone.get(name, 0.0) + own * g for name, g in gradient.items()}
    for packing in (
        {},  # one pack
        {"micro_batch_tokens": 160},  # several
        {"share_prefixes": False},  # padded
    ):
        loss, gradient = trained(model, samples, **packing)
        assert loss == pytest.approx(total, abs=1e-12)
        for name, expected in alone.items():
            torch.testing.assert_close(gradient[name], expected, atol=1e-12, rtol=1e-10)


def test_padding_is_not_run() -> None:
    """All tokens but the last of each trace, from which nothing is predicted."""
    model = tiny_qwen3()
    assert packs_exactly(model)
    assert tokens_run(model, ragged()) == [sum(LENGTHS) - len(LENGTHS)]
    # Where padding is less than a fifth, attention without a mask is cheaper than a pack.
    assert tokens_run(model, ragged([40, 41, 39])) == [3 * 40]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_words_of_one_trace_change_nothing_in_another(make: Callable[[], Any]) -> None:
    """Neither its log-probabilities nor the gradient of its loss, to the last bit."""
    model, samples = exact(make), ragged()
    others = ragged(seed=1)
    watched = 4

    def of_watched(neighbours: Sequence[Sample]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pack = [*neighbours[:watched], samples[watched], *neighbours[watched + 1 :]]
        batch = collate(pack, [1.0] * len(pack))
        model.zero_grad()
        found = scores(model, batch.token_ids, batch.lengths, batch.mask)
        own = found.logprobs[batch.mask.nonzero()[:, 0] == watched]
        own.sum().backward()  # type: ignore[no-untyped-call]
        return own.detach(), gradients(model)

    logprobs, gradient = of_watched(samples)
    same, unchanged = of_watched(others)
    assert len(logprobs) == sum(samples[watched].loss_mask)
    torch.testing.assert_close(same, logprobs, atol=0, rtol=0)
    assert gradient.keys() == unchanged.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(unchanged[name], value, atol=0, rtol=0, msg=name)


def test_positions_start_anew_with_every_trace() -> None:
    rows = [np.asarray(sample.token_ids) for sample in ragged()]
    tree = build_tree(rows)
    for number, row in enumerate(rows):
        own = tree.index[number, : len(row)]
        assert tree.positions[own].tolist() == list(range(len(row)))
        assert own.tolist() == list(range(own[0], own[0] + len(row)))  # end to end
    model = tiny_gpt2()  # it has 256 positions, and learns one vector for each
    assert packs_exactly(model) and sum(LENGTHS) > 256
    _, gradient = trained(model, ragged())
    used = gradient["transformer.wpe.weight"].abs().sum(1) > 0
    assert used.tolist() == [position < max(LENGTHS) - 1 for position in range(256)]
