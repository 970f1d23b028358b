"""`code_passes_tests`: every kind of test, code that cheats, and the run's sandbox."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from retrain.config.rewards import RewardSetup
from retrain.loops.build import build_calculator
from retrain.rewards import REWARDS, RewardSpec, resolve_reward, takes_sandbox
from retrain.sandbox import MontySandbox, Result, Sandbox, SandboxUnavailable, make_sandbox
from retrain.types import Message, MessageType, Rollout, Task, UserError
from sandboxes import need_jail

code_passes_tests = REWARDS["code_passes_tests"]

ADD = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"
PAIRS = [{"call": "add(2, 3)", "expected": 5}, {"call": "add(2, 0)", "expected": 2}]
STATEMENT = "assert add(2, 3) == 5"


@pytest.fixture
async def monty() -> AsyncIterator[Sandbox]:
    sandbox = MontySandbox(timeout_s=0.5, max_output_chars=2000)
    yield sandbox
    await sandbox.close()


@pytest.fixture
async def jail() -> AsyncIterator[Sandbox]:
    need_jail()
    sandbox = make_sandbox("jail", timeout_s=1.0)
    yield sandbox
    await sandbox.close()


def saying(text: str, **metadata: Any) -> Rollout:
    rollout = Rollout(task=Task("t", (), metadata=metadata))
    rollout.add_messages(Message(text, MessageType.MODEL))
    return rollout


async def grade(sandbox: Sandbox, code: str, *tests: Any, **params: Any) -> float:
    rollout = saying(f"So:\n```python\n{code}\n```\nDone.")
    score = await code_passes_tests(rollout, tests=list(tests), sandbox=sandbox, **params)
    assert isinstance(score, float)
    return score


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        (f"```python\n{ADD}\n```", {"tests": PAIRS}, 1),
        (f"```python\n{WRONG}\n```", {"tests": PAIRS}, 0),
        (f"```python\n{WRONG}\n```", {"tests": PAIRS, "partial": True}, 0.5),
        (f"```\n{WRONG}\n```", {"tests": [STATEMENT, *PAIRS], "partial": True}, 1 / 3),
        (f"<code>{ADD}</code>", {"tests": PAIRS, "tag": "code"}, 1),
        ("no code", {"tests": PAIRS}, 0),
        ("```\n\n```", {"tests": PAIRS}, 0),
        (f"```\n{ADD}\n1 / 0\n```", {"tests": [STATEMENT, *PAIRS], "partial": True}, 0),
        (f"```\n{ADD}\ndef\n```", {"tests": PAIRS, "partial": True}, 0),
    ],
)
async def test_what_is_graded(
    monty: Sandbox, text: str, params: dict[str, Any], expected: float
) -> None:
    assert await code_passes_tests(saying(text), sandbox=monty, **params) == expected


async def test_tests_of_the_task(monty: Sandbox) -> None:
    text = f"```\n{ADD}\n```"
    assert await code_passes_tests(saying(text, tests=PAIRS), sandbox=monty) == 1.0
    assert await code_passes_tests(saying(text, tests=STATEMENT), sandbox=monty) == 1.0
    with pytest.raises(ValueError, match="tests is empty"):
        await code_passes_tests(saying(text), sandbox=monty)


@pytest.mark.parametrize(
    ("returned", "expected", "passes"),
    [
        ("[1 + 1, True, 0.1 + 0.2]", [2, True, 0.3], True),
        ("(1, 2)", [1, 2], True),
        ("[1, 2]", (1, 2), True),
        ("[1, 2]", [2, 1], False),
        ("[1, 2]", [1, 2, 3], False),
        ("True", 1, False),
        ("1", True, False),
        ("{1: 'a'}", {True: "a"}, False),
        ("{'a': [1.0]}", {"a": [1]}, True),
        ("{'a': 1}", {"a": 1, "b": 2}, False),
        ("1.0 + 1e-12", 1, True),
        ("1.0 + 1e-6", 1, False),
        ("1e400", float("inf"), True),
        ("-1e400", float("inf"), False),
        ("1e400 - 1e400", float("nan"), True),
        ("10**400", 1.5, False),
        ("10**30 + 1", 10**30, False),
        ("{3, 1, 2}", {1, 2, 3}, True),
        ("set()", set(), True),
        ("None", None, True),
        ("3 + 4j", 3 + 4j, True),
        ("'a\\nb\\'\"\\\\ é\\u2028'", "a\nb'\"\\ é\u2028", True),
        ("b'\\x00a'", b"\x00a", True),
        ("'5'", 5, False),
        ("[]", [], True),
        ("((1,), {'k': ()})", [[1], {"k": []}], True),
        ("print", None, False),
        ("1 / 0", 0, False),
        ("nothing", 0, False),
    ],
)
async def test_pairs_compare_literals(
    monty: Sandbox, returned: str, expected: Any, passes: bool
) -> None:
    code = f"def f():\n    return {returned}"
    assert await grade(monty, code, {"call": "f()", "expected": expected}) == passes


STATEMENTS = [
    (ADD, "assert add(2, 3) == 5", 1),
    (WRONG, "assert add(2, 3) == 5", 0),
    (ADD, "import math\nx = add(1, b=2)\nassert math.sqrt(add(x, 1)) == 2.0", 1),
    (ADD, "for n in range(5):\n    assert add(n, n) == 2 * n", 1),
    (ADD, "assert sorted(add(x, 1) for x in [2, 1]) == [2, 3]", 1),
    (ADD, "from functools import reduce\nassert reduce(add, [1, 2, 3]) == 6", 1),
    (ADD, "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)", 1),
    ("def twice(f, x):\n    return f(f(x))\ndef inc(x):\n    return x + 1", "assert twice(inc, 1) == 3", 1),  # noqa: E501
    ("SIZE = [1, 2.5]", "assert SIZE == [1, 2.5]", 1),
    ("SIZE = 3", "assert SIZE == 4", 0),
    (ADD, "assert add(*[1], **{'b': 2}) == 3\nassert add('a', 'b') == 'ab'", 1),
    ("def same(x):\n    return x", "for x in [(1,), {2, 1}, {'a': (1, [2])}, 1e999, None, b'a', set()]:\n    assert same(x) == x", 1),  # noqa: E501
    ("def f(x):\n    raise ValueError('too small')", "try:\n    f(1)\n    ok = False\nexcept ValueError as e:\n    ok = str(e) == 'too small'\nassert ok", 1),  # noqa: E501
    ("def f(x):\n    return {}['k']", "try:\n    f(1)\n    ok = False\nexcept KeyError as e:\n    ok = str(e) == \"'k'\"\nassert ok", 1),  # noqa: E501
    ("def f(x):\n    return x", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False", 0),  # noqa: E501
    ("def f(x):\n    return 1 / 0", "f(1)", 0),
    ("def f(x):\n    return x", "try:\n    y = f(1)\nexcept:\n    y = 0\nassert y == 1", 1),
    ("def f(x):\n    return x", "assert f(2) == 2\nexit(0)", 0),
    ("def g(x):\n    return x", "assert f(2) == 2", 0),
    ("seen = []\ndef push(x):\n    seen.append(x)\ndef size():\n    return len(seen)", "push(1)\npush(1)\nassert size() == 2\nassert size() == 2", 1),  # noqa: E501
    ("seen = []\ndef count():\n    seen.append(1)\n    return len(seen)", "assert [count(), count(), count()] == [1, 2, 3]", 1),  # noqa: E501
    ("def f(x):\n    return lambda: x", "f(3)", 0),
    ("def f(x):\n    return 1", "n = 0\nwhile f(n):\n    n += 1", 0),
]  # fmt: skip


@pytest.mark.parametrize(("code", "test", "expected"), STATEMENTS)
async def test_statements_call_the_code_through_stubs(
    monty: Sandbox, code: str, test: str, expected: float
) -> None:
    assert await grade(monty, code, test) == expected


async def test_tests_share_no_state(monty: Sandbox) -> None:
    code = "seen = []\ndef count():\n    seen.append(1)\n    return len(seen)"
    tests = [{"call": "count()", "expected": 1}, "assert count() == 1"]
    assert await grade(monty, code, *tests, *tests) == 1.0


async def test_a_statement_may_make_a_hundred_calls(monty: Sandbox) -> None:
    test = "for n in range({}):\n    assert add(n, 1) == n + 1"
    assert await grade(monty, ADD, test.format(100)) == 1.0
    assert await grade(monty, ADD, test.format(101)) == 0.0


CHEATS = {
    "assertion": "AssertionError = ValueError\ndef add(a, b):\n    return 0",
    "equal to all": (
        "class Any:\n    def __eq__(self, other):\n        return True\n"
        "    def __repr__(self):\n        return 'Any()'\n"
        "def add(a, b):\n    return Any()"
    ),
    "built-ins": "print = repr = str = lambda *a: '5'\ndef add(a, b):\n    return 0",
    "abs": "def abs(x):\n    return 0\nisinstance = abs\ndef add(a, b):\n    return 0",
    "exit": "raise SystemExit",
    "exit in the call": "def add(a, b):\n    raise SystemExit",
    "lies": "def add(a, b):\n    print('5')\n    print('done')\n    return 0",
    "raises": "def add(a, b):\n    raise AssertionError('5')",
    "swallows the rest": f'{WRONG}\nx = """',
    "comment": f"{WRONG}\n\\",
    "hang": "def add(a, b):\n    while True:\n        pass",
    "huge text": "def add(a, b):\n    return 'x' * 10**6",
    "deep": "x = []\nfor _ in range(500):\n    x = [x]\ndef add(a, b):\n    return x",
    "doubling": "x = []\nfor _ in range(60):\n    x = [x, x]\ndef add(a, b):\n    return x",
    "endless output": "def add(a, b):\n    while True:\n        print('5' * 1000)",
    "itself": "x = []\nx.append(x)\ndef add(a, b):\n    return x",
}
HARD_TESTS = [
    "assert add(2, 3) == 5",
    "assert abs(add(2, 3) - 5) < 1e-6",
    "result = add(2, 3)\nassert isinstance(result, int) and str(result) == '5'",
    {"call": "add(2, 3)", "expected": 5},
]


