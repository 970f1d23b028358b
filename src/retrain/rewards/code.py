"""Built-in reward: does the model's code pass tests, in a sandbox."""

from __future__ import annotations

import ast
import asyncio
import math
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.extract import Scope, judged_text, last_between_tags, last_fenced
from retrain.rewards.text import check_scope
from retrain.sandbox.base import Sandbox, SandboxUnavailable, Session
from retrain.types import Rollout

Test = str | Mapping[str, Any]

_sandboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Sandbox]] = (
    weakref.WeakKeyDictionary()
)


def _check(params: Mapping[str, Any]) -> None:
    check_scope(params)
    if params["tests"] is not None:
        _as_tests(params["tests"])


def _as_tests(tests: Any) -> list[Test]:
    listed = [tests] if isinstance(tests, str | Mapping) else tests
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError("tests is empty or not a list of statements and call/expected pairs")
    for test in listed:
        if isinstance(test, Mapping):
            if set(test) != {"call", "expected"}:
                raise ValueError(f"test {test!r} must have exactly the keys call and expected")
        elif not isinstance(test, str):
            raise ValueError(f"test {test!r} is neither a statement nor call and expected")
    return list(listed)


@reward(kind="rollout", range=(0.0, 1.0), check=_check)
async def code_passes_tests(
    rollout: Rollout,
    *,
    tests: Sequence[Test] | None = None,
    tag: str | None = None,
    partial: bool = False,
    sandbox: str = "auto",
    scope: Scope = "last",
) -> float:
    """1 when the model's code passes every test, else 0; with `partial` the share it passes.

    Range [0, 1]. The code is the last fenced block, or with `tag` what the last `<tag>` holds. It
    runs in a fresh session, then the tests in the same one. A test is `{call: "add(2, 3)",
    expected: 5}`, whose printed value is compared outside of the sandbox (Python literals), or a
    statement such as `assert add(2, 3) == 5`, which passes when it ends without an error: the
    code under test can cheat there, so prefer pairs. Without `tests`, those of
    `task.metadata["tests"]`.

    0 when there is no code or it fails by itself. Raises ValueError when there are no tests, and
    SandboxUnavailable (the rollout is masked) when the sandbox fails twice.

    Example: `code_passes_tests: {params: {tests: [{call: "add(2, 3)", expected: 5}]}}`
    """
    todo = _as_tests(_task_tests(rollout) if tests is None else tests)
    text = judged_text(rollout, scope)
    code = last_fenced(text) if tag is None else last_between_tags(text, tag)
    if code is None or not code.strip():
        return 0.0
    box = _sandbox(sandbox)
    try:
        passed = await _count_passed(box, code, todo)
    except SandboxUnavailable:
        passed = await _count_passed(box, code, todo)
    return passed / len(todo) if partial else float(passed == len(todo))


def _task_tests(rollout: Rollout) -> Any:
    return None if rollout.task is None else rollout.task.metadata.get("tests")


def _sandbox(kind: str) -> Sandbox:
    """One sandbox of a kind per event loop: its sessions may be bound to the loop."""
    from retrain.sandbox import make_sandbox

    made = _sandboxes.setdefault(asyncio.get_running_loop(), {})
    if kind not in made:
        made[kind] = make_sandbox(kind)
    return made[kind]


async def _count_passed(sandbox: Sandbox, code: str, tests: list[Test]) -> int:
    session = await sandbox.session()
    try:
        if (await session.run(code)).status != "ok":
            return 0
        passed = 0
        for test in tests:
            passed += await _passes(session, test)
        return passed
    finally:
        await session.close()


async def _passes(session: Session, test: Test) -> bool:
    """One test. The code cannot know the nonce beforehand, so it cannot print an old answer."""
    nonce = secrets.token_hex(16)
    statement = test if isinstance(test, str) else f"_value = repr({test['call']})"
    shown = f"print('{nonce}')" if isinstance(test, str) else f"print('{nonce}' + _value)"
    result = await session.run(f"{statement}\n{shown}")
    lines = [line for line in result.stdout.splitlines() if line.startswith(nonce)]
    if result.status != "ok" or not lines:
        return False
    if isinstance(test, str):
        return True
    return _same_value(lines[-1].removeprefix(nonce), test["expected"])


def _same_value(printed: str, expected: Any) -> bool:
    try:
        return _same(ast.literal_eval(printed), expected)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _same(value: Any, expected: Any) -> bool:
    """Equality with floats to 1e-9, tuples as lists (YAML has none), and bool apart from int."""
    if isinstance(expected, list | tuple):
        same_length = isinstance(value, list | tuple) and len(value) == len(expected)
        return same_length and all(map(_same, value, expected))
    if isinstance(expected, dict):
        same_keys = isinstance(value, dict) and value.keys() == expected.keys()
        return same_keys and all(_same(value[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected or (
            isinstance(value + expected, float)
            and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
        )
    return bool(value == expected)
