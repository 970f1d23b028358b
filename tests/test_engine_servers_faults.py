"""The servers that stand in for vLLM and SGLang misbehave to order, and run as processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from engine_servers.launch import environment, free_port
from engine_servers.server import EngineServer
from test_engine_servers import SHORT, ask, complete, made, until

__all__ = ["made"]


def test_paths_depend_on_the_environment_and_the_knobs(made: Any) -> None:
    with EngineServer(made(0), environment={}) as server:
        paths = httpx2.get(server.url + "/openapi.json").json()["paths"]
        assert set(paths) >= {"/health", "/v1/completions", "/v1/models", "/version"}
        assert not set(paths) & {"/pause", "/collective_rpc", "/v1/load_lora_adapter"}
        assert httpx2.post(server.url + "/pause").status_code == 404
        assert httpx2.get(server.url + "/v1/completions").status_code == 405
    with EngineServer(made(0), missing=["/reset_prefix_cache"]) as server:
        paths = httpx2.get(server.url + "/openapi.json").json()["paths"]
        assert "/pause" in paths and "/reset_prefix_cache" not in paths
        assert httpx2.post(server.url + "/reset_prefix_cache").status_code == 404


def test_misbehaviour_to_order(made: Any) -> None:
    with EngineServer(made(0), fail_next=1, drop_next=1) as server:
        body = {"model": "policy", "prompt": SHORT, "return_token_ids": True}
        got = httpx2.post(server.url + "/v1/completions", json=body)
        assert (got.status_code, got.json()["error"]["code"]) == (500, 500)
        with pytest.raises(httpx2.TransportError):
            httpx2.post(server.url + "/v1/completions", json=body)
        server.knobs.drop_field = "token_ids"
        assert "token_ids" not in complete(server, SHORT)
        server.knobs.hang = True
        for path in ("/health", "/version"):
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.get(server.url + path, timeout=0.1)
        server.knobs.hang = False
        assert httpx2.get(server.url + "/health").status_code == 200
        assert len(server.asked("/v1/completions")) == 3
        assert httpx2.post(server.url + "/knobs", json={"delay_s": 0.5}).status_code == 200
        assert server.knobs.delay_s == 0.5


def test_a_client_that_hangs_up_ends_its_generation(made: Any) -> None:
    with EngineServer(made(0), delay_s=0.02) as server:
        with pytest.raises(httpx2.ReadTimeout):
            body = {"model": "policy", "prompt": SHORT, "max_tokens": 200, "ignore_eos": True}
            httpx2.post(server.url + "/v1/completions", json=body, timeout=0.2)
        assert server.hung_up.wait(5)
        until(lambda: not server.generated)


def test_leaving_it_ends_what_is_in_flight(made: Any) -> None:
    def call() -> None:
        with pytest.raises(httpx2.TransportError):
            complete(server, SHORT, 100)

    with EngineServer(made(0), delay_s=1.0) as server:
        thread = threading.Thread(target=call)
        thread.start()
        until(lambda: server.generated)
    thread.join(5)
    assert not thread.is_alive()


def test_chat_of_the_model(made: Any) -> None:
    with EngineServer(made(0)) as server:
        body = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}
        body |= {"max_tokens": 5, "temperature": 0.0, "seed": 1}
        got = ask(server, "/v1/chat/completions", body)
    assert got["choices"][0]["message"]["role"] == "assistant"
    assert got["usage"]["completion_tokens"] <= 5


def test_a_process_that_does_not_come_up(tmp_path: Path) -> None:
    knobs = tmp_path / "knobs.json"
    knobs.write_text('{"exit_at_start": 3}')
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    ended = subprocess.run(
        command, env=environment(knobs), capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (3, "told not to come up\n")


@pytest.mark.parametrize(
    ("module", "flag"),
    [("vllm.entrypoints.openai.api_server", "--model"), ("sglang.launch_server", "--model-path")],
)
def test_as_a_process_by_the_real_command_line(
    made: Any, tmp_path: Path, module: str, flag: str
) -> None:
    port, knobs = free_port(), tmp_path / "knobs.json"
    knobs.write_text('{"die_after": 1}')
    command = [sys.executable, "-m", module, flag, str(made(0)), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "policy", "--dtype", "float32"]
    command += ["--enforce-eager", "--logprobs-mode=processed_logprobs"]
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            return httpx2.get(url + "/health", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    start = time.monotonic()
    process = subprocess.Popen(command, env=environment(knobs, VLLM_SERVER_DEV_MODE="1"))
    try:
        until(healthy, 60)
        assert time.monotonic() - start < 30
        vllm = module.startswith("vllm")
        path = "/v1/completions" if vllm else "/generate"
        body: dict[str, Any] = {"input_ids": SHORT, "sampling_params": {"max_new_tokens": 2}}
        if vllm:
            body = {"model": "policy", "prompt": SHORT, "max_tokens": 2}
            paths = httpx2.get(url + "/openapi.json").json()["paths"]
            assert "/pause" in paths and "/v1/load_lora_adapter" not in paths
        assert httpx2.post(url + path, json=body, timeout=20).status_code == 200
        recorded = httpx2.get(url + "/recorded").json()
        assert [path, body] in recorded["requests"] and recorded["peak"] == 1
        with pytest.raises(httpx2.TransportError):
            httpx2.post(url + path, json=body, timeout=20)
        assert process.wait(10) == 1
        assert json.loads(knobs.read_text()) == {}
    finally:
        process.kill()
        process.wait()
