"""Packed sequences: the layout, and in float64 the very gradients of the sequences on their own."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from retrain.algorithms import gspo, ppo_clip
from retrain.learner import PolicyObjective, TorchLearner
from retrain.models import tree as packing
from retrain.models.scores import scores, selected_logprobs
from retrain.models.tree import build_tree, packs_exactly
from retrain.types import Sample
from test_forward import tiny_gemma2, tiny_lora, tiny_mamba
from test_learner import exact, gradients
from tiny import VOCAB, seeded, tiny_gpt2, tiny_llama, tiny_qwen3

ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=7)


@given(ids)
@settings(deadline=None, max_examples=200)
def test_a_tree_holds_every_prefix_once_and_shows_each_token_its_ancestors(
    rows: list[list[int]],
) -> None:
    tree = build_tree([np.array(row, dtype=np.int32) for row in rows])
    prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert len(tree.token_ids) == len(prefixes)
    for number, row in enumerate(rows):
        path = tree.index[number, : len(row)]
        assert tree.token_ids[path].tolist() == row
        assert tree.positions[path].tolist() == list(range(len(row)))
        for depth, token in enumerate(path):
            sees = [j for j in range(token + 1) if token < tree.last[j]]
            assert sees == path[: depth + 1].tolist()


@given(ids, st.integers(1, 6))
@settings(deadline=None, max_examples=200)
def test_blocks_cover_every_query_with_all_its_ancestors(rows: list[list[int]], size: int) -> None:
    tree = build_tree([np.array(row, dtype=np.int32) for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_CPU", size)
        mask = packing.TreeMask.of(tree, torch.device("cpu"))
    seen = np.zeros((len(tree.token_ids),) * 2, dtype=bool)
    for number, block in enumerate(mask.blocks):
        parts = (*(mask.blocks[n] for n in block.ancestors), block)
        keys = [j for part in parts for j in range(part.start, part.stop)]
        visible = mask.visible(number, None)
        if visible is None:
            visible = torch.ones(block.stop - block.start, len(keys)).tril().bool()
        assert not seen[block.start : block.stop].any()
        for query, row in enumerate(visible.tolist(), start=block.start):
            seen[query, [key for key, one in zip(keys, row, strict=True) if one]] = True
    query, key = np.indices(seen.shape)
    assert (seen == ((key <= query) & (query < tree.last[key]))).all()


def tiny_grouped_untied() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    return seeded(LlamaForCausalLM, config)


def tiny_mistral() -> Any:
    """A sliding window shorter than the sequences."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        sliding_window=7,
    )  # fmt: skip
    return seeded(MistralForCausalLM, config)


def tiny_moe() -> Any:
    config = Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    return seeded(Qwen2MoeForCausalLM, config)


PACKING = [tiny_qwen3, tiny_llama, tiny_grouped_untied, tiny_gpt2, tiny_lora, tiny_mistral]


def family(groups: int = 3, members: int = 4, *, system: int = 12, seed: int = 0) -> list[Sample]:
    """Groups of rollouts: a system prompt that all share, a question a group, ragged answers with
    a tool's words among them; and in each group a rollout that forks."""
    generator = random.Random(seed)

    def words(count: int) -> list[int]:
        return [generator.randrange(1, VOCAB) for _ in range(count)]

    samples: list[Sample] = []
    preface = words(system)
    for group in range(groups):
        question = preface + words(generator.randrange(4, 9))
        for member in range(members):
            answer = words(generator.randrange(5, 12))
            trains = [0] * len(question) + [int(not 2 <= i < 4) for i in range(len(answer))]
            name = f"{group}/{member}"
            samples.append(sample_of(question + answer, trains, name, group, generator))
            if member == 0:
                branch = question + answer[:3] + words(6)
                late = [0] * (len(question) + 3) + [1] * 6
                samples.append(sample_of(branch, late, name, group, generator))
    return samples


def sample_of(
    tokens: Sequence[int], trains: Sequence[int], name: str, group: int, generator: random.Random
) -> Sample:
    advantage = generator.uniform(-2, 2)
    return Sample(
        token_ids=array("i", tokens),
        loss_mask=array("B", trains),
        rollout_id=name,
        group_id=str(group),
        behavior_logprobs=array("f", [-5.0] * len(tokens)),
        old_logprobs=array("d", [generator.uniform(-6.5, -5) for _ in tokens]),
        advantages=array("d", [advantage] * len(tokens)),
    )


CLIP = PolicyObjective(lambda lp, old, adv, mask, seq: ppo_clip(lp, old, adv, mask))
BY_SEQUENCE = PolicyObjective(
    lambda lp, old, adv, mask, seq: gspo(
        lp, old, adv, mask, clip_low=0.3, clip_high=0.3, sequences=seq
    ),
    entropy_coefficient=0.1,
)


