from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.engines.prefix import PrefixAttention
from retrain.engines.torch_engine import TorchEngine
from retrain.models.scores import selected_logprobs
from retrain.types import InfrastructureError, UserError
from test_forward import tiny_cohere, tiny_gemma2, tiny_lora, tiny_mamba
from tiny import VOCAB, byte_tokenizer, seeded, tiny_gpt2, tiny_llama, tiny_qwen3


def tiny_mistral() -> Any:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        sliding_window=6,
    )  # fmt: skip
    return seeded(MistralForCausalLM, config)


FAST = [tiny_qwen3, tiny_llama, tiny_gpt2, tiny_gemma2, tiny_mistral, tiny_cohere, tiny_lora]


@asynccontextmanager
async def running(model: Any, **options: Any) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(model, **options)
    try:
        yield engine
    finally:
        await engine.close()


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def request(
    prompt: list[int], count: int = 8, seed: int = 0, session: str | None = None, **params: Any
) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_new_tokens=count, **params), seed, session)


def check_logprobs(model: Any, asked: GenerateRequest, got: Completion) -> None:
    """The engine's log-probabilities are the learner's, to 1e-4."""
    ids = torch.tensor([asked.prompt_ids + list(got.token_ids)])
    mask = torch.arange(ids.shape[1]).unsqueeze(0) >= len(asked.prompt_ids)
    lengths = torch.tensor([ids.shape[1]])
    with torch.no_grad():
        found = selected_logprobs(model, ids, lengths, mask, asked.params.temperature)[0]
    expected = found[len(asked.prompt_ids) :]
    torch.testing.assert_close(torch.tensor(got.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", FAST, ids=lambda make: make.__name__)
async def test_logprobs_are_the_learners(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    prompts = [tokens(count, count) for count in (1, 3, 19, 20, 21)]
    asked = [
        request(prompts[i // 4], 3 + 2 * i, seed=i, temperature=0.7)
        for i in range(4 * len(prompts))
    ]
    async with running(model, max_slots=7) as engine:
        got = await asyncio.gather(*map(engine.generate, asked))
    for one, completion in zip(asked, got, strict=True):
        assert len(completion.token_ids) == one.params.max_new_tokens
        assert completion.finish_reason == "length"
        check_logprobs(model, one, completion)
    assert "slot cache" not in caplog.text


async def test_a_recurrent_model_falls_back_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_mamba()
    asked = [request(tokens(2 + i, i), 3 + i, seed=i, temperature=0.7) for i in range(5)]
    with caplog.at_level(logging.WARNING):
        async with running(model, context_limit=64, max_slots=3) as engine:
            got = await asyncio.gather(*map(engine.generate, asked))
    for one, completion in zip(asked, got, strict=True):
        check_logprobs(model, one, completion)
    assert len([r for r in caplog.records if "slot cache" in r.message]) == 1


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gpt2, tiny_gemma2])
async def test_greedy_decoding_equals_generate(make: Callable[[], Any]) -> None:
    model = make()
    prompt = tokens(11, 4)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 11), do_sample=False,
            max_new_tokens=20, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    async with running(model) as engine:
        got = await engine.generate(request(prompt, 20, temperature=0.0))
    assert list(got.token_ids) == out[0, 11:].tolist()


async def converse(
    engine: TorchEngine, index: int, answer: int
) -> list[tuple[GenerateRequest, Completion]]:
    """Three turns, each followed by `answer` tokens of tool output."""
    ids, done = tokens(5 + index % 3, index % 3), []
    for turn in range(3):
        asked = request(ids, 4 + index % 5, 10 * index + turn, f"s{index}", temperature=0.7)
        await asyncio.sleep(0.001 * (index % 4))
        got = await engine.generate(asked)
        done.append((asked, got))
        ids = ids + list(got.token_ids) + tokens(answer, index + turn)
    await engine.end_session(f"s{index}")
    return done


@pytest.mark.parametrize("answer", [1, 6, 40])
@pytest.mark.parametrize("slots", [1, 4, 32])
async def test_sessions_go_on_from_their_cache_and_survive_eviction(
    answer: int, slots: int
) -> None:
    model = tiny_qwen3()
    async with running(model, max_slots=slots) as engine:
        rollouts = await asyncio.gather(*(converse(engine, i, answer) for i in range(12)))
    for asked, got in (turn for rollout in rollouts for turn in rollout):
        check_logprobs(model, asked, got)


async def test_a_result_does_not_depend_on_company() -> None:
    model = tiny_llama()
    asked = [request(tokens(3 + i % 4, i % 4), 12, seed=i, session=str(i)) for i in range(16)]
    async with running(model) as engine:
        together = await asyncio.gather(*map(engine.generate, asked))
    async with running(model, max_slots=2) as engine:
        alone = [await engine.generate(one) for one in reversed(asked)]
    assert [c.token_ids for c in together] == [c.token_ids for c in reversed(alone)]
    assert len({tuple(c.token_ids) for c in together}) == 16


async def test_context_is_run_once() -> None:
    prompt, answer = tokens(60, 1), tokens(50, 2)
    async with running(tiny_qwen3()) as engine:
        group = [request(prompt, 4, seed=i, session=str(i)) for i in range(8)]
        got = await asyncio.gather(*map(engine.generate, group))
        assert engine.prefilled_tokens == 59  # one of eight; a step runs the last token
        ids = prompt + list(got[0].token_ids)
        await engine.generate(request(ids + answer, 4, session="0"))
        # the last sampled token and all but one of the answer's
        assert engine.prefilled_tokens == 59 + 1 + 49
        system = tokens(100, 3)
        await asyncio.gather(*(engine.generate(request([*system, i])) for i in range(8)))
        assert engine.prefilled_tokens == 109 + 100
        await engine.update_weights(1)
        await engine.generate(request(ids + answer, 4, session="0"))
        assert engine.prefilled_tokens == 209 + len(ids + answer) - 1


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gpt2], ids=lambda make: make.__name__)
async def test_a_groups_prompt_is_read_once_in_decoding_and_changes_nothing(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, also after a tool's words; with the parts apart and with rows on their own."""
    model = make()
    prompts = [tokens(40, 1), tokens(48, 2)]

    async def everything() -> tuple[list[list[int]], list[float], int]:
        parts: list[int] = []
        attend = PrefixAttention.attend
        with monkeypatch.context() as patch:
            patch.setattr(
                PrefixAttention,
                "attend",
                lambda self, *states: parts.append(1) or attend(self, *states),
            )
            async with running(model, max_slots=12) as engine:
                first = [request(prompts[i % 2], 5 + i, i, session=str(i)) for i in range(12)]
                said = await asyncio.gather(*(engine.generate(one) for one in first))
                after = [
                    request([*one.prompt_ids, *got.token_ids, *tokens(3, i)], 6, i, session=str(i))
                    for i, (one, got) in enumerate(zip(first, said, strict=True))
                ]
                more = await asyncio.gather(*(engine.generate(one) for one in after))
        both = [*said, *more]
        return (
            [list(got.token_ids) for got in both],
            [logprob for got in both for logprob in got.logprobs],
            len(parts),
        )

    together = await everything()
    monkeypatch.setattr("retrain.engines.scheduler.find_families", lambda *_, before: None)
    alone = await everything()
    assert together[2] > 20 and alone[2] == 2 * 2  # of the probe
    assert together[0] == alone[0]
    assert together[1] == pytest.approx(alone[1], abs=1e-4)


async def test_new_weights_void_the_caches_and_are_named_on_the_tokens() -> None:
    model = tiny_qwen3()
    prompt = tokens(12, 0)
    async with running(model, version=3) as engine:
        first = await engine.generate(request(prompt, 6, session="a"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        await engine.update_weights(4)
        asked = request(prompt + list(first.token_ids) + [1, 2], 6, session="a", temperature=0.7)
        second = await engine.generate(asked)
    assert set(first.versions) == {3} and set(second.versions) == {4}
    check_logprobs(model, asked, second)


async def test_weights_may_change_in_the_middle_of_a_request() -> None:
    model = tiny_qwen3()
    asked = request(tokens(5, 0), 200)
    async with running(model) as engine:
        task = asyncio.create_task(engine.generate(asked))
        while not engine._scheduler.busy or engine._scheduler._table.known.max() < 20:
            await asyncio.sleep(0.001)
        await engine.update_weights(1)
        got = await task
    versions = list(got.versions)
    assert versions == sorted(versions) and set(versions) == {0, 1}
    check_logprobs(model, asked, got)  # the weights are in truth the same


async def test_stop_tokens_and_lengths() -> None:
    model = tiny_llama()
    prompt = tokens(6, 0)
    async with running(model) as engine:
        free = await engine.generate(request(prompt, 30, seed=5))
        stop = free.token_ids[9]
        cut = await engine.generate(request(prompt, 30, seed=5, stop_token_ids=(stop,)))
    first = free.token_ids.index(stop)
    assert cut.token_ids == free.token_ids[: first + 1] and cut.finish_reason == "stop_token"
    assert cut.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-5)
    assert free.finish_reason == "length" and len(free.logprobs) == len(free.versions) == 30


async def test_stop_strings_end_a_request_with_the_token_that_completes_them() -> None:
    tokenizer = byte_tokenizer(merges=(("a", "b"), ("e", "r"), ("t", "h")))
    model = tiny_llama(vocab_size=len(tokenizer))
    prompt = list(range(5))
    async with running(model, tokenizer=tokenizer) as engine:
        for seed in range(12):
            free = list((await engine.generate(request(prompt, 40, seed))).token_ids)
            stop = tokenizer.decode(free)[12 + seed : 14 + seed]
            if "\ufffd" in stop:
                continue
            ends = (n for n in range(1, 41) if stop in tokenizer.decode(free[:n]))
            cut = await engine.generate(request(prompt, 40, seed, stop=(stop,)))
            assert list(cut.token_ids) == free[: next(ends)]
            assert cut.finish_reason == "stop_string"


async def test_the_context_limit_ends_a_request() -> None:
    async with running(tiny_gpt2(context=32)) as engine:
        assert engine.context_limit == 32
        cut = await engine.generate(request(tokens(27, 0), 10, session="a"))
        none = await engine.generate(request(tokens(32, 0), 10, session="b"))
        exact = await engine.generate(request(tokens(27, 0), 5))
        # a full row that waits beside one that decodes
        beside = await engine.generate(request(tokens(4, 0), 20))
    assert (len(cut.token_ids), cut.finish_reason) == (5, "context")
    assert none == Completion(array("i"), array("f"), array("i"), "context")
    assert (len(exact.token_ids), exact.finish_reason) == (5, "length")
    assert len(beside.token_ids) == 20


async def test_rows_with_different_parameters_share_a_batch() -> None:
    model = tiny_qwen3()
    prompt = tokens(6, 0)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.5},
        {"top_k": 1}, {"top_k": 5, "temperature": 2.0}, {"top_p": 0.3},
    ]  # fmt: skip
    asked = [request(prompt, 10, seed=i, **kind) for i, kind in enumerate(kinds)]
    async with running(model) as engine:
        together = await asyncio.gather(*map(engine.generate, asked))
        alone = [await engine.generate(one) for one in asked]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for index in (0, 1, 2):
        check_logprobs(model, asked[index], together[index])
    assert together[3].token_ids == together[1].token_ids
    assert list(together[3].logprobs) == pytest.approx([0.0] * 10, abs=1e-6)


