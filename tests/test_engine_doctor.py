"""`retrain doctor --engine URL`: what a server can do, found by asking it."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_servers.server import EngineServer
from retrain.cli import app
from serving import saved, tiny_policy

CAN = [
    "token ids and log-probabilities",
    "interrupting what is under way",
    "full weights from a directory",
    "LoRA adapters while it runs",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_policy(), tmp_path_factory.mktemp("served"))


def doctor(url: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", "--engine", url])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_can_do_everything(directory: Path, kind: Any) -> None:
    with EngineServer(directory, kind) as server:
        lines = doctor(server.url).splitlines()
    assert lines[0].startswith(f"{server.url}: {kind} 0.")
    assert f"context limit: {server.backend.context_limit} tokens" in lines[1]
    assert lines[2:6] == [f"  {name}: yes" for name in CAN]
    assert float(lines[6].split()[-2]) < 1e-4 and "tried: its own scores" in lines[6]
    assert lines[7:] == ["  log-probabilities after temperature: yes", "  can be an engine"]


def test_log_probabilities_before_temperature_are_found_out(directory: Path) -> None:
    with EngineServer(directory, "vllm", logprobs_mode="raw_logprobs") as server:
        said = doctor(server.url, code=1)
    assert "after temperature: no: start vLLM with --logprobs-mode processed_logprobs" in said
    assert said.rstrip().endswith("cannot be an engine as it is")


def test_what_is_missing_comes_with_how_to_get_it(directory: Path) -> None:
    with EngineServer(directory, "vllm", environment={}) as server:
        said = doctor(server.url, code=1)
    assert f"{CAN[0]}: yes" in said
    for name in CAN[1:]:
        line = next(line for line in said.splitlines() if name in line)
        assert ": no: start it with " in line and "VLLM_SERVER_DEV_MODE=1" in line


def test_adapters_need_more_than_their_path(directory: Path) -> None:
    """Which is served without --enable-lora too."""
    with EngineServer(directory, "vllm", lora_rank=0) as server:
        said = doctor(server.url)
    assert "LoRA adapters while it runs: no: start it with --enable-lora" in said
    assert "dtype: float32" in said and said.rstrip().endswith("can be an engine")


def test_a_server_that_gives_no_token_ids(directory: Path) -> None:
    with EngineServer(directory, "vllm", drop_field="token_ids") as server:
        assert "gave no token ids with a log-probability each" in doctor(server.url, code=1)


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a web server of another kind."""
    server = HTTPServer(("127.0.0.1", 0), _Hello)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_other_servers_none_and_no_address(stranger: str) -> None:
    assert "neither as vLLM nor as SGLang" in doctor(stranger, code=1)
    assert "cannot be reached" in doctor("http://127.0.0.1:9", code=1)
    assert "is not a web address" in doctor("127.0.0.1:9", code=2)
