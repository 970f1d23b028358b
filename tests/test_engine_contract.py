"""What every engine does that a policy is sampled from: one set of tests for all of them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_servers.server import EngineServer
from retrain.engines.base import PolicyEngine
from retrain.engines.torch_engine import TorchEngine
from retrain.models import Policy
from retrain.types import InfrastructureError, UserError
from serving import PROMPT, check, logprobs, request, saved, serving, shake, tiny_policy, until

ENGINES = ["torch", "vllm", "sglang"]


@dataclass
class Subject:
    """An engine under test, and what it follows."""

    engine: Any
    policy: Policy
    models: dict[int, Any]
    under_way: Callable[[], list[int]]
    """How many tokens each request in flight has, as far as the engine tells."""
    slow: Callable[[float], None]
    """Seconds a token takes, where that can be chosen."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineServer]]:
    directory = saved(tiny_policy(), tmp_path_factory.mktemp("other"))
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(EngineServer(directory, kind))  # type: ignore[arg-type]
            for kind in ("vllm", "sglang")
        }


@pytest.fixture(params=ENGINES)
async def subject(request: Any, servers: Any, tmp_path: Path) -> AsyncIterator[Subject]:
    policy = tiny_policy()
    models = {0: copy.deepcopy(policy.model)}
    if request.param == "torch":
        own = TorchEngine(policy.model, tokenizer=policy.tokenizer, own_weights=True)
        async with closing(own) as engine:
            yield Subject(engine, policy, models, lambda: [0] * len(own._in_flight), lambda _: None)
        return
    server = servers[request.param]
    server.knobs.delay_s = 0.0
    async with serving(policy, tmp_path, type=request.param, urls=[server.url]) as engine:
        yield Subject(
            engine,
            policy,
            models,
            lambda: server.generated,
            lambda seconds: server.knobs.update({"delay_s": seconds}),
        )


@asynccontextmanager
async def closing(engine: PolicyEngine) -> AsyncIterator[PolicyEngine]:
    try:
        yield engine
    finally:
        await engine.close()


async def test_log_probabilities_are_the_policys(subject: Subject) -> None:
    asked = [
        request(PROMPT[: 3 + 5 * i], 5 + 9 * i, seed=i, temperature=temperature)
        for i in range(3)
        for temperature in (1.0, 0.7)
    ]
    got = await asyncio.gather(*map(subject.engine.generate, asked))
    for one, completion in zip(asked, got, strict=True):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == one.params.max_new_tokens
        assert set(completion.versions) == {0}
        assert (completion.token_ids.typecode, completion.logprobs.typecode) == ("i", "f")
        check(subject.models, one, completion)


async def test_a_result_depends_on_its_seed_alone(subject: Subject) -> None:
    """Not on company, nor on order."""
    asked = [request([5 + i % 3, 6, 7] * 8, 20, seed=i) for i in range(9)]
    together = await asyncio.gather(*map(subject.engine.generate, asked))
    alone = [await subject.engine.generate(one) for one in reversed(asked)]
    found = [list(c.token_ids) for c in together]
    assert found == [list(c.token_ids) for c in reversed(alone)]
    assert len({tuple(ids) for ids in found}) == 9
    largest = [await subject.engine.generate(request(seed=s)) for s in (2**63 - 1, 2**63 - 1, 7)]
    ids = [list(c.token_ids) for c in largest]
    assert ids[0] == ids[1] != ids[2]


async def test_temperature_zero_takes_the_most_likely(subject: Subject) -> None:
    got = await subject.engine.generate(request(PROMPT, 20, temperature=0.0))
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *got.token_ids]])
        logits = subject.models[0](input_ids=ids).logits[0]
    assert list(got.token_ids) == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


async def test_stop_tokens_end_it_and_are_kept(subject: Subject) -> None:
    free = list((await subject.engine.generate(request(PROMPT, 30, 3))).token_ids)
    stop = free[9]
    got = await subject.engine.generate(request(PROMPT, 30, 3, stop_token_ids=(stop, 299)))
    assert list(got.token_ids) == free[: free.index(stop) + 1]
    assert got.finish_reason == "stop_token"
    check(subject.models, request(PROMPT), got)


