"""MCP servers as tools: the SDK's own server classes, over stdio, streamable HTTP and SSE."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrain.config import load_config
from retrain.envs import ToolEnvironment
from retrain.loops.check import check
from retrain.tools import Tool, ToolResult, ToolRunner, close_tools, resolve_tools
from retrain.types import InfrastructureError, MessageType, ToolCall, UserError
from runs import rl_config
from scripted import TAGS, play, tag_renderer

pytest.importorskip("mcp")

SERVER = str(Path(__file__).with_name("mcp_servers.py"))
RAW = str(Path(__file__).with_name("mcp_raw_server.py"))


def build(mode: str = "stdio", **params: Any) -> list[Tool]:
    """Of a server on the SDK's classes, which takes more than a second to start."""
    return resolve_tools("mcp", {"command": sys.executable, "args": [SERVER, mode], **params})


def build_raw(mode: str = "", **params: Any) -> list[Tool]:
    return resolve_tools("mcp", {"command": sys.executable, "args": [RAW, mode], **params})


@contextlib.contextmanager
def closing(tools: list[Tool]) -> Iterator[list[Tool]]:
    try:
        yield tools
    finally:
        asyncio.run(close_tools(tools))


@pytest.fixture(scope="module")
def shared() -> Iterator[list[Tool]]:
    """One server for all that leave it whole; made outside of any event loop."""
    with closing(build()) as tools:
        yield tools


def runner(tools: list[Tool], **settings: Any) -> ToolRunner:
    return ToolRunner(tools, **{"timeout_s": 20.0, "backoff_s": 0.01, **settings})


async def ask(tools: list[Tool], name: str, /, **arguments: Any) -> ToolResult:
    async with runner(tools) as calls:
        [result] = await calls.run([ToolCall(name, arguments)])
    return result


async def said(tools: list[Tool], name: str, /, **arguments: Any) -> tuple[str, str]:
    result = await ask(tools, name, **arguments)
    return result.status, result.text


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, within_s: float = 15.0) -> bool:
    end = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def by_name(tools: list[Tool]) -> dict[str, Tool]:
    return {tool.name: tool for tool in tools}


def test_names_descriptions_and_schemas_are_the_servers(shared: list[Tool]) -> None:
    tools = by_name(shared)
    assert tools["add"].description == "Add two integers."
    assert tools["add"].parameters == {
        "type": "object",
        "properties": {
            "a": {"title": "A", "type": "integer"},
            "b": {"title": "B", "type": "integer", "default": 1},
        },
        "required": ["a"],
        "title": "addArguments",
    }
    assert "say_echo" in tools  # the server's name, say.echo, has a dot
    assert tools["add"].timeout_s is None  # type: ignore[attr-defined]


async def test_results_as_text(shared: list[Tool]) -> None:
    assert await said(shared, "add", a=2, b=3) == ("ok", "5")
    assert await said(shared, "say_echo", text="Grüezi") == ("ok", "Grüezi")
    structured = await said(shared, "place")
    assert structured == ("ok", '{"name": "Säntis", "height_m": 2501.9}')
    status, text = await said(shared, "measured")  # both forms: the text only, once
    assert (status, json.loads(text)) == ("ok", {"name": "Rigi", "height_m": 1797.5})
    assert await said(shared, "things") == (
        "ok",
        "first\n[image: image/png, 6 bytes]\n[resource: file:///r.txt]\ninside the resource\n"
        "[resource: file:///b.bin, application/pdf]",
    )


async def test_whose_fault_a_call_was(shared: list[Tool]) -> None:
    assert await said(shared, "fail", reason="no luck") == (
        "tool_error",
        "Error executing tool fail: no luck",
    )
    assert await said(shared, "add", b=1) == ("model_error", "argument 'a' is missing")
    assert await said(shared, "add", a="many") == (
        "model_error",
        "argument 'a': 'many' is not of type 'integer'",
    )
    assert await said(shared, "refuse") == ("model_error", "not with these")
    assert await said(shared, "protest") == ("tool_error", "out of order")