@pytest.mark.parametrize("cheat", CHEATS)
async def test_cheats_fail(monty: Sandbox, cheat: str) -> None:
    started = time.monotonic()
    assert await grade(monty, CHEATS[cheat], *HARD_TESTS, partial=True) == 0.0
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "prelude",
    [
        "print = repr = isinstance = type = list = tuple = hasattr = getattr = float = None",
        "from __future__ import annotations\nlist = [1]\nset = {1}",
        "def sorted(x):\n    return x",
        "print('x' * 5000)",
        "Exception = 3",
    ],
)
async def test_right_code_may_redefine_built_ins(monty: Sandbox, prelude: str) -> None:
    assert await grade(monty, f"{prelude}\n{ADD}", *HARD_TESTS) == 1.0


async def test_arguments_and_results_are_copies(monty: Sandbox) -> None:
    code = "def f(xs):\n    xs.append(9)\n    return xs"
    assert await grade(monty, code, "xs = [1]\nassert f(xs) == [1, 9]\nassert xs == [1]") == 1.0
    assert await grade(monty, code, "xs = [1]\nassert f(xs) == xs") == 0.0
    changed = {"call": "(lambda xs: (f(xs), xs)[1])([1])", "expected": [1, 9]}
    assert await grade(monty, code, changed) == 1.0


