"""Deterministic decoding: a request's bits are its own, whatever its company and its timing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from retrain.config import load_config
from retrain.engines import GenerateRequest, SamplingParams
from retrain.engines.base import Completion
from retrain.engines.exact import why_not_exact
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Environment
from retrain.loops.build import build_sampler
from retrain.types import UserError
from runs import rl_config
from scripted import plain_renderer
from tiny import VOCAB, seeded, tiny_gpt2, tiny_llama, tiny_qwen3

Result = list[tuple[bytes, bytes, str]]
RENDERER = plain_renderer("plain")
MODELS = pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_gpt2])


def conversation(number: int) -> list[list[int]]:
    """A prompt, and what is added to it after each of two turns; some begin alike."""
    own = random.Random(number)
    system = [1 + i % 50 for i in range(own.choice([0, 70, 70, 130]))]
    lengths = (own.choice([3, 20, 66]), own.choice([2, 40]), own.choice([1, 35]))
    return [system + words(own, lengths[0]), words(own, lengths[1]), words(own, lengths[2])]


def words(own: random.Random, count: int) -> list[int]:
    return [own.randrange(VOCAB) for _ in range(count)]


async def talk(engine: TorchEngine, number: int, pause: Callable[[], float]) -> Result:
    """Three turns; every second conversation is twin to the one before it but for its seed."""
    prompt: list[int] = []
    said: Result = []
    for turn, more in enumerate(conversation(number // 2)):
        await asyncio.sleep(pause())
        prompt += more
        params = SamplingParams(max_new_tokens=4 + number % 7, temperature=(1.0, 0.7)[number % 2])
        request = GenerateRequest(prompt, params, seed=10 * number + turn, session=str(number))
        completion = await engine.generate(request)
        prompt += completion.token_ids
        said.append(bits(completion))
    await engine.end_session(str(number))
    return said


def bits(completion: Completion) -> tuple[bytes, bytes, str]:
    return (
        completion.token_ids.tobytes(),
        completion.logprobs.tobytes(),
        completion.finish_reason,
    )


async def all_of(model: nn.Module, numbers: list[int], seed: int, slots: int) -> list[Result]:
    engine = TorchEngine(model, max_slots=slots, deterministic=True, num_threads=1)
    timing = random.Random(seed)
    results = await asyncio.gather(
        *(talk(engine, number, lambda: timing.random() / 50) for number in numbers)
    )
    await engine.close()
    return results


@MODELS
async def test_neither_company_nor_timing_nor_slots_change_a_bit(make: Callable[[], Any]) -> None:
    model = make()
    numbers = list(range(20))
    expected = await all_of(model, numbers, seed=1, slots=24)
    assert await all_of(model, numbers, seed=2, slots=24) == expected
    assert await all_of(model, numbers[::-1], seed=3, slots=8) == expected[::-1]
    for number in (0, 7, 12):
        assert await all_of(model, [number], seed=4, slots=16) == [expected[number]]


async def test_without_it_company_does_change_bits() -> None:
    """What the mode is for; should this fail, the mode costs more than it gives."""
    model = tiny_qwen3()
    request = GenerateRequest(list(range(1, 90)), SamplingParams(max_new_tokens=30), seed=5)
    others = [GenerateRequest(list(range(i, 60 + i)), request.params, i) for i in range(1, 7)]
    engine = TorchEngine(model, num_threads=1)
    alone = bits(await engine.generate(request))
    together = (await asyncio.gather(*map(engine.generate, [request, *others])))[0]
    await engine.close()
    assert bits(together) != alone


async def test_prompts_that_begin_alike_share_their_blocks_and_no_more() -> None:
    engine = TorchEngine(tiny_qwen3(), deterministic=True, num_threads=1)
    system = [7] * 150
    params = SamplingParams(max_new_tokens=3)
    requests = [GenerateRequest([*system, 1, 2, i], params, seed=i) for i in range(1, 5)]
    await engine.prepare()
    await asyncio.gather(*map(engine.generate, requests))
    assert engine.prefilled_tokens == 128 + (152 - 128)  # they differ in their last token only
    await engine.generate(GenerateRequest([*system, 9, 9, 9], params))
    assert engine.prefilled_tokens == 152 + (152 - 128)
    await engine.close()


async def test_a_session_that_waits_keeps_its_slot() -> None:
    """Nine sessions for eight slots: the ninth begins when one of the others ends."""
    engine = TorchEngine(tiny_qwen3(), max_slots=5, deterministic=True, num_threads=1)
    params = SamplingParams(max_new_tokens=2)
    for number in range(8):
        await engine.generate(GenerateRequest([1, 2, number], params, session=str(number)))
    ninth = asyncio.ensure_future(engine.generate(GenerateRequest([5], params, session="8")))
    await engine.generate(GenerateRequest([1, 2, 3, 4, 5, 6], params, session="3"))
    await asyncio.sleep(0.1)
    assert not ninth.done()
    await engine.end_session("0")
    assert len((await ninth).token_ids) == 2
    await engine.close()


def tiny_mixtral() -> Any:
    """Experts whose matrix products have as many rows as tokens happen to choose them."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        output_router_logits=False,
    )
    return seeded(MixtralForCausalLM, config)


