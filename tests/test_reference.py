"""The reference: the policy as it was, for whole models and for adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import retrain
from retrain.learner import Reference, TorchLearner
from runs import hyperparameters, metrics_of, rl_config, sft_section
from test_forward import tiny_lora
from test_learner import exact, policy_samples
from test_update import of_tokens, shaken, three_groups, unheard, updating
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

IDS = torch.tensor([[5, 6, 7, 8]])


def new_lora() -> Any:
    """An adapter that adds nothing yet."""
    torch.manual_seed(0)
    how = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_qwen3(), how).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def moved(model: Any, seed: int = 5) -> Tensor:
    """Train a little, in a random direction; what the model then says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.05)
    return logits(model)


def of_reference(reference: Reference) -> Tensor:
    with reference.model() as model:
        return logits(model)


EVERY = [tiny_gpt2, tiny_llama, tiny_qwen3, new_lora, tiny_lora]


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_the_reference_stays_and_the_policy_does_not_notice(make: Any) -> None:
    policy = make()
    before = logits(policy)
    reference = Reference(policy)
    now = moved(policy)
    assert (now - before).abs().max() > 1e-3
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    identities = [id(p) for p in policy.parameters()]
    trains = [p.requires_grad for p in policy.parameters()]
    assert torch.equal(of_reference(reference), before)
    assert torch.equal(logits(policy), now)
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())
    assert [id(p) for p in policy.parameters()] == identities, "the optimizer's are these"
    assert [p.requires_grad for p in policy.parameters()] == trains


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_a_refreshed_reference_is_the_policy_of_that_moment(make: Any) -> None:
    policy = make()
    reference = Reference(policy)
    for seed in (1, 2):
        now = moved(policy, seed)
        reference.refresh()
        assert torch.equal(of_reference(reference), now)
    moved(policy, 3)
    assert torch.equal(of_reference(reference), now)


def test_an_adapter_that_adds_nothing_again_is_a_reference_too() -> None:
    policy = new_lora()
    before = logits(policy)
    moved(policy)
    reference = Reference(policy)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.zero_()
    reference.refresh()
    assert torch.equal(of_reference(reference), before)


def test_a_failure_inside_the_block_leaves_the_policy_as_it_is() -> None:
    for make in (new_lora, tiny_lora):
        policy = make()
        reference = Reference(policy)
        now = moved(policy)
        with pytest.raises(KeyError), reference.model():
            raise KeyError("oops")
        assert torch.equal(logits(policy), now)


def test_a_whole_model_is_copied_and_frozen_and_an_adapter_is_not_copied() -> None:
    policy = tiny_gpt2()
    with Reference(policy).model() as copied:
        assert not any(p.requires_grad for p in copied.parameters())
        own = {p.data_ptr() for p in policy.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in copied.parameters())
        assert not copied.training
    for make in (new_lora, tiny_lora):
        policy = make()
        with Reference(policy).model() as model:
            assert model is policy


@pytest.mark.parametrize("make", [tiny_gpt2, new_lora, tiny_lora], ids=lambda m: m.__name__)
@pytest.mark.parametrize("tokens", [10_000, 12])
def test_samples_get_the_references_log_probabilities(make: Any, tokens: int) -> None:
    """Those at the temperature of sampling, and of the reference and not of the policy."""
    policy = exact(make)
    then = copy.deepcopy(policy)
    reference = Reference(policy)
    moved(policy)
    samples = policy_samples()
    learner = TorchLearner(policy, learning_rate=1e-3, temperature=0.7, micro_batch_tokens=tokens)
    learner.attach_reference(samples, reference)
    learner.attach_old_logprobs(samples)
    for one in samples:
        with torch.no_grad():
            tables = of_tokens(then, one), of_tokens(policy, one)
        assert one.ref_logprobs is not None and one.old_logprobs is not None
        for t, trains in enumerate(one.loss_mask):
            if trains:
                past, now = (table[t, one.token_ids[t]].item() for table in tables)
                assert one.ref_logprobs[t] == pytest.approx(past, abs=1e-9)
                assert one.old_logprobs[t] == pytest.approx(now, abs=1e-9)
                assert abs(past - now) > 1e-6


@pytest.mark.parametrize("make", [tiny_gpt2, new_lora], ids=lambda make: make.__name__)
async def test_it_is_refreshed_every_so_many_steps(make: Any) -> None:
    model = exact(make)
    first = logits(model)
    update = updating(model, kl={"refresh_steps": 2}, learning_rate=0.01)
    assert update.reference is not None
    distances = []
    for step, expected in ((1, first), (2, None), (3, None)):
        samples = update.samples(three_groups())
        distances.append((update.learn(samples, step, unheard))["kl"])
        if step == 2:
            second = logits(model)
            assert (second - first).abs().max() > 1e-3
        found = of_reference(update.reference)
        assert torch.equal(found, second if expected is None else expected)
    assert distances == [pytest.approx(0.0, abs=1e-12), distances[1], pytest.approx(0.0, abs=1e-12)]
    assert distances[1] > 1e-6


def test_a_reference_of_a_model_that_was_shaken_is_the_shaken_one() -> None:
    model = tiny_qwen3()
    shaken(model)
    assert torch.equal(of_reference(Reference(model)), logits(model))


@pytest.mark.parametrize("peft", [None, {"r": 4, "alpha": 8}], ids=["whole model", "adapter"])
def test_after_sft_the_reference_is_what_sft_made(peft: Any, tmp_path: Path) -> None:
    """Its start is the start of the stage: the first step's divergence is zero, though SFT has
    left the weights of the file far behind."""
    first = retrain.run_sync(rl_config(tmp_path, sft=sft_section(steps=1)), only="sft")
    assert first.checkpoint is not None
    model: dict[str, Any] = {"name_or_path": str(first.checkpoint)}
    if peft is not None:
        model["peft"] = peft
    config = rl_config(
        tmp_path,
        model=model,
        sft=sft_section(steps=6, learning_rate=3e-2),
        algorithm={"hyperparameters": hyperparameters(kl={"coefficient": 0.1}, learning_rate=1e-2)},
        stages=[{"kind": "sft"}, {"kind": "rl"}],
    )
    result = retrain.run_sync(config)
    before, after = (
        AutoModelForCausalLM.from_pretrained(str(path))
        for path in (first.checkpoint, result.path / "checkpoints" / "sft")
    )
    assert (logits(before) - logits(after)).abs().max() > 0.05
    start, second = (row["kl"] for row in metrics_of(result.path))
    assert start == pytest.approx(0.0, abs=1e-9)
    assert second > 1e-6