async def test_a_string_is_read_as_json_where_none_is_wanted(shared: list[Tool]) -> None:
    assert await said(shared, "add", a="2", b=" 40") == ("ok", "42")
    assert await said(shared, "say_echo", text="1", times="[1, 2]") == ("ok", "1 [1, 2]")


async def test_what_cannot_be_sent_does_not_harm_the_connection(shared: list[Tool]) -> None:
    before = await said(shared, "process_id")
    assert await said(shared, "say_echo", text="a\ud800b") == ("ok", "a?b")
    deep: Any = {}
    for _ in range(400):
        deep = {"x": deep}
    status, text = await said(shared, "say_echo", text="", more=deep)
    assert (status, "cannot be sent" in text) == ("model_error", True)
    status, _ = await said(shared, "say_echo", text="", more=float("nan"))
    assert status == "model_error"
    assert await said(shared, "process_id") == before


def test_event_loops_come_and_go(shared: list[Tool]) -> None:
    for a in range(3):
        assert asyncio.run(said(shared, "add", a=a, b=1)) == ("ok", str(a + 1))


async def test_a_call_that_hangs_is_cancelled_at_the_server_and_blocks_no_other() -> None:
    tools = build(tools=["hang", "add", "how_many_cancelled"], timeout_s=1.0)
    try:
        assert [tool.name for tool in tools] == ["hang", "add", "how_many_cancelled"]
        async with runner(tools) as calls:
            many = [ToolCall("hang", {}), *[ToolCall("add", {"a": n}) for n in range(20)]]
            results = await calls.run(many)
            assert results[0].status == "timeout"
            assert results[0].text == "hang gave no result within 1 s."
            assert [r.text for r in results[1:]] == [str(n + 1) for n in range(20)]
            assert max(r.wall_s for r in results[1:]) < 1.0
            [count] = await calls.run([ToolCall("how_many_cancelled", {})])
            assert count.text == "1"
    finally:
        await close_tools(tools)


async def test_a_server_that_a_call_wedged_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    tools = build_raw(tools=["wedge", "process_id"], timeout_s=1.0)
    try:
        first = int((await ask(tools, "process_id")).text)
        assert (await ask(tools, "wedge")).status == "timeout"
        await asyncio.to_thread(gone, first)
        assert not alive(first)
        assert "no longer answers" in caplog.text
        result = await ask(tools, "process_id")
        assert result.status == "ok" and int(result.text) != first
    finally:
        await close_tools(tools)


async def test_a_server_that_dies_is_started_again_and_the_call_retried(tmp_path: Path) -> None:
    tools = build(tools=["die", "process_id"], timeout_s=5.0)
    try:
        before = int((await ask(tools, "process_id")).text)
        marker = str(tmp_path / "marker")
        assert await said(tools, "die", marker=marker) == ("ok", "survived")
        assert not alive(before)
        assert int((await ask(tools, "process_id")).text) != before
    finally:
        await close_tools(tools)


async def test_restarts_are_counted_over_the_run() -> None:
    tools = build_raw(tools=["die", "add"], restarts=1)
    try:
        async with runner(tools, retries=0) as calls:
            with pytest.raises(InfrastructureError, match=r"broke off.*\ndying as told") as failed:
                await calls.run([ToolCall("die", {})])
            assert failed.value.kind == "tool"
            assert (await calls.run([ToolCall("add", {"a": 1})]))[0].text == "2"
            with pytest.raises(InfrastructureError):
                await calls.run([ToolCall("die", {})])
            for _ in range(2):
                with pytest.raises(InfrastructureError, match="its 1 restarts are used up"):
                    await calls.run([ToolCall("add", {"a": 1})])
    finally:
        await close_tools(tools)


async def test_the_time_of_a_restart_is_not_the_calls() -> None:
    """The wait before it alone, half a second, is more than a call may take."""
    tools = build_raw(tools=["die", "add"], timeout_s=0.4)
    try:
        async with runner(tools, retries=0) as calls:
            with pytest.raises(InfrastructureError):
                await calls.run([ToolCall("die", {})])
            assert (await calls.run([ToolCall("add", {"a": 1})]))[0].status == "ok"
    finally:
        await close_tools(tools)