async def test_decoding_does_not_block_the_event_loop() -> None:
    ticks = 0
    async with running(tiny_qwen3()) as engine:
        task = asyncio.create_task(engine.generate(request(tokens(4, 0), 150)))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
    assert ticks > 20


async def test_a_cancelled_request_gives_its_slot_back() -> None:
    async with running(tiny_qwen3(), max_slots=1) as engine:
        task = asyncio.create_task(engine.generate(request(tokens(4, 0), 240)))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(engine.generate(request(tokens(4, 1), 240)))
        await asyncio.sleep(0)
        task.cancel()
        waiting.cancel()
        got = await asyncio.wait_for(engine.generate(request(tokens(5, 1), 3)), 10)
        assert len(got.token_ids) == 3
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._scheduler.busy


async def test_a_failure_in_the_thread_reaches_the_callers_and_the_engine_recovers() -> None:
    model = tiny_qwen3()
    async with running(model) as engine:
        before = await engine.generate(request(tokens(4, 0), session="a"))

        def broken(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = model.model.layers[1].register_forward_pre_hook(broken)
        asked = [request(tokens(4, i)) for i in range(3)]
        failures = await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)
        assert all(isinstance(f, InfrastructureError) for f in failures)
        assert "out of memory" in str(failures[0])
        hook.remove()
        assert await engine.generate(request(tokens(4, 0), session="a")) == before


