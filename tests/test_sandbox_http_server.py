"""What the HTTP sandbox makes of a server: its answers, its refusals, its self-test."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from retrain.sandbox.base import Result, Sandbox, SandboxUnavailable
from retrain.sandbox.http import server as server_module
from retrain.sandbox.http.sandbox import HttpSandbox
from retrain.sandbox.http.server import split_url
from retrain.types import UserError
from run_code_server import RunCodeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunCodeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with RunCodeServer() as server:
        yield server


@pytest.fixture
async def sandbox(server: RunCodeServer) -> AsyncIterator[HttpSandbox]:
    sandbox = HttpSandbox(server.url, timeout_s=20.0, max_output_chars=200)
    await sandbox.start()
    yield sandbox
    await sandbox.close()


async def run(sandbox: Sandbox, code: str = "1") -> Result:
    session = await sandbox.session()
    try:
        return await session.run(code)
    finally:
        await session.close()


# What the server says


@pytest.mark.parametrize(
    ("ran", "expected"),
    [
        ({"return_code": 137}, "killed"),
        ({"return_code": -9}, "killed"),
        ({"return_code": 139}, "killed"),
        ({"return_code": 2}, "exit"),
        ({"return_code": 10**30}, "exit"),
        ({"return_code": 1, "stderr": "no traceback"}, "exit"),
        ({"return_code": 0, "stdout": None, "stderr": None}, "ok"),
        ({"return_code": 0, "stdout": "a\ud800"}, "ok"),
        ({"return_code": None, "status": "TimeLimitExceeded"}, "timeout"),
        (
            {
                "return_code": 1,
                "stderr": "Traceback (most recent call last):\n  File 'a'\n"
                "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8 GiB\n",
            },
            "memory",
        ),
    ],
)
async def test_results_as_the_server_reports_them(
    server: RunCodeServer, sandbox: HttpSandbox, ran: dict[str, Any], expected: str
) -> None:
    server.finish(**ran)
    result = await run(sandbox)
    assert result.status == expected
    assert bool(result.error) == (expected != "ok")
    result.stdout.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>busy</html>",
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"status": "Fine"}',
        b'{"status": ["Success"]}',
        b'{"status": "Success", "run_result": null}',
        b'{"status": "Success", "run_result": "ok"}',
        b'{"status": "Success", "run_result": {"status": "Finished"}}',
        b'{"status": "Success", "run_result": {"status": "Finished", "return_code": true}}',
        b'{"status": "Success", "run_result": {"status": "Finished", "return_code": "0"}}',
        b'{"status": "Success", "run_result": {"status": "Odd", "return_code": 0}}',
        b'{"status": "Success", "run_result": '
        b'{"status": "Finished", "return_code": 0, "stdout": ["a"]}}',
        b'{"status": "SandboxError", "message": "no room"}',
        b'{"status": "SandboxError", "message": {"a": 1}}',
        b'{"status": "Failed", "run_result": {"status": "Error", "stderr": "no bash"}}',
    ],
)
async def test_an_answer_that_cannot_be_used_is_the_sandboxs_fault(
    server: RunCodeServer, sandbox: HttpSandbox, body: bytes
) -> None:
    server.body = body
    session = await sandbox.session()
    with pytest.raises(SandboxUnavailable, match=f"127.0.0.1:{server.port} answered"):
        await session.run("1")
    server.body = None
    assert "the sandbox failed" in (await session.run("1")).error
    assert (await run(sandbox, "2")).stdout == "2\n"


async def test_a_sandbox_error_names_its_cause(server: RunCodeServer, sandbox: HttpSandbox) -> None:
    server.answer(status="SandboxError", message="exception:\n\x1b[31mno preexec" + "x" * 10_000)
    with pytest.raises(SandboxUnavailable, match=r"SandboxError: exception: \[31mno preexec") as e:
        await run(sandbox)
    assert len(str(e.value)) < 500 and "\x1b" not in str(e.value)


@pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
async def test_a_server_in_trouble_is_unavailable(
    server: RunCodeServer, sandbox: HttpSandbox, code: int
) -> None:
    server.status_code, server.body = code, b'{"detail": "too busy"}'
    with pytest.raises(SandboxUnavailable, match=f"answered {code}.*too busy"):
        await run(sandbox)


async def test_code_that_is_too_large_for_the_server_is_the_models_fault(
    server: RunCodeServer, sandbox: HttpSandbox
) -> None:
    await sandbox.start()
    server.status_code = 413
    result = await run(sandbox, "1")
    assert result.status == "error" and result.error.startswith("SyntaxError: too much code")
    with pytest.raises(UserError, match="answered 413"):
        await HttpSandbox(server.url).start()


@pytest.mark.parametrize("code", [301, 400, 401, 403, 404, 422])
async def test_a_refusal_is_the_users_to_fix(
    server: RunCodeServer, sandbox: HttpSandbox, code: int
) -> None:
    server.status_code, server.body = code, b'{"detail": "not you"}' + b"z" * 10_000
    with pytest.raises(UserError, match=f"sandbox.url: .* answered {code}: .*not you") as raised:
        await run(sandbox)
    assert raised.value.next_step and len(raised.value.cause) < 500


@pytest.mark.parametrize("code", [200, 500])
async def test_an_endless_answer_is_not_kept(
    server: RunCodeServer, sandbox: HttpSandbox, code: int
) -> None:
    server.endless, server.status_code = True, code
    session = await sandbox.session()
    if code == 500:
        with pytest.raises(SandboxUnavailable, match="answered 500"):
            await session.run("1")
    else:
        result = await session.run("1")
        assert (result.status, result.truncated) == ("output", True)
        assert result.error == "The code printed more than 8 MiB." and result.wall_s > 0
        assert "it printed too much" in (await session.run("1")).error
    assert await asyncio.to_thread(server.hung_up.wait, 5)


async def test_a_server_that_hangs_or_hangs_up_is_unavailable(
    server: RunCodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_CONNECT_S", 0.2)
    monkeypatch.setattr(server_module, "_MARGIN_S", 0.2)
    sandbox = HttpSandbox(server.url, timeout_s=0.2)
    await sandbox.start()
    server.delay_s = 30.0
    start = time.perf_counter()
    with pytest.raises(SandboxUnavailable, match="gave no answer within 1 s"):
        await run(sandbox)
    assert time.perf_counter() - start < 5
    assert await asyncio.to_thread(server.hung_up.wait, 5)
    server.delay_s, server.drop = 0.0, True
    with pytest.raises(SandboxUnavailable, match="broke off"):
        await run(sandbox)
    await sandbox.close()


# Start


async def test_the_self_test_runs_once(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(f"{server.url}/run_code/", timeout_s=20.0, packages=("json", "xml.dom"))
    await asyncio.gather(*(sandbox.session() for _ in range(5)))
    await sandbox.start()
    assert server.paths == ["/run_code"]
    assert sandbox.capabilities.packages == ("json", "xml.dom")
    await sandbox.close()


async def test_a_missing_package_is_named(server: RunCodeServer) -> None:
    sandbox = HttpSandbox(server.url, packages=("json", "no_such_package"))
    with pytest.raises(UserError, match=r"sandbox\.packages.*cannot import 'no_such_package': Mod"):
        await sandbox.start()
    await sandbox.close()


async def test_a_package_that_takes_python_with_it_is_named(
    server: RunCodeServer, tmp_path: Path
) -> None:
    Path(tmp_path, "bad.py").write_text("import os\nos.abort()")
    sandbox = HttpSandbox(server.url, packages=("bad",), files={"bad.py": tmp_path / "bad.py"})
    with pytest.raises(UserError, match=r"cannot import 'bad': The process crashed \(SIGABRT\)"):
        await sandbox.start()
    await sandbox.close()


async def test_a_server_that_drops_files_is_refused(server: RunCodeServer, tmp_path: Path) -> None:
    Path(tmp_path, "a").write_text("")
    server.finish(0, stdout="ready 42\nno file a\n")
    sandbox = HttpSandbox(server.url, files={"a": tmp_path / "a"})
    with pytest.raises(UserError, match=r"sandbox\.files: .* does not give 'a'"):
        await sandbox.start()
    await sandbox.close()


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"hello", "sandbox.url: .* is not JSON"),
        (b"{}", "sandbox.url: .* without a known status"),
    ],
)
async def test_another_kind_of_server_is_refused(
    server: RunCodeServer, body: bytes, cause: str
) -> None:
    server.body = body
    sandbox = HttpSandbox(server.url)
    with pytest.raises(UserError, match=cause) as raised:
        await sandbox.session()
    assert "SandboxFusion" in raised.value.next_step
    server.finish(0, stdout="hello\n")
    with pytest.raises(UserError, match="its output did not come back"):
        await sandbox.start()
    server.finish(1, stdout="hello\n")
    with pytest.raises(UserError, match="could not run a test program: SystemExit: 1"):
        await sandbox.start()
    server.endless = True
    with pytest.raises(UserError, match="more than 8 MiB"):
        await sandbox.start()
    server.endless, server.status_code = False, 503
    with pytest.raises(SandboxUnavailable, match="answered 503"):
        await sandbox.start()
    server.status_code, server.body = 200, None
    assert (await run(sandbox, "5")).stdout == "5\n"
    await sandbox.close()


async def test_nobody_there_is_the_users_to_fix_and_shows_no_secret() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        sandbox = HttpSandbox(f"http://me:hunter2@127.0.0.1:{port}?token=hunter3")
        with pytest.raises(UserError, match=f"sandbox.url: .*:{port} cannot be reached") as raised:
            await sandbox.start()
    shown = f"{raised.value}{raised.value.__cause__!r}{sandbox.capabilities.isolation}"
    assert "hunter" not in shown and f"http://127.0.0.1:{port}" in shown
    await sandbox.close()


async def test_credentials_go_in_a_header_and_not_in_logs(
    server: RunCodeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    sandbox = HttpSandbox(server.url.replace("//", "//me:p%40ss@"))
    await sandbox.start()
    expected = base64.b64encode(b"me:p@ss").decode()
    assert server.headers[0]["authorization"] == f"Basic {expected}"
    assert "p%40ss" not in caplog.text and "p@ss" not in caplog.text
    await sandbox.close()


def test_urls() -> None:
    assert split_url("http://host:8080") == ("http://host:8080/run_code", "http://host:8080", None)
    assert split_url("http://host:8080/run_code") == split_url("http://host:8080/")
    assert split_url("https://u:p%3A@[::1]/a/run_code/?k=v") == (
        "https://[::1]/a/run_code?k=v",
        "https://[::1]/a",
        ("u", "p:"),
    )


def test_values_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for url in ("", "host:8080", "ftp://host", "http://", "http://h:99999", "http://[::1"):
        with pytest.raises(UserError, match=r"sandbox\.url"):
            HttpSandbox(url)
    with pytest.raises(UserError) as raised:
        HttpSandbox("ftp://me:hunter2@host")
    assert "hunter2" not in str(raised.value)
    for name in ("timeout_s", "memory_mb", "max_output_chars", "max_concurrency"):
        values: dict[str, Any] = {name: 0}
        with pytest.raises(UserError, match=rf"sandbox\.{name} is 0"):
            HttpSandbox("http://host", **values)
    Path(tmp_path, "a").write_text("")
    for name in ("/etc/a", "../a", "."):
        with pytest.raises(UserError, match=r"sandbox\.files: "):
            HttpSandbox("http://host", files={name: tmp_path / "a"})
    with pytest.raises(UserError, match=r"sandbox\.files: .* cannot be read"):
        HttpSandbox("http://host", files={"a": tmp_path / "missing"})
    with Path(tmp_path, "big").open("wb") as big:
        big.truncate(64 * 2**20 + 1)
    with pytest.raises(UserError, match=r"sandbox\.files: 67108865 bytes"):
        HttpSandbox("http://host", files={"big": tmp_path / "big"})
