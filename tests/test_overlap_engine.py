"""An engine with weights of its own, and learning from tokens that several weights sampled."""

from __future__ import annotations

import asyncio
import copy
import threading
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.learner import Reference
from retrain.rollout import to_samples
from retrain.types import Message, MessageType, Prompt, Rollout, Sample, Source, Turn
from test_forward import tiny_lora
from test_learner import assert_same, exact
from test_update import (
    TEMPERATURE,
    first_gradient,
    plain_gradient,
    policy_gradient,
    shaken,
    updating,
)
from tiny import tiny_qwen3

PROMPT = [5, 17, 200, 31, 8]


@asynccontextmanager
async def own_weights(model: Any, **options: Any) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(model, own_weights=True, **options)
    try:
        yield engine
    finally:
        await engine.close()


def asked(seed: int, count: int = 12, session: str | None = None) -> GenerateRequest:
    return GenerateRequest(PROMPT, SamplingParams(count, TEMPERATURE), seed, session)


def plain_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token after the prompt's, by the model's own forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0] / TEMPERATURE
    chosen = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return chosen[len(PROMPT) - 1 :]


def agrees(model: Any, got: Completion, columns: slice = slice(None)) -> bool:
    expected = plain_logprobs(model, [*PROMPT, *got.token_ids])[columns]
    found = torch.tensor(got.logprobs[columns], dtype=expected.dtype)
    return bool((expected - found).abs().max() < 1e-4)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_lora], ids=lambda make: make.__name__)
async def test_new_weights_come_with_update_weights_and_not_before(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model)
    async with own_weights(model) as engine:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data + 0.05 * torch.randn(p.shape)  # as a reference puts its own in
        model.train()
        old = await engine.generate(asked(1))
        assert agrees(before.eval(), old) and not agrees(model.eval(), old)
        assert model.training is False, "the learner's own mode is its own"
        await engine.update_weights(1)
        new = await engine.generate(asked(1))
        assert agrees(model, new) and not agrees(before, new)
    assert set(old.versions) == {0} and set(new.versions) == {1}


