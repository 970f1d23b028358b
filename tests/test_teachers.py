"""Teachers give a model's own log-probabilities: in the process, and from a server."""

from __future__ import annotations

import asyncio
import logging
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_servers.server import EngineServer
from retrain.teachers.base import Teacher, Top
from retrain.teachers.local import LocalTeacher
from retrain.teachers.server import ServerTeacher
from retrain.types import InfrastructureError, UserError
from tiny import byte_tokenizer, tiny_gpt2, tiny_llama, tiny_qwen3

IDS = [72, 105, 11, 7, 300 - 1, 42, 42, 0, 199]
KINDS = ("vllm", "sglang")


def plain(model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T - 1, V] by the model's own forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return (logits.float() / temperature).log_softmax(-1)


def check_scores(found: array[float], model: Any, ids: list[int], temperature: float) -> None:
    expected = plain(model, ids, temperature)[range(len(ids) - 1), ids[1:]]
    assert found[0] == 0.0
    torch.testing.assert_close(torch.tensor(found[1:]).float(), expected, atol=2e-6, rtol=0)


def check_top(found: Top, model: Any, ids: list[int], k: int, temperature: float) -> None:
    values, tokens = plain(model, ids, temperature).topk(k)
    assert (found.ids[0] == -1).all()
    assert np.isneginf(found.logprobs[0]).all()
    assert (found.ids[1:] == tokens.numpy()).all()
    np.testing.assert_allclose(found.logprobs[1:], values.numpy(), atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny_qwen3().save_pretrained(path)
    byte_tokenizer(special=("<eos>", "<stop>")).save_pretrained(path)
    return path


def over(server: EngineServer, kind: str, **changed: Any) -> ServerTeacher:
    return ServerTeacher(kind, server.url, **({"backoff_s": 0.001} | changed))


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_a_local_teacher_gives_the_models_own_log_probabilities(
    make: Any, temperature: float
) -> None:
    model = make()
    teacher = LocalTeacher(model)
    check_scores(await teacher.score(IDS, temperature), model, IDS, temperature)
    check_top(await teacher.top(IDS, 5, temperature), model, IDS, 5, temperature)
    await teacher.close()


async def test_what_comes_before_the_start_is_not_scored() -> None:
    teacher = LocalTeacher(tiny_qwen3())
    whole, part = await teacher.score(IDS), await teacher.score(IDS, start=4)
    assert list(part[:4]) == [0.0] * 4
    np.testing.assert_allclose(part[4:], whole[4:], atol=1e-6, rtol=0)
    top = await teacher.top(IDS, 3, start=4)
    assert (top.ids[:4] == -1).all() and (top.ids[4:] >= 0).all()
    assert list(await teacher.score(IDS[:1])) == [0.0]
    assert list(await teacher.score([])) == []
    await teacher.close()


async def test_company_changes_nothing_and_waiting_requests_share_a_pass() -> None:
    """Rows of different lengths that begin alike, of two temperatures, in passes of 40 tokens."""
    model = tiny_qwen3()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    model.model.register_forward_hook(lambda *_: runs.append(1))
    generator = np.random.default_rng(0)
    sequences = [
        [*IDS[:5], *generator.integers(0, 300, size=n).tolist()] for n in (1, 4, 9, 2, 7, 60)
    ]
    alone = LocalTeacher(model)
    expected = [list(await alone.score(ids, t)) for ids in sequences for t in (1.0, 0.5)]
    wanted = [await alone.top(ids, 4) for ids in sequences]
    separately = len(runs)
    runs.clear()
    teacher = LocalTeacher(model, batch_tokens=40, logits_per_chunk=2 * 300)
    work = [teacher.score(ids, t) for ids in sequences for t in (1.0, 0.5)]
    found = await asyncio.gather(*work)
    tops = await asyncio.gather(*(teacher.top(ids, 4) for ids in sequences))
    assert 0 < len(runs) < 0.7 * separately
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=0)
    for top, other_top in zip(tops, wanted, strict=True):
        assert (top.ids == other_top.ids).all()
        np.testing.assert_allclose(top.logprobs[1:], other_top.logprobs[1:], atol=3e-6, rtol=0)
    await alone.close()
    await teacher.close()