async def test_one_endless_loop_fails_one_test(monty: Sandbox) -> None:
    code = "def f(n):\n    while n == 2:\n        pass\n    return n"
    tests: list[Any] = [{"call": f"f({n})", "expected": n} for n in (1, 2, 3)]
    assert await grade(monty, code, *tests, partial=True) == pytest.approx(2 / 3)
    statements = [f"assert f({n}) == {n}" for n in (1, 2, 3)]
    assert await grade(monty, code, *statements, partial=True) == pytest.approx(2 / 3)
    started = time.monotonic()
    assert await grade(monty, "while True:\n    pass", *tests, *statements, partial=True) == 0.0
    assert time.monotonic() - started < 4, "code that hangs by itself is run once"


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "tests is empty"),
        ([{"call": "f()"}], "exactly the keys"),
        ([5], "exactly the keys"),
        ([{"call": "f(", "expected": 5}], "is not Python"),
        ([{"call": "x = 5", "expected": 5}], "is not Python"),
        ([{"call": "f()", "expected": object()}], "cannot be compared"),
        ([{"call": "f()", "expected": "x" * 60_000}], "more than 50000"),
        (["assert f(2 == 3"], "is not Python"),
        (["assert sum([1, 2]) == 3"], "takes nothing from the code"),
        (["x = 5", "assert f(x) == 5"], "takes nothing from the code"),
        ([{"stdin": 3, "stdout": "3"}], "must be text"),
    ],
)
def test_tests_that_cannot_work_are_refused_early(tests: list[Any], message: str) -> None:
    function = resolve_reward("code_passes_tests", "rollout")
    params = {"tests": tests, "sandbox": MontySandbox()}
    with pytest.raises(UserError, match=message) as caught:
        RewardSpec("mine", function, "rollout", params=params)
    assert "mine" in str(caught.value)


