"""The servers that stand in for vLLM and SGLang are real enough to be believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from engine_servers.server import EngineServer
from retrain.models.scores import selected_logprobs
from tiny import byte_tokenizer, tiny_llama, tiny_qwen3

PROMPT = list(range(40, 60))
SHORT = [70, 71, 72]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Directories of models: `made(seed)` is one."""

    def make(seed: int = 0, model: Callable[..., Any] = tiny_qwen3, name: str = "") -> Path:
        directory = tmp_path / (name or f"{model.__name__}{seed}")
        if not directory.exists():
            model(seed).save_pretrained(directory)
            byte_tokenizer(special=("<eos>", "<stop>")).save_pretrained(directory)
        return directory

    return make


def ask(server: EngineServer, path: str, body: Any = None, **query: str) -> Any:
    got = httpx2.post(server.url + path, json=body, params=query, timeout=20)
    assert got.status_code == 200, got.text
    return got.json() if got.text and got.headers["content-type"] == "application/json" else None


def complete(server: EngineServer, prompt: list[int], count: int = 8, **params: Any) -> Any:
    body = {"model": server.name, "prompt": prompt, "max_tokens": count, "seed": 3}
    body |= {"logprobs": 0, "return_token_ids": True, **params}
    return ask(server, "/v1/completions", body)["choices"][0]


def generate(server: EngineServer, prompt: list[int], count: int = 8, **params: Any) -> Any:
    sampling = {"max_new_tokens": count, "sampling_seed": 3, **params}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    return ask(server, "/generate", body)