async def test_the_tokenizers_end_is_a_token_like_others(subject: Subject) -> None:
    """Only what the request names ends it."""
    end = subject.policy.tokenizer.eos_token_id
    only(subject.policy.model, end)
    await subject.engine.update_weights(1)
    got = await subject.engine.generate(request([end] * 4, 3, temperature=0.0))
    assert list(got.token_ids) == [end] * 3
    assert got.finish_reason == "length"


def only(model: Any, token: int) -> None:
    """Leave nothing to sample but one token, after that token."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        kept = embedding[token].clone()
        embedding.zero_()
        embedding[token] = 20 * kept


async def test_a_stop_string_over_several_tokens_ends_it(subject: Subject) -> None:
    """The token that completes it is kept, with what overshoots."""
    text = lambda ids: subject.policy.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    free = list((await subject.engine.generate(request(PROMPT, 30, 5))).token_ids)
    stop = text(free[10:13])
    got = await subject.engine.generate(request(PROMPT, 30, 5, stop=(stop, "never said")))
    assert list(got.token_ids) == free[: len(got.token_ids)]
    assert got.finish_reason == "stop_string"
    assert stop in text(list(got.token_ids)) and stop not in text(list(got.token_ids)[:-1])
    check(subject.models, request(PROMPT), got)


async def test_a_special_token_is_a_stop_string(subject: Subject) -> None:
    special = subject.policy.tokenizer.convert_tokens_to_ids("<stop>")
    only(subject.policy.model, special)
    await subject.engine.update_weights(1)
    got = await subject.engine.generate(
        request([special] * 4, 5, temperature=0.0, stop=("<stop>",))
    )
    assert (list(got.token_ids), got.finish_reason) == ([special], "stop_string")
    half = await subject.engine.generate(request([special] * 4, 5, temperature=0.0, stop=("op>",)))
    assert (list(half.token_ids), half.finish_reason) == ([special], "stop_string")


async def test_the_context_limit(subject: Subject) -> None:
    limit = subject.engine.context_limit
    assert limit == 256
    nearly = await subject.engine.generate(request([7] * (limit - 3), 50))
    assert (len(nearly.token_ids), nearly.finish_reason) == (3, "context")
    exact = await subject.engine.generate(request([7] * (limit - 3), 3))
    assert (len(exact.token_ids), exact.finish_reason) == (3, "length")
    last = await subject.engine.generate(request([7] * (limit - 1), 5))
    assert (len(last.token_ids), last.finish_reason) == (1, "context")
    for length in (limit, limit + 9):
        full = await subject.engine.generate(request([7] * length, 5))
        assert (list(full.token_ids), full.finish_reason) == ([], "context")


async def test_an_empty_prompt_is_the_users_mistake(subject: Subject) -> None:
    with pytest.raises(UserError, match="no tokens"):
        await subject.engine.generate(request([]))
    with pytest.raises(UserError, match="empty string"):
        await subject.engine.generate(request(stop=("",)))


async def test_cancelling_ends_the_generation_and_nothing_else(subject: Subject) -> None:
    subject.slow(0.01)
    asked = [request(PROMPT, 120, seed=i) for i in range(3)]
    tasks = [asyncio.ensure_future(subject.engine.generate(one)) for one in asked]
    await until(lambda: len(subject.under_way()) == 3)
    tasks[1].cancel()
    await until(lambda: len(subject.under_way()) == 2, 3)
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    subject.slow(0.0)
    for one, task in ((asked[0], tasks[0]), (asked[2], tasks[2])):
        check(subject.models, one, await task)
    assert not subject.under_way()
    again = await subject.engine.generate(asked[1])
    check(subject.models, asked[1], again)


async def test_a_deadline_ends_the_generation(subject: Subject) -> None:
    subject.slow(0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02 if isinstance(subject.engine, TorchEngine) else 0.4):
            await subject.engine.generate(request(PROMPT, 230))
    await until(lambda: not subject.under_way(), 3)
    subject.slow(0.0)
    check(subject.models, request(), await subject.engine.generate(request()))


async def test_score_is_the_models(subject: Subject) -> None:
    ids = list(range(20, 120, 2))
    for sequence in (ids, ids[:2]):
        found = await subject.engine.score(sequence)
        expected = logprobs(subject.models[0], sequence)
        assert found[0] == 0.0
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    assert list(await subject.engine.score([5])) == [0.0]


async def test_weights_follow_the_policy(subject: Subject) -> None:
    """What was sampled before, and so may be cached, is sampled anew."""
    before = await subject.engine.generate(request(PROMPT, 20, session="s"))
    for version in (1, 2, 7):
        subject.models[version] = shake(subject.policy, version)
        await subject.engine.update_weights(version)
        assert subject.engine.version == version
        for seed in (0, version):
            got = await subject.engine.generate(request(PROMPT, 20, seed))
            assert set(got.versions) == {version}
            check(subject.models, request(PROMPT), got)
        scored = await subject.engine.score(PROMPT)
        expected = logprobs(subject.models[version], PROMPT)
        torch.testing.assert_close(torch.tensor(scored), expected, atol=1e-4, rtol=0)
    assert list(before.token_ids) != list(got.token_ids)


async def test_new_weights_in_mid_generation(subject: Subject) -> None:
    """Each token has the version, and the log-probability, of what it was sampled from."""
    subject.slow(0.004)
    asked = [request(PROMPT[:8], 220, seed=i, temperature=0.9) for i in range(5)]
    tasks = [asyncio.ensure_future(subject.engine.generate(one)) for one in asked]
    for version in (1, 2):
        await until(lambda: len(subject.under_way()) == 5)
        await asyncio.sleep(0 if isinstance(subject.engine, TorchEngine) else 0.05)
        subject.models[version] = shake(subject.policy, version)
        await subject.engine.update_weights(version)
    subject.slow(0.0)
    got = await asyncio.gather(*tasks)
    for one, completion in zip(asked, got, strict=True):
        assert (len(completion.token_ids), completion.finish_reason) == (220, "length")
        assert set(completion.versions) == {0, 1, 2}
        check(subject.models, one, completion)


async def test_a_stop_string_across_an_interruption(subject: Subject) -> None:
    """Letters that no merge joins: the end of the first part begins what the second completes."""
    letter = subject.policy.tokenizer.convert_tokens_to_ids("a")
    only(subject.policy.model, letter)
    await subject.engine.update_weights(1)
    subject.slow(0.02)
    asked = request([letter] * 4, 240, temperature=0.0, stop=("a" * 100,))
    task = asyncio.ensure_future(subject.engine.generate(asked))
    await until(subject.under_way)
    await asyncio.sleep(0 if isinstance(subject.engine, TorchEngine) else 0.3)
    await subject.engine.update_weights(2)
    subject.slow(0.0)
    got = await task
    assert (len(got.token_ids), got.finish_reason) == (100, "stop_string")
    assert set(got.versions) == {1, 2}


async def test_sessions_end(subject: Subject) -> None:
    ids = list(PROMPT)
    for turn in range(3):
        asked = request(ids, 6, turn, session="s")
        got = await subject.engine.generate(asked)
        check(subject.models, asked, got)
        ids += [*got.token_ids, 9, 10]
    await subject.engine.end_session("s")
    await subject.engine.end_session("never begun")


async def test_closing_with_requests_in_flight(subject: Subject) -> None:
    subject.slow(0.02)
    tasks = [
        asyncio.ensure_future(subject.engine.generate(request(PROMPT, 200, i))) for i in range(3)
    ]
    await until(subject.under_way)
    await subject.engine.close()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, InfrastructureError), outcome
    await until(lambda: not subject.under_way(), 3)
    with pytest.raises(InfrastructureError, match="closed"):
        await subject.engine.generate(request())
    await subject.engine.close()