async def test_a_server_for_each_rollout_shared_by_its_tools() -> None:
    tools = build_raw(tools=["note", "read_notes", "process_id", "die"], per_rollout=True)
    async with runner(tools) as one, runner(tools) as other:
        await one.run([ToolCall("note", {"text": text}) for text in "abc"])
        [_, read] = await one.run([ToolCall("note", {"text": "d"}), ToolCall("read_notes", {})])
        assert read.text == "a,b,c,d"  # in the order of the calls, over both tools
        assert (await other.run([ToolCall("note", {"text": "x"})]))[0].text == "1"
        pids = [
            int((await r.run([ToolCall("process_id", {})]))[0].text) for r in (one, other)
        ]  # fmt: skip
        assert pids[0] != pids[1]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    await close_tools(tools)


async def test_a_rollout_is_lost_with_the_state_of_its_server() -> None:
    tools = build_raw(tools=["note", "read_notes", "die"], per_rollout=True)
    async with runner(tools) as one:
        assert (await one.run([ToolCall("note", {"text": "a"})]))[0].text == "1"
        with pytest.raises(InfrastructureError, match="its state is lost"):
            await one.run([ToolCall("die", {})])
        with pytest.raises(InfrastructureError, match="its state is lost"):
            await one.run([ToolCall("read_notes", {})])
    async with runner(tools) as other:
        assert (await other.run([ToolCall("note", {"text": "b"})]))[0].text == "1"
    await close_tools(tools)


async def test_the_last_tool_to_be_closed_ends_the_server() -> None:
    tools = build_raw(tools=["add", "process_id"])
    pid = int((await ask(tools, "process_id")).text)
    await close_tools(tools[:1])
    await close_tools(tools[:1])  # closing one twice counts once
    assert alive(pid)
    await close_tools(tools[1:])
    assert not alive(pid)
    with pytest.raises(InfrastructureError, match="is closed"):
        await ask(tools, "add", a=1)


def test_a_server_whose_tools_nobody_has_any_more_ends() -> None:
    tools = build_raw(tools=["process_id"])
    pid = int(asyncio.run(ask(tools, "process_id")).text)
    del tools
    gc.collect()
    assert gone(pid)


def test_a_server_that_does_not_heed_the_end_of_its_input_is_killed() -> None:
    tools = build_raw("deaf", tools=["process_id"])
    pid = int(asyncio.run(ask(tools, "process_id")).text)
    asyncio.run(close_tools(tools))
    assert not alive(pid)