async def test_no_more_logits_are_alive_than_a_chunk_holds() -> None:
    model = tiny_llama()
    rows = []
    model.lm_head.register_forward_hook(lambda m, i, out: rows.append(out.numel() // 300))
    teacher = LocalTeacher(model, logits_per_chunk=4 * 300)
    await teacher.score(IDS * 3)
    rows.clear()  # among them was the proof that the model splits
    await teacher.score(IDS * 3)
    await teacher.top(IDS * 3, 2)
    assert max(rows) == 4
    assert sum(rows) == 2 * (len(IDS * 3) - 1)
    await teacher.close()


async def test_scoring_does_not_hold_up_the_event_loop() -> None:
    model = tiny_qwen3()
    started, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(*_: object) -> None:
        loop.call_soon_threadsafe(started.set)
        assert go_on.wait(10)

    teacher = LocalTeacher(model)
    await teacher.score(IDS)
    model.model.register_forward_pre_hook(wait)
    work = asyncio.ensure_future(teacher.score(IDS))
    async with asyncio.timeout(10):
        await started.wait()
    assert not work.done()
    go_on.set()
    check_scores(await work, model, IDS, 1.0)
    await teacher.close()


async def test_padding_of_the_embedding_is_never_among_the_likeliest() -> None:
    model = tiny_qwen3()
    teacher = LocalTeacher(model, vocab_size=50)
    top = await teacher.top(IDS, 50)
    assert sorted(top.ids[1]) == list(range(50))
    expected = plain(model, IDS)[0, top.ids[1].tolist()]
    torch.testing.assert_close(torch.tensor(top.logprobs[1]), expected, atol=2e-6, rtol=0)
    with pytest.raises(UserError, match="likeliest 51"):
        await teacher.top(IDS, 51)
    await teacher.close()


async def test_a_local_teacher_is_frozen_and_refuses_what_it_cannot_read() -> None:
    model = tiny_qwen3(context=8).train()
    teacher = LocalTeacher(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    with pytest.raises(UserError, match="9 tokens is longer than the teacher's context of 8"):
        await teacher.score(IDS)
    with pytest.raises(UserError, match="outside of the teacher's vocabulary of 300"):
        await teacher.score([1, 300])
    await teacher.close()
    with pytest.raises(InfrastructureError, match="closed"):
        await teacher.score([1, 2])


async def test_a_batch_that_fails_is_tried_one_by_one() -> None:
    model = tiny_qwen3()

    def too_large(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if len(ids) > 1 or 13 in ids:
            raise RuntimeError("out of memory")

    teacher = LocalTeacher(model)
    await teacher.score(IDS)
    model.model.register_forward_pre_hook(too_large, with_kwargs=True)
    sequences = [[40, 41, 42], [80, 81], [13, 14]]
    work = (teacher.score(ids) for ids in sequences)
    first, second, third = await asyncio.gather(*work, return_exceptions=True)
    assert isinstance(first, array) and isinstance(second, array)
    check_scores(first, tiny_qwen3(), [40, 41, 42], 1.0)
    assert isinstance(third, InfrastructureError) and "out of memory" in str(third)
    await teacher.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_says_what_a_local_teacher_says(directory: Path, kind: Any) -> None:
    with EngineServer(directory, kind, logprobs_mode="raw_logprobs") as server:
        teacher: Teacher = over(server, kind)
        await teacher.prepare()
        model = tiny_qwen3()
        check_scores(await teacher.score(IDS), model, IDS, 1.0)
        check_top(await teacher.top(IDS, 7), model, IDS, 7, 1.0)
        part = await teacher.score(IDS, start=5)
        assert list(part[:5]) == [0.0] * 5 and part[5] != 0
        top = await teacher.top(IDS, 2, start=5)
        assert (top.ids[:5] == -1).all() and (top.ids[5:] >= 0).all()
        await teacher.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_ids_that_pad_a_servers_embedding_are_left_out(directory: Path, kind: Any) -> None:
    with EngineServer(directory, kind) as server:
        teacher = over(server, kind, vocab_size=100)
        top = await teacher.top(IDS, 10)
        _, tokens = plain(tiny_qwen3(), IDS).topk(10)
        for row, likeliest in zip(top.ids[1:], tokens.tolist(), strict=True):
            known = [token for token in likeliest if token < 100]
            assert row.tolist() == known + [-1] * (10 - len(known))
        await teacher.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_scores_at_temperature_1_within_its_context(
    directory: Path, kind: Any
) -> None:
    with EngineServer(directory, kind, context_limit=8) as server:
        teacher = over(server, kind)
        with pytest.raises(UserError, match=r"scores at temperature 1, not 0.7"):
            await teacher.prepare(0.7)
        assert server.requests == []
        await teacher.prepare()
        assert teacher.context_limit == 7  # it has to sample a token
        await teacher.score(IDS[:7])
        with pytest.raises(UserError, match="8 tokens is longer than the teacher's context of 7"):
            await teacher.score(IDS[:8])
        with pytest.raises(UserError, match="scores at temperature 1"):
            await teacher.top(IDS[:4], 2, 0.5)
        await teacher.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [{"fail_next": 2}, {"drop_next": 2}])
async def test_a_server_that_fails_is_asked_again(
    directory: Path, kind: Any, fault: dict[str, int]
) -> None:
    with EngineServer(directory, kind) as server:
        teacher = over(server, kind, retries=2)
        await teacher.prepare()
        server.knobs.update(fault)
        check_scores(await teacher.score(IDS), tiny_qwen3(), IDS, 1.0)
        server.knobs.update({name: 3 for name in fault})
        with pytest.raises(InfrastructureError, match=r"\(3 attempts\)") as failed:
            await teacher.top(IDS, 2)
        assert failed.value.kind == "engine"
        await teacher.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_without_log_probabilities_is_none(directory: Path, kind: Any) -> None:
    field = {"vllm": "prompt_logprobs", "sglang": "input_top_logprobs"}[kind]
    with EngineServer(directory, kind) as server:
        teacher = over(server, kind, retries=0)
        await teacher.prepare()
        server.knobs.drop_field = field
        with pytest.raises(InfrastructureError, match=r"gave no (prompt|input) log-probabilities"):
            await teacher.top(IDS, 2)
        await teacher.close()


async def test_a_server_that_hangs_and_the_turn_of_each_request(directory: Path) -> None:
    with EngineServer(directory, "vllm", delay_s=0.02) as server:
        teacher = over(server, "vllm", max_concurrency=2, retries=0, timeout_s=20)
        await teacher.prepare()
        await asyncio.gather(*(teacher.score(IDS) for _ in range(8)))
        assert server.peak == 2
        impatient = over(server, "vllm", retries=1, timeout_s=0.3)
        await impatient.prepare()
        server.knobs.hang = True
        with pytest.raises(InfrastructureError, match=r"no answer within 0.3 s \(2 attempts\)"):
            await impatient.score(IDS)
        server.knobs.hang = False
        await teacher.close()
        await impatient.close()


async def test_what_a_server_refuses_is_the_users_to_mend(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with EngineServer(directory, "vllm") as server:
        teacher = over(server, "vllm", model="other", api_key="sesame", where="teachers.0")
        with pytest.raises(UserError, match=r"teachers.0: .*model `other` does not exist"):
            await teacher.prepare()
        assert {h.get("authorization") for h in server.headers} == {"Bearer sesame"}
        named = over(server, "vllm", model="policy")
        with pytest.raises(UserError, match="larger --max-logprobs"):
            await named.top(IDS, 21)
        await teacher.close()
        await named.close()
    assert "sesame" not in caplog.text
    gone = ServerTeacher("sglang", server.url, retries=0)
    with pytest.raises(UserError, match="no sglang server that can be used"):
        await gone.prepare()
    await gone.close()
    with pytest.raises(UserError, match=r"teachers.0: 'ftp://a' is not a web address"):
        ServerTeacher("vllm", "ftp://a", where="teachers.0")
