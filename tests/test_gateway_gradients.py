"""A session that was sampled, streamed and forked trains as what the engine sampled: the gradient
is that of plain torch on the engine's own requests, token by token."""

from __future__ import annotations

import copy
import functools
from array import array
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI

from gateways import Observed
from retrain import algorithms
from retrain.engines.base import SamplingParams
from retrain.gateway.recorder import Recorder
from retrain.gateway.seats import Seats
from retrain.gateway.server import GatewayServer
from retrain.learner import PolicyObjective, TorchLearner
from retrain.rendering import Renderer
from retrain.rollout import to_samples
from retrain.rollout.agent import EngineAgent
from retrain.types import Rollout, Sample, Task
from scripted import plain_renderer
from test_learner import assert_same, exact
from tiny import tiny_gpt2, tiny_qwen3

TASK = Task("t", ())


async def conversation(renderer: Renderer, engine: Observed) -> Rollout:
    """Two turns streamed, a fork of the first, a changed history, two at once, a sub-agent."""
    policy = EngineAgent(engine, renderer, SamplingParams(6), 7, 0, 0, "r")
    recorder, seats = Recorder(policy, TASK, renderer), Seats()
    server = GatewayServer(seats)
    await server.start()
    seat = seats.open(recorder)
    base = f"{server.url}/sessions/{seat.name}/v1"

    async def say(*talk: dict[str, str], **how: Any) -> dict[str, str]:
        messages: Any = list(talk)
        if how.pop("streamed", False):
            stream = await client.chat.completions.create(
                model="policy", messages=messages, stream=True, **how
            )
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            return {"role": "assistant", "content": "".join(pieces)}
        whole = await client.chat.completions.create(model="policy", messages=messages, **how)
        return {"role": "assistant", "content": whole.choices[0].message.content or ""}

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    try:
        async with AsyncOpenAI(base_url=base, api_key=seat.key) as client:
            first = await say(user("2 + 3?"), streamed=True)
            await say(user("2 + 3?"), first, user("and?"), streamed=True)
            await say(user("2 + 3?"), first, user("sure?"), max_tokens=4)
            await say(user("2 + 3?"), {"role": "assistant", "content": "user"}, user("and?"))
            await say(user("2 + 3?"), n=2)
            await say({"role": "system", "content": "Another."}, user("words"))
    finally:
        await server.close()
    assert recorder.failed is None
    rollout = policy.start(TASK)
    recorder.enter(rollout)
    return rollout


def advantages_of(rollout: Rollout, samples: list[Sample], seen: list[Any]) -> list[float]:
    """Every turn gets its own; that of each of the engine's answers."""
    of_answer = [0.0] * len(seen)
    turns = rollout.model_messages
    for index, segment in enumerate(rollout.segments):
        full = list(rollout.full_token_ids(index))
        for span in segment.turns:
            start, end = segment.prefix_len + span.start, segment.prefix_len + span.end
            (number,) = (
                n
                for n, (prompt, c) in enumerate(seen)
                if prompt == full[:start] and list(c.token_ids) == full[start:end]
                and c.logprobs == segment.logprobs[span.start : span.end]
            )  # fmt: skip
            of_answer[number] = 0.5 + turns.index(span.message)
    for sample in samples:
        assert sample.turns is not None
        sample.advantages = array("d", [0.5 + turn if turn >= 0 else 0.0 for turn in sample.turns])
    return of_answer


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gpt2], ids=lambda make: make.__name__)
async def test_a_session_has_the_gradient_of_what_was_sampled(make: Any) -> None:
    renderer = plain_renderer("chatml")
    model = exact(functools.partial(make, vocab_size=380, context=512))
    engine = Observed(copy.deepcopy(model).float(), tokenizer=renderer.codec.tokenizer)
    try:
        rollout = await conversation(renderer, engine)
    finally:
        await engine.close()
    assert len(engine.seen) == 7 and rollout.num_forks >= 5
    samples = to_samples(rollout)
    answers = advantages_of(rollout, samples, engine.seen)
    trained = sum(sum(sample.loss_mask) for sample in samples)
    assert trained == sum(len(c.token_ids) for _, c in engine.seen), "each token trains once"

    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for advantage, (prompt, completion) in zip(answers, engine.seen, strict=True):
        ids = torch.tensor([prompt + list(completion.token_ids)])
        table = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = table.gather(1, ids[0, len(prompt) :, None])
        loss = loss - advantage * chosen.sum() / trained
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def reinforce(logprobs: Any, old: Any, advantages: Any, mask: Any, sequences: Any) -> Any:
        return algorithms.reinforce(logprobs, old, advantages, mask)

    model.zero_grad()
    learner = TorchLearner(model, learning_rate=1e-3)
    learner.forward_backward(samples, PolicyObjective(reinforce), "token_mean")
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected)