ORPHAN = """
import asyncio, os, signal, sys
from retrain.tools import ToolRunner, resolve_tools
from retrain.types import ToolCall

tools = resolve_tools("mcp", {"command": sys.executable, "args": [sys.argv[1], "deaf"]})

async def main():
    async with ToolRunner(tools) as calls:
        print((await calls.run([ToolCall("process_id", {})]))[0].text, flush=True)

asyncio.run(main())
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exits", "killed"])
def test_no_server_outlives_this_process(how: str) -> None:
    if how == "killed" and sys.platform != "linux":
        pytest.skip("only the kernel could end it")
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, RAW, how],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == (0 if how == "exits" else -signal.SIGKILL)
    assert gone(int(done.stdout), within_s=2.0)


def test_junk_on_stdout_and_a_flood_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(build("junk", tools=["add"])) as tools:
        assert asyncio.run(said(tools, "add", a=1)) == ("ok", "2")
    assert capfd.readouterr() == ("", "")


def test_a_server_of_the_first_protocol_with_pages_and_references() -> None:
    with closing(build_raw()) as tools:
        assert [tool.name for tool in tools][-3:] == ["add", "add_2", "weird"]
        reference = {"$ref": "#/$defs/N"}
        properties = by_name(tools)["add"].parameters["properties"]
        assert properties == {"a": reference, "b": reference, "any": {}}
        assert asyncio.run(said(tools, "add_2", a="7", any=[1])) == ("ok", "8")
        status, text = asyncio.run(said(tools, "add", a="x"))
        assert (status, text) == ("model_error", "argument 'a': 'x' is not of type 'integer'")
        status, text = asyncio.run(said(tools, "weird"))
        assert (status, text[:36]) == ("tool_error", "the result is none of the protocol: ")


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        "import sys, time\n"
        "print('still thinking about it', file=sys.stderr, flush=True)\n"
        "time.sleep(3600)\n"
    )
    started = time.monotonic()
    with pytest.raises(UserError) as hung:
        resolve_tools(
            "mcp", {"command": sys.executable, "args": [str(hangs)], "start_timeout_s": 4}
        )
    assert 4 < time.monotonic() - started < 15
    assert hung.value.cause.endswith(f"{hangs}` gave no answer within 4 s")
    assert hung.value.next_step == "Its last words on stderr:\n  still thinking about it"
    with pytest.raises(UserError, match=r"` could not be connected to: (.|\n)*no licence"):
        resolve_tools("mcp", {"command": sys.executable, "args": ["-c", "exit('no licence')"]})
    with pytest.raises(UserError, match=r"`no-such-command` (.|\n)*No such file"):
        resolve_tools("mcp", {"command": "no-such-command"})


async def test_it_can_be_built_inside_an_event_loop() -> None:
    tools = build_raw(tools=["add"], prefix="calc_")
    try:
        assert await said(tools, "calc_add", a=1) == ("ok", "2")
    finally:
        await close_tools(tools)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "exactly one of command and url"),
        ({"command": "x", "url": "http://127.0.0.1:1/mcp"}, "exactly one of command and url"),
        ({"url": "http://127.0.0.1:1/mcp", "cwd": "/"}, "cwd does nothing with url"),
        ({"command": "x", "sse": True}, "sse does nothing with command"),
        ({"command": "x", "cwd": "/no/such"}, "there is no directory /no/such"),
        ({"command": "x", "restarts": -1}, "restarts -1"),
        ({"command": "x", "timeout": 3}, "no parameter 'timeout'\n  did you mean 'timeout_s'"),
        ({"url": "http://127.0.0.1:1/mcp", "headers_env": {"A": "NOT_SET_X"}}, "NOT_SET_X is not"),
        ({"command": "x", "env_from": {"A": "NOT_SET_X"}}, r"env_from\.A: .* NOT_SET_X is not set"),
        ({"command": "x", "env_from": ["A"]}, r"env_from is \['A'\]"),
        ({"command": "x", "env_from": {"A": 3}}, r"env_from\.A is 3"),
        (
            {"command": "x", "env_from": {"A": "PATH"}, "env": {"A": 1}},
            "env and env_from both set A",
        ),
        ({"url": "http://127.0.0.1:1/mcp", "env_from": {"A": "PATH"}}, "env_from does nothing"),
        ({"url": "http://u:pw@127.0.0.1:1/mcp"}, "mcp': http://127.0.0.1:1/mcp could not be conn"),
    ],
)
def test_params_that_do_not_fit_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_tools("mcp", params)


def test_a_tool_that_the_server_lacks_is_refused_and_the_server_ended() -> None:
    with pytest.raises(UserError, match="has no tool 'ad'\n  did you mean 'add'"):
        build_raw(tools=["ad"])


def test_the_environment_of_a_server_is_a_minimal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_RUN", "s")
    with closing(build(tools=["variable"], env={"GIVEN": 7}, cwd="/")) as tools:
        assert asyncio.run(said(tools, "variable", name="GIVEN")) == ("ok", "7")
        assert asyncio.run(said(tools, "variable", name="SECRET_OF_THE_RUN"))[1] == "(unset)"
        assert asyncio.run(said(tools, "variable", name="PATH"))[1] == os.environ["PATH"]


def test_a_key_for_a_server_stands_in_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", "sk-very-secret-4711")
    with closing(build(tools=["variable"], env_from={"ITS_KEY": "OUR_KEY"})) as tools:
        assert asyncio.run(said(tools, "variable", name="ITS_KEY")) == ("ok", "sk-very-secret-4711")
        assert asyncio.run(said(tools, "variable", name="OUR_KEY"))[1] == "(unset)"
        assert "4711" not in repr(tools[0]._shared.link)
    with pytest.raises(UserError, match="could not be connected to") as failure:
        resolve_tools("mcp", {"command": "no-such-server", "env_from": {"ITS_KEY": "OUR_KEY"}})
    assert "4711" not in str(failure.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(mode: str, port: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, SERVER, mode, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def test_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_THE_SERVER", "Bearer abc")
    port = free_port()
    params: dict[str, Any] = {
        "url": f"http://127.0.0.1:{port}/mcp",
        "headers_env": {"Authorization": "KEY_OF_THE_SERVER"},
        "tools": ["add", "hang", "header", "how_many_cancelled", "fail", "things"],
        "timeout_s": 2.0,
    }
    with served("http", port):
        tools = resolve_tools("mcp", params)

        async def use() -> None:
            assert await said(tools, "header", name="authorization") == ("ok", "Bearer abc")
            assert (await ask(tools, "hang")).status == "timeout"
            assert await said(tools, "how_many_cancelled") == ("ok", "1")
            assert (await ask(tools, "fail", reason="x")).status == "tool_error"
            assert await said(tools, "add", a=4) == ("ok", "5")

        asyncio.run(use())
    with pytest.raises(InfrastructureError, match=f"MCP server http://127.0.0.1:{port}/mcp"):
        asyncio.run(ask(tools, "add", a=4))
    with closing(tools), served("http", port):  # it is back
        assert asyncio.run(said(tools, "add", a=5)) == ("ok", "6")


def test_over_sse() -> None:
    port = free_port()
    with served("sse", port):
        url = f"http://127.0.0.1:{port}/sse"
        with closing(resolve_tools("mcp", {"url": url, "sse": True, "tools": ["add"]})) as tools:
            assert asyncio.run(said(tools, "add", a=4)) == ("ok", "5")


async def test_a_rollout_of_the_tool_environment() -> None:
    renderer = tag_renderer("chatml", *TAGS)
    tools = build(tools=["add", "fail"])
    environment = ToolEnvironment(tools, renderer, max_steps=4)
    turns = [
        '<code>{"name": "add", "arguments": {"a": 2, "b": 3}}</code>',
        '<code>{"name": "fail", "arguments": {"reason": "no"}}</code>',
        "The answer is 5.<|im_end|>",
    ]
    rollout, _ = await play(renderer, turns, environment=environment)
    await environment.close()
    results = [m.content for m in rollout.messages if m.type is MessageType.TOOL]
    assert results[0].strip() == "5"
    assert results[1].strip() == "Error executing tool fail: no"
    assert rollout.stop_reason == "answered"
    assert rollout.metrics["tool/add/ok"] == 1
    assert rollout.metrics["tool/fail/tool_error"] == 1


async def test_check_lists_the_tools_and_leaves_no_server(tmp_path: Path) -> None:
    """Inside an event loop, as an SFT stage reads them; the server writes its process id down."""
    (tmp_path / "server.py").write_text(
        textwrap.dedent(
            """
            import os
            from pathlib import Path
            from mcp.server.mcpserver import MCPServer

            server = MCPServer("s")
            Path("pid").write_text(str(os.getpid()))

            @server.tool()
            def triple(x: int) -> int:
                '''Three times a number.'''
                return 3 * x

            server.run()
            """
        )
    )
    config = rl_config(
        tmp_path,
        environment={
            "type": "smolagent",
            "tools": [
                {
                    "name": "mcp",
                    "params": {
                        "command": sys.executable,
                        "args": ["server.py"],
                        "cwd": str(tmp_path),
                    },
                }
            ],
        },
    )
    told = check(load_config(config))
    assert "tool triple(x): Three times a number." in told
    assert not alive(int((tmp_path / "pid").read_text()))