def expected(model: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Any:
    ids = torch.tensor([prompt + answer])
    mask = torch.arange(ids.shape[1]).unsqueeze(0) >= len(prompt)
    with torch.no_grad():
        lengths = torch.tensor([ids.shape[1]])
        return selected_logprobs(model, ids, lengths, mask, temperature)[0, len(prompt) :]


def is_of(choice: Any, model: Any, prompt: list[int]) -> bool:
    """Whether a vLLM answer has the log-probabilities of a model."""
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    of_model = expected(model, prompt, choice["token_ids"])
    return torch.allclose(found, of_model, atol=1e-4, rtol=0)


def reload(server: EngineServer, directory: Path) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    assert ask(server, "/collective_rpc", body) == {"results": [None]}


@contextmanager
def in_background(call: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_logprobs_are_the_models_after_temperature(made: Any, dialect: Any) -> None:
    model = tiny_qwen3(0)
    with EngineServer(made(0), dialect) as server:
        for count in (1, 16, 40):
            if dialect == "vllm":
                choice = complete(server, PROMPT, count, temperature=0.7, ignore_eos=True)
                ids, found = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            else:
                got = generate(server, PROMPT, count, temperature=0.7, ignore_eos=True)
                rows = got["meta_info"]["output_token_logprobs"]
                ids, found = got["output_ids"], [row[0] for row in rows]
                assert [row[1:] for row in rows] == [[token, None] for token in ids]
            assert len(ids) == count
            of_model = expected(model, PROMPT, ids, 0.7)
            torch.testing.assert_close(torch.tensor(found), of_model, atol=1e-4, rtol=0)


def test_raw_logprobs_are_before_temperature(made: Any) -> None:
    with EngineServer(made(0), logprobs_mode="raw_logprobs") as server:
        choice = complete(server, PROMPT, temperature=0.5, ignore_eos=True)
    assert is_of(choice, tiny_qwen3(0), PROMPT)


def test_a_seed_gives_the_same_tokens_in_company_and_alone(made: Any) -> None:
    with EngineServer(made(0)) as server:
        alone = [complete(server, PROMPT, 30, seed=i, ignore_eos=True) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            together = list(
                pool.map(lambda i: complete(server, PROMPT, 30, seed=i, ignore_eos=True), range(6))
            )
        assert server.peak > 1
    assert [c["token_ids"] for c in alone] == [c["token_ids"] for c in together]
    assert len({tuple(c["token_ids"]) for c in alone}) == 6


def test_how_completions_end(made: Any) -> None:
    """A stop token, a stop string over several tokens, the budget, the context limit."""
    with EngineServer(made(0), context_limit=64) as server:
        free = complete(server, PROMPT, 30, temperature=0.0, ignore_eos=True)
        ids = free["token_ids"]
        assert (free["finish_reason"], free["stop_reason"]) == ("length", None)
        stopped = complete(server, PROMPT, 30, temperature=0.0, stop_token_ids=[ids[5]])
        first = ids.index(ids[5])
        assert stopped["token_ids"] == ids[: first + 1]
        assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", ids[5])
        longest = complete(server, PROMPT, 60, ignore_eos=True)
        assert (len(longest["token_ids"]), longest["finish_reason"]) == (44, "length")
        text = server.backend.text(ids[17:20], skip_special_tokens=False)
        params = {"temperature": 0.0, "stop": [text], "skip_special_tokens": False}
        cut = complete(server, PROMPT, 30, **params)
        kept = complete(server, PROMPT, 30, **params, include_stop_str_in_output=True)
    said = server.backend.text(cut["token_ids"], skip_special_tokens=False)
    assert text in said
    assert text not in server.backend.text(cut["token_ids"][:-1], skip_special_tokens=False)
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", text)
    assert said.startswith(cut["text"]) and text not in cut["text"]
    assert kept["text"].endswith(text)


def test_a_special_token_is_no_stop_string_unless_it_is_asked_for(made: Any) -> None:
    with EngineServer(made(0)) as server:
        backend = server.backend
        special = backend.tokenizer.convert_tokens_to_ids("<stop>")
        head = torch.zeros(1, 32)
        with torch.no_grad():  # the only token that is ever sampled
            embedding = backend.current.model.get_input_embeddings().weight
            head = embedding[special].clone()
            embedding.zero_()
            embedding[special] = 20 * head
        without = complete(server, [special] * 4, 3, temperature=0.0, stop=["<stop>"])
        looked = {"stop": ["<stop>"], "skip_special_tokens": False}
        with_it = complete(server, [special] * 4, 3, temperature=0.0, **looked)
    assert without["token_ids"] == [special] * 3
    assert without["finish_reason"] == "length"
    assert with_it["token_ids"] == [special]
    assert with_it["stop_reason"] == "<stop>"


def test_prompt_logprobs(made: Any) -> None:
    with EngineServer(made(0)) as server:
        rows = complete(server, PROMPT, 1, prompt_logprobs=0, temperature=0.5)["prompt_logprobs"]
        sglang = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
    of_model = expected(tiny_qwen3(0), PROMPT[:1], PROMPT[1:])
    assert rows[0] is None
    assert [list(row) for row in rows[1:]] == [[str(token)] for token in PROMPT[1:]]
    found = [row[str(token)]["logprob"] for row, token in zip(rows[1:], PROMPT[1:], strict=True)]
    torch.testing.assert_close(torch.tensor(found), of_model, atol=1e-4, rtol=0)
    with EngineServer(made(0), "sglang") as server:
        asked = sglang | {"return_logprob": True, "logprob_start_len": 0}
        pairs = ask(server, "/generate", asked)["meta_info"]["input_token_logprobs"]
    assert pairs[0] == [None, PROMPT[0], None]
    assert [row[1] for row in pairs] == PROMPT
    found = [row[0] for row in pairs[1:]]
    torch.testing.assert_close(torch.tensor(found), of_model, atol=1e-4, rtol=0)


def test_pausing_with_abort_returns_what_there_is(made: Any) -> None:
    with EngineServer(made(0), delay_s=0.01) as server:
        call = lambda: complete(server, PROMPT, 200, ignore_eos=True)  # noqa: E731
        with in_background(call) as answer:
            until(lambda: server.generated and server.generated[0] > 3)
            assert ask(server, "/pause", mode="abort") == {"status": "paused"}
            choice = answer.result(5)
        assert choice["finish_reason"] == "abort"
        assert 3 < len(choice["token_ids"]) < 200
        assert is_of(choice, tiny_qwen3(0), PROMPT)
        assert httpx2.get(server.url + "/is_paused").json() == {"is_paused": True}
        with in_background(lambda: complete(server, PROMPT, 2)) as later:
            time.sleep(0.1)
            assert not later.done()
            ask(server, "/resume")
            assert len(later.result(5)["token_ids"]) == 2


def test_keep_freezes_and_new_weights_take_over_once_the_cache_is_reset(made: Any) -> None:
    with EngineServer(made(0), delay_s=0.01) as server:
        with in_background(lambda: complete(server, SHORT, 60, ignore_eos=True)) as answer:
            until(lambda: server.generated and server.generated[0] > 3)
            ask(server, "/pause", mode="keep")
            frozen = server.generated[0]
            time.sleep(0.1)
            assert server.generated == [frozen]
            reload(server, made(1))
            assert ask(server, "/reset_prefix_cache") == {"success": False}
            done = ask(server, "/reset_prefix_cache", reset_running_requests="true")
            assert done == {"success": True}
            ask(server, "/update_weight_version", {"new_version": "7"})
            ask(server, "/resume")
            choice = answer.result(10)
        assert httpx2.get(server.url + "/weight_info").json() == {"weight_version": "7"}
    ids, found = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    assert len(ids) == 60
    parts = expected(tiny_qwen3(0), SHORT, ids)[:frozen], expected(tiny_qwen3(1), SHORT, ids)
    of_both = torch.cat([parts[0], parts[1][frozen:]])
    torch.testing.assert_close(torch.tensor(found), of_both, atol=1e-4, rtol=0)


def test_a_reload_changes_the_weights_but_for_cached_prompts(made: Any) -> None:
    old, new = tiny_qwen3(0), tiny_qwen3(1)
    with EngineServer(made(0)) as server:
        assert is_of(complete(server, PROMPT), old, PROMPT)
        reload(server, made(1))
        assert is_of(complete(server, SHORT), new, SHORT)
        assert is_of(complete(server, PROMPT), old, PROMPT)
        longer = [*PROMPT, 5]
        assert is_of(complete(server, longer), old, longer)
        assert ask(server, "/reset_prefix_cache") == {"success": True}
        assert is_of(complete(server, PROMPT), new, PROMPT)


@pytest.mark.parametrize("model", [tiny_qwen3, tiny_llama])
def test_the_tied_embedding_trap(made: Any, model: Any) -> None:
    """200, and what is sampled from is neither the old policy nor the new one."""
    with EngineServer(made(0, model), keeps_head=True) as server:
        reload(server, made(1, model))
        choice = complete(server, SHORT)
        assert not is_of(choice, model(1), SHORT)
        assert not is_of(choice, model(0), SHORT)
        server.knobs.keeps_head = False
        reload(server, made(1, model))
        assert is_of(complete(server, SHORT), model(1), SHORT)
        server.knobs.ignores_reload = True
        reload(server, made(2, model))
        assert is_of(complete(server, SHORT), model(1), SHORT)


def adapter(directory: Path, base: Path, seed: int) -> tuple[Path, Any]:
    """A LoRA that changes something, saved, and the model with it."""
    torch.manual_seed(seed)
    base_model = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    model = get_peft_model(base_model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(str(directory))
    return directory, model.eval()


def test_vllm_adapters(made: Any, tmp_path: Path) -> None:
    base = made(0)
    one, model = adapter(tmp_path / "one", base, 1)
    two, other = adapter(tmp_path / "two", base, 2)
    with EngineServer(base) as server:
        load = {"lora_name": "step", "lora_path": str(one)}
        ask(server, "/v1/load_lora_adapter", load)
        cards = httpx2.get(server.url + "/v1/models").json()["data"]
        assert [(c["id"], c["parent"], c["max_model_len"]) for c in cards] == [
            ("policy", None, 256),
            ("step", "policy", None),
        ]
        assert is_of(complete(server, PROMPT, model="step"), model, PROMPT)
        assert is_of(complete(server, PROMPT), tiny_qwen3(0), PROMPT)
        again = httpx2.post(server.url + "/v1/load_lora_adapter", json=load)
        assert again.status_code == 400 and "already" in again.json()["error"]["message"]
        load |= {"lora_path": str(two), "load_inplace": True}
        ask(server, "/v1/load_lora_adapter", load)
        assert is_of(complete(server, PROMPT, model="step"), other, PROMPT)
        ask(server, "/v1/unload_lora_adapter", {"lora_name": "step"})
        gone = httpx2.post(server.url + "/v1/completions", json={"model": "step", "prompt": [1]})
    assert gone.status_code == 404
    assert gone.json()["error"]["type"] == "NotFoundError"


def test_sglang_adapters_and_weights(made: Any, tmp_path: Path) -> None:
    base = made(0)
    one, model = adapter(tmp_path / "one", base, 1)
    with EngineServer(base, "sglang") as server:
        loaded = ask(server, "/load_lora_adapter", {"lora_name": "a", "lora_path": str(one)})
        assert (loaded["success"], loaded["loaded_adapters"]) == (True, {"a": str(one)})
        body = {"input_ids": PROMPT, "lora_path": "a", "return_logprob": True}
        got = ask(server, "/generate", body | {"sampling_params": {"max_new_tokens": 4}})
        found = [row[0] for row in got["meta_info"]["output_token_logprobs"]]
        of_model = expected(model, PROMPT, got["output_ids"])
        torch.testing.assert_close(torch.tensor(found), of_model, atol=1e-4, rtol=0)
        before = generate(server, PROMPT)["meta_info"]
        update = {"model_path": str(made(1)), "weight_version": "5"}
        assert ask(server, "/update_weights_from_disk", update)["success"]
        after = generate(server, PROMPT)
        wrong = httpx2.post(
            server.url + "/update_weights_from_disk", json={"model_path": str(tmp_path / "none")}
        )
    assert (before["weight_version"], after["meta_info"]["weight_version"]) == ("default", "5")
    found = [row[0] for row in after["meta_info"]["output_token_logprobs"]]
    of_model = expected(tiny_qwen3(1), PROMPT, after["output_ids"])
    torch.testing.assert_close(torch.tensor(found), of_model, atol=1e-4, rtol=0)
    assert wrong.status_code == 400 and wrong.json()["success"] is False


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_adapters_that_are_refused(made: Any, tmp_path: Path, dialect: Any) -> None:
    one, _ = adapter(tmp_path / "one", made(0), 1)
    for rank, path, said in (
        (0, one, "LoRA is not enabled"),
        (2, one, "LoRA rank 4 is greater than max_lora_rank 2"),
        (8, tmp_path / "none", "none"),
    ):
        with EngineServer(made(0), dialect, lora_rank=rank) as server:
            prefix = "/v1" if dialect == "vllm" else ""
            body = {"lora_name": "a", "lora_path": str(path)}
            got = httpx2.post(f"{server.url}{prefix}/load_lora_adapter", json=body)
            assert got.status_code >= 400 and said in got.text
            assert server.backend.adapters == {}


def test_sglang_reasons_and_aborts(made: Any) -> None:
    with EngineServer(made(0), "sglang") as server:
        free = generate(server, PROMPT, 6, temperature=0.0, ignore_eos=True)
        assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
        assert free["meta_info"]["completion_tokens"] == 6
        last = free["output_ids"][0]
        stopped = generate(server, PROMPT, 6, temperature=0.0, stop_token_ids=[last])
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": last}
        server.knobs.delay_s = 0.01
        body = {"input_ids": PROMPT, "rid": "one", "sampling_params": {"max_new_tokens": 200}}
        body["sampling_params"] |= {"ignore_eos": True}
        with in_background(lambda: ask(server, "/generate", body)) as answer:
            until(lambda: server.generated and server.generated[0] > 2)
            ask(server, "/abort_request", {"rid": "another"})
            ask(server, "/abort_request", {"rid": "one"})
            got = answer.result(5)
        assert got["meta_info"]["finish_reason"]["type"] == "abort"
        assert got["meta_info"]["id"] == "one"
        assert 2 < len(got["output_ids"]) < 200


def test_sglang_flushes_only_what_is_not_in_use(made: Any) -> None:
    with EngineServer(made(0), "sglang", delay_s=0.01) as server:
        call = lambda: generate(server, PROMPT, 40, ignore_eos=True)  # noqa: E731
        for mode, status in (("in_place", 400), ("retract", 200)):
            with in_background(call) as answer:
                until(lambda: server.generated and server.generated[0] > 2)
                ask(server, "/pause_generation", {"mode": mode})
                assert httpx2.post(server.url + "/flush_cache").status_code == status
                assert not answer.done()
                ask(server, "/continue_generation", {})
                assert len(answer.result(5)["output_ids"]) == 40


def test_over_long_prompts_are_refused(made: Any) -> None:
    with EngineServer(made(0), context_limit=32) as server:
        got = httpx2.post(
            server.url + "/v1/completions",
            json={"model": "policy", "prompt": [1] * 33, "max_tokens": 4},
        )
        assert got.status_code == 400
        assert got.json()["error"]["code"] == 400
        assert "maximum context length is 32" in got.json()["error"]["message"]
    with EngineServer(made(0), "sglang", context_limit=32) as server:
        body = {"input_ids": [1] * 30, "sampling_params": {"max_new_tokens": 4}}
        got = httpx2.post(server.url + "/generate", json=body)
        assert got.status_code == 400
        assert "exceeds the model's maximum context length" in got.json()["error"]["message"]