def trained(
    model: Any, samples: Sequence[Sample], objective: PolicyObjective, **settings: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.zero_grad()
    learner = TorchLearner(model, learning_rate=1e-3, **settings)
    totals = learner.forward_backward(
        samples,
        objective,
        "sequence_mean",
        whole_rollouts=objective is BY_SEQUENCE,
        skip_zero_advantages=False,
        entropy_gradient=True,
    )
    return totals, gradients(model)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("objective", [CLIP, BY_SEQUENCE], ids=["ppo_clip", "gspo"])
@pytest.mark.parametrize("make", PACKING, ids=lambda make: make.__name__)
def test_packed_gradients_are_those_of_the_sequences_on_their_own(
    make: Callable[[], Any], objective: PolicyObjective
) -> None:
    model, samples = exact(make), family()
    assert packs_exactly(model)
    whole, reference = trained(model, samples, objective, share_prefixes=False)
    for budget in (10_000, 60, 1):
        totals, own = trained(model, samples[::-1], objective, micro_batch_tokens=budget)
        assert_equal(own, reference)
        assert totals == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_size_of_blocks_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = exact(tiny_mistral), family(system=40)
    _, reference = trained(model, samples, CLIP, share_prefixes=False)
    monkeypatch.setattr(packing, "BLOCK_CPU", block)
    _, own = trained(model, samples, CLIP)
    assert_equal(own, reference)


def test_packing_works_under_gradient_checkpointing() -> None:
    model, samples = exact(tiny_qwen3), family()
    _, reference = trained(model, samples, CLIP, share_prefixes=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, own = trained(model, samples, CLIP)
    assert_equal(own, reference)


def test_every_shared_token_is_run_once() -> None:
    model, samples = tiny_qwen3(), family()
    assert packs_exactly(model)
    run: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: run.append(inputs[0].numel())
    )
    TorchLearner(model, learning_rate=1e-3).forward_backward(samples, CLIP)
    hook.remove()
    # all tokens but the last of each sequence, whose prediction nobody asks for
    prefixes = {tuple(s.token_ids[: end + 1]) for s in samples for end in range(len(s) - 1)}
    assert run == [len(prefixes)]


@pytest.mark.parametrize(
    ("make", "reason"), [(tiny_mamba, "not sdpa"), (tiny_gemma2, "not sdpa")],
    ids=["recurrent", "eager"],
)  # fmt: skip
def test_where_packing_is_not_exact_sequences_run_on_their_own(
    make: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, samples = make().double(), family(1)
    assert not packs_exactly(model)
    assert "shared prefixes are computed anew" in caplog.text and reason in caplog.text
    totals, _ = trained(model, samples, CLIP)
    whole, _ = trained(model, samples, CLIP, share_prefixes=False)
    assert totals == pytest.approx(whole)


def test_attention_that_does_not_see_the_tree_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen3()
    monkeypatch.setattr(packing.TreeMask, "attend", lambda mask, query, *_: query.transpose(1, 2))
    assert not packs_exactly(model)


def test_experts_pack_too() -> None:
    """In fp32: their kernel knows no float64."""
    model, samples = tiny_moe(), family()
    assert packs_exactly(model)
    whole, _ = trained(model, samples, CLIP, share_prefixes=False)
    totals, _ = trained(model, samples, CLIP)
    assert totals == pytest.approx(whole, abs=1e-4)


def test_other_masks_still_go_the_usual_way() -> None:
    model = tiny_qwen3()
    before = model(input_ids=torch.arange(1, 9)[None]).logits
    assert packs_exactly(model)
    padded = model(
        input_ids=torch.arange(0, 9)[None], attention_mask=torch.tensor([[0] + [1] * 8]),
        position_ids=torch.tensor([[0, *range(8)]]),
    ).logits  # fmt: skip
    torch.testing.assert_close(model(input_ids=torch.arange(1, 9)[None]).logits, before)
    torch.testing.assert_close(padded[:, 1:], before, atol=1e-5, rtol=1e-5)


def test_entropy_and_its_gradient_are_those_of_the_full_distribution() -> None:
    model = exact(tiny_qwen3)
    token_ids = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 4:] = True
    lengths = torch.full((3,), 9)
    logits = model(input_ids=token_ids).logits / 0.7
    plain = torch.distributions.Categorical(logits=logits).entropy()[:, 3:8].flatten()
    plain.sum().backward()
    reference = gradients(model)
    for chunk in (10_000_000, 2 * VOCAB):
        model.zero_grad()
        found = scores(
            model, token_ids, lengths, mask, 0.7, entropy_gradient=True, logits_per_chunk=chunk
        )
        torch.testing.assert_close(found.entropy, plain)
        found.entropy.sum().backward()
        assert_equal(gradients(model), reference)
    assert not scores(model, token_ids, lengths, mask).entropy.requires_grad


def test_no_logits_of_the_whole_batch_exist() -> None:
    model = tiny_qwen3()
    token_ids = torch.randint(1, VOCAB, (4, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[:, 0] = False
    assert packs_exactly(model)  # so that its probe is not counted
    largest: list[int] = []
    model.lm_head.register_forward_hook(lambda *args: largest.append(args[2].numel()))
    chunk = 8 * VOCAB
    selected_logprobs(
        model, token_ids, torch.full((4,), 30), mask, logits_per_chunk=chunk
    ).sum().backward()
    assert max(largest) <= chunk and sum(largest) == 2 * 4 * 29 * VOCAB