async def test_a_statement_that_fails_by_itself_stops(monty: Sandbox) -> None:
    for test in ("assert 1 == 2\nf(1)", "f(1 / 0)", "def g():\n    yield f(1)"):
        with pytest.raises(ValueError, match="before it calls the code"):
            await grade(monty, "def f(x):\n    return x", test)


async def test_expected_answers_must_fit_the_sandbox(monty: Sandbox) -> None:
    code = "def f(n):\n    return 'x' * n"
    assert await grade(monty, code, {"call": "f(1500)", "expected": "x" * 1500}) == 1.0
    with pytest.raises(ValueError, match=r"raise sandbox\.max_output_chars"):
        await grade(monty, code, {"call": "f(5000)", "expected": "x" * 5000})


class Flaky:
    """A sandbox whose first sessions cannot be opened."""

    def __init__(self, inner: Sandbox, failures: int) -> None:
        self.inner, self.failures = inner, failures
        self.stateful = False

    @property
    def capabilities(self) -> Any:
        return self.inner.capabilities

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def session(self) -> Any:
        self.failures -= 1
        if self.failures >= 0:
            raise SandboxUnavailable("no room")
        return await self.inner.session()


async def test_a_sandbox_that_fails_is_asked_twice(monty: Sandbox) -> None:
    assert await grade(Flaky(monty, 1), ADD, *PAIRS) == 1.0
    with pytest.raises(SandboxUnavailable, match="no room"):
        await grade(Flaky(monty, 2), ADD, *PAIRS)


async def test_one_session_at_a_time_is_enough() -> None:
    sandbox = MontySandbox(max_concurrency=1)
    assert await grade(sandbox, ADD, STATEMENT, *PAIRS) == 1.0
    await sandbox.close()


class Seen:
    """A sandbox that notes what it is given."""

    def __init__(self, inner: Sandbox) -> None:
        self.inner, self.stateful = inner, True
        self.capabilities = inner.capabilities
        self.programs: list[str] = []

    async def session(self) -> Any:
        seen, session = self.programs, await self.inner.session()

        class Noting:
            async def run(self, code: str) -> Result:
                seen.append(code)
                return await session.run(code)

            async def close(self) -> None:
                await session.close()

        return Noting()