def test_only_what_trains_is_copied() -> None:
    model = tiny_lora()
    engine = TorchEngine(model, own_weights=True)
    theirs, own = dict(model.named_parameters()), dict(engine._model.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {name for name, p in theirs.items() if not p.requires_grad}
    assert 0 < len(shared) < len(theirs)
    for mine, other in zip(engine._model.buffers(), model.buffers(), strict=True):
        assert mine.data_ptr() == other.data_ptr()
    assert TorchEngine(model)._model is model, "without, the module is shared as a whole"


def test_tied_embeddings_stay_tied() -> None:
    engine = TorchEngine(tiny_qwen3(), own_weights=True)
    head, table = engine._model.lm_head.weight, engine._model.model.embed_tokens.weight
    assert head is table


async def test_the_engine_samples_while_the_learners_module_is_changed() -> None:
    """Another thread trains, and switches adapters off, as fast as it can."""
    model = tiny_lora()
    before, over = copy.deepcopy(model).eval(), threading.Event()
    reference = Reference(model)

    def learn() -> int:
        steps = 0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        ids = torch.tensor([PROMPT * 4])
        while not over.is_set():
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with reference.model(), torch.no_grad():
                model.eval()(input_ids=ids)
            steps += 1
        return steps

    async with own_weights(model) as engine:
        learner = asyncio.create_task(asyncio.to_thread(learn))
        got = await asyncio.gather(*(engine.generate(asked(seed, 40)) for seed in range(12)))
        over.set()
        assert await learner > 3
        assert all(agrees(before, one) for one in got)
        await engine.update_weights(1)
        assert agrees(model.eval(), await engine.generate(asked(0)))


async def in_mid_generation(model: Any, group: int, count: int) -> tuple[list[Completion], Any]:
    """Completions during which the learner's weights are really changed, and a copy of those that
    the first of their tokens were sampled from."""
    before = copy.deepcopy(model)
    async with own_weights(model, version=4) as engine:
        work = [
            asyncio.create_task(engine.generate(asked(seed, count, f"r/{seed}")))
            for seed in range(group)
        ]
        while not engine._scheduler.busy or engine._scheduler._table.known.max() < 12:
            await asyncio.sleep(0.0005)
        shaken(model, 0.05)
        await engine.update_weights(6)
        return await asyncio.gather(*work), before


def rollout_of(number: int, got: Completion, reward: float) -> Rollout:
    rollout = Rollout(f"r/{number}", group_id="r")
    prompt = Prompt(None, 0, PROMPT, [int(Source.CONTEXT)] * len(PROMPT))
    turn = Turn(prompt, got.token_ids, got.logprobs, got.versions, got.finish_reason)
    rollout.add_messages(Message("m", MessageType.MODEL, turn=turn))
    rollout.step_rewards, rollout.reward = [reward], reward
    return rollout


async def test_a_rollout_whose_version_changed_trains_with_each_tokens_own() -> None:
    """In float64: versions, log-probabilities under the weights of each, and the gradient of a loss
    written by hand with one importance weight a token."""
    model = exact(tiny_qwen3)
    group, count = 4, 150
    completions, before = await in_mid_generation(model, group, count)
    advantages = (1.0, -1.0, 1.0, -1.0)
    rollouts = [
        rollout_of(i, got, reward)
        for i, (got, reward) in enumerate(zip(completions, advantages, strict=True))
    ]
    for got in completions:
        switch = list(got.versions).index(6)
        assert list(got.versions) == [4] * switch + [6] * (count - switch)
        assert 0 < switch < count, "the weights changed in its middle"
        old, new = slice(0, switch), slice(switch, count)
        assert agrees(before, got, old) and agrees(model, got, new)
        assert not agrees(model, got, old) and not agrees(before, got, new)

    shaken(model, 0.05, seed=7)  # the policy that learns is a third one
    cap = 1.5
    update = updating(
        model, steps=5, group_size=group, max_staleness=1, correction={"kind": "tis", "cap": cap}
    )
    samples = update.samples([rollouts])
    assert [list(one.versions or [])[len(PROMPT) :] for one in samples] == [
        list(got.versions) for got in completions
    ]
    for one, got in zip(samples, completions, strict=True):
        assert one.behavior_logprobs is not None
        assert one.behavior_logprobs[len(PROMPT) :] == got.logprobs

    weights: list[float] = []

    def weighted(table: torch.Tensor, one: Sample, t: int) -> torch.Tensor:
        """min(learner at the start / engine, cap), of this token alone, times the usual loss."""
        assert one.behavior_logprobs is not None
        ratio = float((table[one.token_ids[t]].detach() - one.behavior_logprobs[t]).exp())
        weights.append(ratio)
        return min(ratio, cap) * policy_gradient(table, one, t)

    found = await first_gradient(update, samples)
    assert_same(plain_gradient(model, samples, weighted), found)
    assert min(weights) < 0.8 and max(weights) > cap, "the weights are far from 1"
    assert len(samples) == group and all(sum(one.loss_mask) == count for one in samples)


def test_the_gradient_sees_each_tokens_own_logprob() -> None:
    """Swapping the log-probabilities of two tokens moves it: the test above can fail."""
    model = exact(tiny_qwen3)
    ids = array("i", range(40, 60))
    logprobs = plain_logprobs(model, [*PROMPT, *ids]).tolist()
    gradients = []
    for column in (logprobs, [logprobs[0] - 1.0, *logprobs[1:]]):
        completion = Completion(ids, array("f", column), array("i", [0] * len(ids)), "length")
        rollouts = [rollout_of(i, completion, float(i)) for i in range(2)]
        update = updating(model, group_size=2, correction={"kind": "tis"})
        gradients.append(asyncio.run(first_gradient(update, update.samples([rollouts]))))
    with pytest.raises(AssertionError):
        assert_same(*gradients)
    assert len(to_samples(rollouts[0])) == 1
