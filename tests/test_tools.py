"""Tools, from functions and classes to one rollout's calls."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from retrain.importing import import_object
from retrain.sandbox import MontySandbox
from retrain.tools import (
    PythonTool,
    ToolError,
    ToolOutput,
    ToolResult,
    ToolRunner,
    as_tool,
    resolve_tools,
    tool,
)
from retrain.tools.python import last_line
from retrain.types import InfrastructureError, ToolCall, UserError


@tool
def search(query: str, kind: Literal["web", "news"] = "web", limit: int = 3) -> list[str]:
    """Search for pages.

    Newest first.

    Args:
        query: what to look for
        kind: where to look
        limit: most results
    """
    return [f"{kind}:{query}"] * limit


class Counter:
    """Counts."""

    name = "count"

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def __call__(self, by: int) -> int:
        """Add to a counter.

        Args:
            by: how much
        """
        self.value += by
        return self.value


async def run(tools: list[Any], *calls: ToolCall, **options: Any) -> list[ToolResult]:
    async with ToolRunner(tools, **options) as runner:
        results = await runner.run(calls)
        assert sum(runner.counts.values()) == len(calls)
        return results


async def run_one(tool_like: Any, arguments: Mapping[str, Any], **options: Any) -> tuple[str, str]:
    name = as_tool(tool_like).name
    (result,) = await run([tool_like], ToolCall(name, arguments), **options)
    return result.status, result.text


class Billed:
    """A tool that says what a call cost."""

    async def __call__(self, text: str) -> ToolOutput:
        """Say it back.

        Args:
            text: what to say.
        """
        return ToolOutput(text.upper(), {"billed/cost": 0.25})


async def test_figures_come_with_a_result_and_budgets_count_calls_in_order():
    runner = ToolRunner([Billed, Counter], max_calls=3, max_calls_of={"Billed": 2})
    calls = [ToolCall("Billed", {"text": text}) for text in "abc"]
    results = await runner.run([*calls, ToolCall("nothing", {}), ToolCall("count", {"by": 4})])
    assert [(r.text, r.status) for r in results[:2]] == [("A", "ok"), ("B", "ok")]
    assert [r.metrics for r in results[:3]] == [{"billed/cost": 0.25}] * 2 + [{}]
    assert results[2].text == "No calls of Billed are left: there were 2."
    assert results[2].status == "model_error"
    assert results[4].text == "4", "a call that was not made leaves its place to others"
    (last,) = await runner.run([ToolCall("count", {"by": 3})])
    assert last.text == "No tool calls are left: there were 3 in all."
    await runner.aclose()


def test_schema_comes_from_signature_and_docstring() -> None:
    assert search.name == "search"
    assert search.description == "Search for pages.\n\nNewest first."
    assert search.parameters == {
        "additionalProperties": False,
        "properties": {
            "query": {"description": "what to look for", "type": "string"},
            "kind": {
                "default": "web",
                "description": "where to look",
                "enum": ["web", "news"],
                "type": "string",
            },
            "limit": {"default": 3, "description": "most results", "type": "integer"},
        },
        "required": ["query"],
        "type": "object",
    }


def test_a_decorated_function_is_called_as_before() -> None:
    assert search("a", limit=2) == ["web:a", "web:a"]
    assert search.__doc__ is not None and inspect.signature(search).parameters["limit"].default == 3

    @tool(name="other-name", timeout_s=2.0)
    async def function(a: int) -> int:
        return a

    assert (function.name, function.timeout_s, asyncio.run(function(4))) == ("other-name", 2.0, 4)


def test_parameters_named_like_pydantic_attributes_work() -> None:
    def save(_id: int, json: str, model_config: int, copy: bool = True, /) -> list[Any]:
        return [_id, json, model_config, copy]

    arguments = {"_id": "1", "json": "j", "model_config": 2}
    assert asyncio.run(run_one(save, arguments)) == ("ok", '[1, "j", 2, true]')


def test_signatures_that_cannot_be_described_are_refused() -> None:
    def untyped(a: int, b) -> int:  # type: ignore[no-untyped-def]
        return a

    def stars(*values: int) -> int:
        return 0

    def keywords(**values: int) -> int:
        return 0

    def strange(a: asyncio.Lock) -> int:
        return 0

    for function, message in (
        (untyped, "tool 'untyped': parameter 'b' has no type"),
        (stars, r"tool 'stars': parameter '\*values'"),
        (keywords, r"tool 'keywords': parameter '\*\*values'"),
        (strange, "tool 'strange': a parameter's type has no JSON schema"),
        (lambda: 1, "'<lambda>' cannot be a tool's name"),
        (3, "3 is not a tool"),
        (Path, "class Path is not a tool"),
    ):
        with pytest.raises(UserError, match=message):
            as_tool(function)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "argument 'query' is missing"),
        ({"query": "a", "limit": "x"}, "argument 'limit': Input should be a valid integer"),
        ({"query": "a", "kind": "tv"}, "argument 'kind': Input should be 'web' or 'news'"),
        ({"query": "a", "n": 1}, "unknown argument 'n' (arguments: query, kind, limit)"),
        ({"query": ["x" * 500]}, "..."),
    ],
)
async def test_bad_arguments_are_the_models_fault(arguments: dict[str, Any], text: str) -> None:
    status, shown = await run_one(search, arguments)
    assert status == "model_error" and text in shown and len(shown) < 200


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("🙂 text", "🙂 text"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        (None, "null"),
        (Path("a"), '"a"'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("lone \ud83d", "lone ?"),
        (b"caf\xc3\xa9 \xff", "caf\u00e9 \ufffd"),
    ],
)
async def test_results_are_shown_as_text_or_json(value: Any, shown: str) -> None:
    def give() -> Any:
        return value

    assert await run_one(give, {}) == ("ok", shown)


async def test_calls_run_together_and_keep_their_order() -> None:
    @tool
    async def slow(i: int) -> int:
        await asyncio.sleep(0.2)
        return i

    @tool
    def blocking(i: int) -> int:
        time.sleep(0.2)
        return i

    calls = [ToolCall(name, {"i": i}) for i in range(10) for name in ("slow", "blocking")]
    start = time.perf_counter()
    results = await run([slow, blocking], *calls)
    assert time.perf_counter() - start < 1.0  # one after the other: 4 s
    assert [r.text for r in results] == [str(i) for i in range(10) for _ in range(2)]
    assert [r.call for r in results] == calls


async def test_time_outs_end_the_wait_for_any_tool() -> None:
    async def sleeps() -> None:
        await asyncio.sleep(30)

    async def stubborn() -> None:
        for _ in range(10):
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                continue

    @tool(timeout_s=0.1)
    def hangs() -> None:
        time.sleep(5)

    async def own_timeout() -> None:
        raise TimeoutError("upstream")

    start = time.perf_counter()
    tools = [sleeps, stubborn, hangs, own_timeout]
    names = ("sleeps", "stubborn", "hangs", "own_timeout")
    results = await run(tools, *(ToolCall(n, {}) for n in names), timeout_s=0.2)
    assert time.perf_counter() - start < 1.0
    assert [r.status for r in results] == ["timeout"] * 3 + ["tool_error"]
    assert results[0].text == "sleeps gave no result within 0.2 s."
    assert results[2].text == "hangs gave no result within 0.1 s."


def test_a_hung_tool_does_not_hold_the_interpreter() -> None:
    script = (
        "import asyncio, time\nfrom retrain.tools import ToolRunner\n"
        "from retrain.types import ToolCall\n"
        "def hang() -> None: time.sleep(60)\n"
        "r = ToolRunner([hang], timeout_s=0.1)\n"
        "print(asyncio.run(r.run([ToolCall('hang', {})] * 50))[49].status)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "timeout\n"), done.stderr


async def test_faults_are_typed() -> None:
    def fails(how: str) -> None:
        kinds = {"value": ValueError("bad 🙂"), "tool": ToolError("no page"), "exit": SystemExit(3)}
        raise {**kinds, "stop": StopIteration("s")}[how]

    async def cancels() -> None:
        raise asyncio.CancelledError

    calls = [ToolCall("fails", {"how": how}) for how in ("value", "tool", "exit", "stop")]
    broken = ToolCall("fails", {}, error="the call is not JSON")
    async with ToolRunner([fails, cancels]) as runner:
        results = await runner.run([*calls, ToolCall("cancels", {}), ToolCall("fial", {}), broken])
    assert [(r.status, r.text) for r in results] == [
        ("tool_error", "ValueError: bad 🙂"),
        ("tool_error", "no page"),
        ("tool_error", "SystemExit: 3"),
        ("tool_error", "RuntimeError: StopIteration: s"),
        ("tool_error", "CancelledError: the tool cancelled itself"),
        ("model_error", "There is no tool 'fial'. Tools: fails, cancels."),
        ("model_error", "the call is not JSON"),
    ]
    assert runner.counts == {"tool_error": 5, "model_error": 2}


async def test_infrastructure_errors_are_retried_then_raised() -> None:
    attempts = {"flaky": 0, "down": 0}

    async def flaky() -> str:
        attempts["flaky"] += 1
        if attempts["flaky"] < 3:
            raise InfrastructureError("503")
        return "up"

    async def down() -> str:
        attempts["down"] += 1
        raise InfrastructureError("gone")

    assert await run_one(flaky, {}, backoff_s=0.001) == ("ok", "up")
    with pytest.raises(InfrastructureError, match="gone"):
        await run_one(down, {}, backoff_s=0.001, retries=1)
    assert attempts == {"flaky": 3, "down": 2}


async def test_output_is_cut_in_the_middle() -> None:
    def long() -> str:
        return "a" * 50 + "b" * 50

    _, text = await run_one(long, {}, max_output_chars=10)
    assert text == "aaaaa\n... [90 characters left out] ...\nbbbbb"


async def test_a_class_has_state_per_session_and_an_instance_shares_it() -> None:
    described = as_tool(Counter)
    assert (described.name, described.description) == ("count", "Add to a counter.")
    calls = [ToolCall("count", {"by": 2}), ToolCall("count", {"by": 3})]
    for _ in range(2):
        assert [r.text for r in await run([as_tool(Counter, {"start": 10})], *calls)] == [
            "12",
            "15",
        ]
    shared = Counter()
    await run([shared], *calls)
    await run([shared], *calls)
    assert shared.value == 10
    with pytest.raises(UserError, match="unexpected keyword argument 'begin'"):
        as_tool(Counter, {"begin": 1})
    with pytest.raises(UserError, match="takes no parameters"):
        as_tool(search, {"begin": 1})


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two tools are named 'search'"):
        ToolRunner([search, search])


async def test_python_tool_is_a_prompt_with_state() -> None:
    sandbox = MontySandbox(timeout_s=0.5, memory_mb=64)
    codes = ["x = 41", "x + 1", "print('p')\n1/0", "x", "while True: pass", "x", "'🙂'"]
    async with ToolRunner([PythonTool(sandbox)]) as runner:
        results = await runner.run([ToolCall("python", {"code": code}) for code in codes])
    shown = [(r.status, r.text) for r in results]
    assert shown[0] == ("ok", "(no output; use print or end with an expression)")
    assert shown[1] == ("ok", "42")
    assert shown[2] == ("model_error", "p\nZeroDivisionError: division by zero")
    assert shown[3] == ("ok", "41")
    assert shown[4][0] == "model_error" and "longer than 0.5 s" in shown[4][1]
    assert shown[4][1].endswith("Variables of earlier calls are lost.")
    assert shown[5] == ("model_error", "NameError: name 'x' is not defined")
    assert shown[6] == ("ok", "'🙂'")
    afresh = MontySandbox(stateful=False)
    whole = PythonTool(afresh, full_traceback=True)
    assert whole.description.endswith("Every call starts afresh.")
    calls = [ToolCall("python", {"code": code}) for code in ("y = 1", "y")]
    assert "Traceback" in (await run([whole], *calls))[1].text
    assert (await run([whole], ToolCall("python", {})))[0].text == "argument 'code' is missing"
    await sandbox.close()
    await afresh.close()


def test_the_last_line_of_a_traceback() -> None:
    header = "Traceback (most recent call last):\n"
    frames = '  File "main.py", line 1, in <module>\n    f()\n'
    assert last_line(f"{header}{frames}ValueError: a\nb") == "ValueError: a"
    assert last_line(f"{header}{frames}A: 1\n\nlater\n\n{header}{frames}B: 2") == "B: 2"
    assert last_line("TimeoutError: late") == "TimeoutError: late"


def test_tools_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def double(a: int) -> int:\n    'Twice.'\n    return 2 * a\n")
    assert resolve_tools("python")[0].name == "python"
    assert resolve_tools("python", {"name": "run"})[0].name == "run"
    assert resolve_tools(f"{file}:double")[0].description == "Twice."
    assert import_object(f"{file}:double", "tool") is import_object(f"{file}:double", "tool")
    assert import_object("os:path.join", "tool").__name__ == "join"  # type: ignore[attr-defined]
    (tmp_path / "broken.py").write_text("1/0")
    for path, message in (
        ("pyhton", "no built-in tool 'pyhton'\n.*did you mean 'python'"),
        (f"{file}:doubel", "does not define 'doubel'\n.*did you mean 'double'.*it defines: double"),
        (f"{tmp_path}/none.py:a", "there is no file"),
        (f"{tmp_path}/broken.py:a", "raised ZeroDivisionError: division by zero"),
        ("no_such_module:a", "there is no module 'no_such_module'"),
        (":a", "not an import path"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_tools(path)
    with pytest.raises(UserError, match="no parameter 'timeout'"):
        resolve_tools("python", {"timeout": 3})


def test_importing_tools_is_light() -> None:
    script = (
        "import sys, retrain.tools\n"
        "print([m for m in ('torch', 'transformers', 'pydantic_monty') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