def tiny_dynamic() -> Any:
    """Rotary frequencies that depend on the longest sequence of a batch."""
    config = tiny_llama(context=64).config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0}
    return seeded(LlamaForCausalLM, config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(tiny_mixtral, "a (block|step) of"), (tiny_dynamic, "its rotary tables change")],
)
async def test_architectures_whose_rows_depend_on_company_are_refused(
    make: Callable[[], Any], reason: str
) -> None:
    engine = TorchEngine(make(), max_slots=24, context_limit=200, deterministic=True)
    with pytest.raises(UserError, match=reason):
        await engine.prepare()
    await engine.close()


async def test_a_model_with_dynamic_rotary_tables_generates_and_learns() -> None:
    model = tiny_dynamic()
    engine = TorchEngine(model, context_limit=200, deterministic=None)
    prompts = [[5] * 90, [6] * 10]
    params = SamplingParams(max_new_tokens=5)
    found = await asyncio.gather(*(engine.generate(GenerateRequest(p, params)) for p in prompts))
    assert [len(completion.token_ids) for completion in found] == [5, 5]
    assert engine.restarts == 0
    await engine.close()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


class Uneven(nn.Module):
    """A layer whose result for a row depends on how many rows there are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out * (1 + 1e-6 * (x.shape[0] % 5))


def uneven() -> Any:
    model = tiny_qwen3()
    model.model.layers[0].mlp.down_proj = Uneven(model.model.layers[0].mlp.down_proj)
    return model


async def test_a_model_whose_bits_depend_on_company_is_found_out() -> None:
    assert why_not_exact(uneven(), 16, 256) == "a block of 2 prompts at 0"
    engine = TorchEngine(uneven(), max_slots=16, deterministic=True)
    with pytest.raises(UserError, match=r"other bits in other company.*2 prompts"):
        await engine.prepare()
    request = GenerateRequest([1, 2, 3], SamplingParams(max_new_tokens=2))
    with pytest.raises(UserError, match="deterministic: false"):
        await engine.generate(request)
    await engine.close()


async def test_no_more_rollouts_are_under_way_than_it_has_slots() -> None:
    config = load_config(rl_config(Path("unused"), rollout={"max_concurrency": 30}))
    for model, expected in ((tiny_qwen3(), 24), (uneven(), 30)):
        engine = TorchEngine(model, max_slots=17, deterministic=None)
        await engine.prepare()
        sampler = build_sampler(config, Environment(), engine, RENDERER, SamplingParams())
        assert sampler.max_concurrency == expected
        await engine.close()


async def test_left_open_it_is_had_where_it_can_be() -> None:
    for model, expected in ((tiny_qwen3(), True), (uneven(), False)):
        engine = TorchEngine(model, max_slots=16, deterministic=None)
        assert await engine.prepare() is expected
        request = GenerateRequest([1, 2, 3], SamplingParams(max_new_tokens=2))
        assert len((await engine.generate(request)).token_ids) == 2
        await engine.close()