async def test_logits_that_are_not_finite_are_an_error() -> None:
    model = tiny_qwen3()
    async with running(model) as engine:
        await engine.generate(request([1]))
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(UserError):
            await engine.generate(request([1]))


async def test_close_fails_what_is_in_flight() -> None:
    engine = TorchEngine(tiny_qwen3())
    task = asyncio.create_task(engine.generate(request(tokens(4, 0), 250)))
    await asyncio.sleep(0.02)
    await engine.close()
    with pytest.raises(InfrastructureError, match="closed"):
        await task
    with pytest.raises(InfrastructureError, match="closed"):
        await engine.generate(request([1]))


async def test_score() -> None:
    model = tiny_gpt2()
    ids = tokens(9, 0)
    async with running(model) as engine:
        found = await engine.score(ids, 0.7)
        assert await engine.score([]) == array("f")
    with torch.no_grad():
        logprobs = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
    expected = [0.0] + [float(logprobs[t - 1, ids[t]]) for t in range(1, 9)]
    assert list(found) == pytest.approx(expected, abs=1e-5)


async def test_it_generates_in_evaluation_mode() -> None:
    model = tiny_qwen3()
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, _: seen.append(module.training)
    )
    seen: list[bool] = []
    model.train()
    async with running(model) as engine:
        await engine.generate(request([1, 2, 3]))
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], {}),
        ([VOCAB], {}),
        ([-1], {}),
        ([1], {"max_new_tokens": 0}),
        ([1], {"temperature": -1.0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_k": -1}),
        ([1], {"stop": ("x",)}),
        ([1], {"stop_token_ids": (VOCAB,)}),
    ],
)
async def test_requests_that_make_no_sense_are_refused(
    prompt: list[int], params: dict[str, Any]
) -> None:
    async with running(tiny_qwen3()) as engine:
        with pytest.raises(UserError):
            await engine.generate(GenerateRequest(prompt, SamplingParams(**params)))


def test_an_architecture_without_a_context_limit_needs_one() -> None:
    with pytest.raises(UserError, match="context limit"):
        TorchEngine(tiny_mamba())
