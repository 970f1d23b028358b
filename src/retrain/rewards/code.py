"""Built-in reward: does the model's code pass tests, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.code_module import as_module
from retrain.rewards.code_tests import CodeTest, Script, parse_test, run_once
from retrain.rewards.extract import Scope, judged_text, last_between_tags, last_fenced
from retrain.rewards.text import check_scope
from retrain.sandbox.base import Sandbox
from retrain.types import Rollout, UserError

Test = str | Mapping[str, Any]


def _check(params: Mapping[str, Any]) -> None:
    check_scope(params)
    if params["tests"] is not None:
        _refuse_scripts(_parse_tests(params["tests"]), params["sandbox"])


def _parse_tests(tests: Any) -> list[CodeTest]:
    listed = [tests] if isinstance(tests, str | Mapping) else tests
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(
            "tests is empty or not a list of statements, call/expected and stdin/stdout pairs"
        )
    return [parse_test(test) for test in listed]


def _refuse_scripts(tests: Sequence[CodeTest], sandbox: Sandbox) -> None:
    if any(isinstance(test, Script) for test in tests) and not sandbox.capabilities.full_python:
        raise UserError(
            "tests with stdin and stdout need the whole of Python, which this sandbox lacks",
            "set sandbox: {type: jail} (Linux), or test by call and expected",
        )


@reward(kind="rollout", range=(0.0, 1.0), check=_check)
async def code_passes_tests(
    rollout: Rollout,
    *,
    sandbox: Sandbox,
    tests: Sequence[Test] | None = None,
    tag: str | None = None,
    partial: bool = False,
    scope: Scope = "last",
) -> float:
    """1 when the model's code passes every test, else 0; with `partial` the share it passes.

    Range [0, 1]. The code is the last fenced block, or with `tag` what the last `<tag>` holds. It
    runs in sessions of the run's sandbox (section `sandbox`), and answers are compared outside of
    them, as Python literals: nothing that the code redefines or prints can pass a test which its
    return values do not pass. Without `tests`, those of `task.metadata["tests"]`. A test is

    - `{call: "add(2, 3)", expected: 5}`: the value of an expression that may use the code's names.
      Let it return the answer rather than compare: any code can guess `True`.
    - `{stdin: "3 4\\n", stdout: "7\\n"}`: the code as a program, where the sandbox has the whole of
      Python. `sys.exit` is a fine end, an exception is not. Standard error is ignored.
    - a statement such as `assert add(2, 3) == 5`, with at most 100 calls of the code's functions.
      It passes when it ends without an error. The code never enters its session: calls carry
      copies of their arguments and results, so a function that changes its argument, a class or a
      lambda is to be tested by a `call`. Built-in exceptions keep their type.

    Every test starts from the code anew and shares no variables with others; the sandbox's time
    limit covers the code and a test's calls together. NumPy values count as plain numbers and
    lists. A value that is no literal, longer than 50,000 characters (or than
    `sandbox.max_output_chars`) or nested deeper than 100 fails the test, and so does code that
    ends, hangs or crashes.

    0 when there is no code or it fails by itself. Raises ValueError when there are no tests, or a
    statement fails before it calls the code, UserError when the sandbox cannot run them, and
    SandboxUnavailable (the rollout is masked) when the sandbox fails twice.

    Example: `code_passes_tests: {params: {tests: [{call: "add(2, 3)", expected: 5}]}}`
    """
    todo = _parse_tests(_task_tests(rollout) if tests is None else tests)
    _refuse_scripts(todo, sandbox)
    text = judged_text(rollout, scope)
    code = last_fenced(text) if tag is None else last_between_tags(text, tag)
    if code is None or not code.strip():
        return 0.0
    runnable = await _runnable(todo, sandbox, code)
    if partial:
        return sum([await test.passes(sandbox, code) for test in runnable]) / len(todo)
    if len(runnable) < len(todo):
        return 0.0
    for test in runnable:
        if not await test.passes(sandbox, code):
            return 0.0
    return 1.0


def _task_tests(rollout: Rollout) -> Any:
    return None if rollout.task is None else rollout.task.metadata.get("tests")


async def _runnable(tests: Sequence[CodeTest], sandbox: Sandbox, code: str) -> Sequence[CodeTest]:
    """The tests, without those that call into the code when it fails by itself."""
    scripts = [test for test in tests if isinstance(test, Script)]
    if len(scripts) == len(tests):
        return tests
    if (await run_once(sandbox, as_module(code, sandbox))).status == "ok":
        return tests
    return scripts
