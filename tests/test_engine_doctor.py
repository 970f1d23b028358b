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
    assert lines[6] == "  tried: 4 tokens sampled, with log-probabilities"
    assert float(lines[7].split()[-2]) < 1e-4


def test_what_is_missing_comes_with_how_to_get_it(directory: Path) -> None:
    with EngineServer(directory, "vllm", environment={}) as server:
        said = doctor(server.url)
    assert f"{CAN[0]}: yes" in said
    for name in CAN[1:]:
        line = next(line for line in said.splitlines() if name in line)
        assert ": no: start it with " in line and "VLLM_SERVER_DEV_MODE=1" in line


def test_a_server_that_gives_no_token_ids(directory: Path) -> None:
    with EngineServer(directory, "vllm", drop_field="token_ids") as server:
        assert "gave no token ids with a log-probability each" in doctor(server.url)


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
    assert "neither as vLLM nor as SGLang" in doctor(stranger)
    assert "cannot be reached" in doctor("http://127.0.0.1:9")
    assert "is not a web address" in doctor("127.0.0.1:9", code=2)