async def test_code_and_expected_values_never_meet(monty: Sandbox) -> None:
    seen: Any = Seen(monty)
    code = "secret_of_the_code = 1\ndef f(x):\n    return x"
    test = "expected_by_the_test = 77123\nassert f(77123) == expected_by_the_test"
    assert await grade(seen, code, test, {"call": "f(88)", "expected": 424242}) == 0.0
    assert len(seen.programs) == 5
    for program in seen.programs:
        assert not ("secret_of_the_code" in program and "expected_by_the_test" in program)
        assert "424242" not in program


async def test_a_reward_gets_the_sandbox_of_the_run(monty: Sandbox, tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "async def runs(rollout, *, bonus=1.0, sandbox):\n"
        "    session = await sandbox.session()\n"
        "    result = await session.run(rollout.completion)\n"
        "    await session.close()\n"
        "    return bonus * (result.status == 'ok')\n"
    )
    entries = {
        "mine": {"function": f"{file}:runs", "params": {"bonus": 2.0}},
        "code_passes_tests": {"params": {"tests": ["assert x == 5"], "tag": "py"}},
    }
    setup = RewardSetup.model_validate({"rollout_reward_configs": entries})
    calculator = build_calculator(setup, monty)
    assert [spec.params["sandbox"] for spec in calculator.specs] == [monty, monty]
    rollout = saying("'<py>x = 5</py>'")
    await calculator.score([rollout])
    assert [part.raw for part in rollout.reward_parts] == [2.0, 1.0]

    steps = {"code_passes_tests": {"params": {"tests": ["assert x == 5"], "tag": "py"}}}
    each = RewardSetup.model_validate({"step_reward_configs": steps})
    rollout = saying("<py>x = 5</py>")
    rollout.add_messages(Message("<py>x = 6</py>", MessageType.MODEL))
    await build_calculator(each, monty).score([rollout])
    assert rollout.step_rewards == [1.0, 0.0]


def test_the_sandbox_is_no_parameter_of_a_config() -> None:
    entries = {"code_passes_tests": {"params": {"sandbox": "jail"}}}
    setup = RewardSetup.model_validate({"rollout_reward_configs": entries})
    with pytest.raises(UserError, match=r"params\.sandbox is set.*\n?.*section sandbox"):
        build_calculator(setup, MontySandbox())
    assert takes_sandbox(code_passes_tests)
    assert not takes_sandbox(REWARDS["f1"])


async def test_programs_need_the_whole_of_python(monty: Sandbox) -> None:
    test = {"stdin": "3\n", "stdout": "3\n"}
    with pytest.raises(UserError, match="whole of Python"):
        await grade(monty, "print(input())", test)
    with pytest.raises(UserError, match="whole of Python"):
        params = {"tests": [test], "sandbox": monty}
        RewardSpec("r", code_passes_tests, "rollout", params=params)


PROGRAM = """\
from __future__ import annotations
import sys
def main() -> None:
    a, b = map(int, input().split())
    print(a + b, "", sep=" ")
    sys.stderr.write("debugging")
if __name__ == "__main__":
    main()
    sys.exit(0)
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (PROGRAM, 1),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", 1),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))", 1),
        ("a, b = map(int, input().split())\nprint(a - b)", 0),
        ("a, b = map(int, input().split())\nprint(a + b)\n1 / 0", 0),
        ("while True:\n    pass", 0),
        ("input()\ninput()\nprint(7)", 0),
        ("a, b = map(int, input().split())\na + b", 0),
    ],
)
async def test_programs(jail: Sandbox, code: str, expected: float) -> None:
    assert await grade(jail, code, {"stdin": "3 4\n", "stdout": "7\n"}) == expected


async def test_program_output_is_compared_line_by_line(jail: Sandbox) -> None:
    test = {"stdin": "", "stdout": "a\n\n b"}
    assert await grade(jail, "print('a  \\n\\n b\\n\\n')", test) == 1.0
    assert await grade(jail, "print('a\\n b')", test) == 0.0
    assert await grade(jail, "print('a\\n\\nb')", test) == 0.0


async def test_numpy_values_count_as_plain_ones(jail: Sandbox) -> None:
    code = (
        "import numpy as np\n"
        "def mean(xs):\n    return np.mean(xs)\n"
        "def grid(n):\n    return {'a': [np.arange(n), np.int64(n), np.bool_(True)]}"
    )
    pair = {"call": "grid(3)", "expected": {"a": [[0, 1, 2], 3, True]}}
    statement = "assert mean([1, 2, 6]) == 3.0\nassert grid(1)['a'] == [[0], 1, True]"
    assert await grade(jail, code, pair, statement) == 1.0


FULL_PYTHON_CHEATS = {
    "frames": (
        "import sys, gc\n"
        "def add(a, b):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        frame.f_locals.update(value=5, expected=0)\n"
        "        for name in list(frame.f_globals):\n"
        "            if name.startswith('_say_'):\n"
        "                frame.f_globals[name]('done', '')\n"
        "        frame = frame.f_back\n"
        "    return 0"
    ),
    "builtins": (
        "import builtins\n"
        "builtins.abs = builtins.isinstance = builtins.AssertionError = lambda *a: True\n"
        "def add(a, b):\n    return 0"
    ),
    "exit": "import os\ndef add(a, b):\n    os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "int": (
        "class Five(int):\n"
        "    def __eq__(self, other):\n        return True\n"
        "    __hash__ = int.__hash__\n"
        "def add(a, b):\n    return Five(4)"
    ),
}


@pytest.mark.parametrize("cheat", [*CHEATS, *FULL_PYTHON_CHEATS])
async def test_cheats_fail_in_the_whole_of_python(jail: Sandbox, cheat: str) -> None:
    code = (CHEATS | FULL_PYTHON_CHEATS)[cheat]
    assert await grade(jail, code, *HARD_TESTS, partial=True) == 0.0


async def test_exceptions_of_the_whole_of_python(jail: Sandbox) -> None:
    code = (
        "class Negative(ValueError):\n    pass\n"
        "class Own(Exception):\n    pass\n"
        "def f(x):\n    raise Negative(x) if x < 0 else Own(json.dumps([x]))\n"
        "import json"
    )
    test = (
        "try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == '-1'\n"
        "try:\n    f(1)\nexcept RuntimeError as e:\n    assert str(e) == 'Own: [1]'\n"
    )
    assert await grade(jail, code, test) == 1.0


@pytest.mark.parametrize(("code", "test", "expected"), STATEMENTS)
async def test_statements_in_the_whole_of_python(
    jail: Sandbox, code: str, test: str, expected: float
) -> None:
    assert await grade(jail, code, test) == expected


def test_expected_values_from_json_are_plain() -> None:
    tests = json.loads('[{"call": "f()", "expected": {"a": [1, 2.5, null, true]}}]')
    function = resolve_reward("code_passes_tests", "rollout")
    RewardSpec("r", function, "rollout", params={"tests": tests, "sandbox": MontySandbox()})


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import (\n    annotations,\n)\ndef f(x: Later) -> int:\n    return x + 1",
        'TEXT = """\nfrom __future__ import nothing\n"""\ndef f(x):\n    return x + 1',
        "def f(x):\n    return x + 1\nif __name__ == '__main__':\n    print(f(int(input())))",
    ],
    ids=["future in brackets", "future in a text", "a program too"],
)
async def test_code_that_is_a_good_module_passes(jail: Sandbox, code: str) -> None:
    tests = [{"call": "f(1)  # one", "expected": 2}, "assert f(2) == 3"]
    rollout = saying(f"```python\n{code}\n```")
    assert await code_passes_tests(rollout, sandbox=jail, tests=tests) == 1
