"""Built-in rewards and verifiers, each on hand-computed cases, and how names resolve."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import time

import pytest

from retrain.rewards import (
    REWARDS,
    VERIFIERS,
    RewardCalculator,
    RewardSpec,
    resolve_reward,
    resolve_verifier,
)
from retrain.types import Message, MessageType, Rollout, Task, UserError


def rollout_saying(*said: str, answer: object = None, **fields: object) -> Rollout:
    rollout = Rollout(task=Task("t", (), answer), **fields)
    for text in said:
        rollout.add_messages(
            Message("question", MessageType.MESSAGE), Message(text, MessageType.MODEL)
        )
    return rollout


def value(name: str, *said: str, answer: object = None, **params: object) -> float:
    """The built-in's value through the calculator, as a config would use it."""
    rollout = rollout_saying(*said, answer=answer)
    spec = RewardSpec(name, resolve_reward(name, "rollout"), "rollout", params=params)
    asyncio.run(RewardCalculator([spec]).score([rollout]))
    low, high = spec.weighted_range or (0.0, 0.0)
    assert low <= rollout.reward <= high
    return rollout.reward


@pytest.mark.parametrize(
    ("said", "params", "expected"),
    [
        (["A Cat sat"], {"text": "cat"}, 1),
        (["A Cat sat"], {"text": "cat", "case_sensitive": True}, 0),
        (["dog"], {"text": ["cat", "dog"]}, 1),
        (["cat", "dog"], {"text": "cat"}, 0),
        (["cat", "dog"], {"text": "cat", "scope": "all"}, 1),
        ([], {"text": "cat"}, 0),
    ],
)
def test_contains(said, params, expected):
    assert value("contains", *said, **params) == expected


def test_contains_looks_for_the_answer_without_text():
    assert value("contains", "It is Paris.", answer=["Lyon", "Paris"]) == 1
    assert value("contains", "It is Nice.", answer=["Lyon", "Paris"]) == 0


def test_penalize_text_containing():
    assert value("penalize_text_containing", "A Soft cat", text="s") == -100
    assert value("penalize_text_containing", "A calm cat", text="s") == 0
    assert value("penalize_text_containing", "A Soft", text="s", case_sensitive=True) == 0
    assert value("penalize_text_containing", "so", text="s", penalty=-3.5) == -3.5


def test_regex():
    assert value("regex", "so\nAnswer: 42", pattern=r"Answer: \d+$") == 1
    assert value("regex", "Answer: 42!", pattern=r"Answer: \d+$") == 0
    assert value("regex", "say 42", pattern=r"\d+", full_match=True) == 0
    assert value("regex", "YES", pattern="yes", case_sensitive=False) == 1


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        ("one two three", {"min_words": 3, "max_words": 3}, 1),
        ("one two", {"min_words": 3}, 0),
        ("  abc ", {"max_chars": 3}, 1),
        ("abcd", {"max_chars": 3}, 0),
        ("one two", {"min_words": 1, "max_chars": 3}, 0),
    ],
)
def test_length(text, params, expected):
    assert value("length", text, **params) == expected


@pytest.mark.parametrize(
    ("text", "whole", "expected"),
    [
        ("<think>a</think> b <answer>c</answer>", False, 1),
        ("<think>a</think> b <answer>c</answer>", True, 0),
        (" <think>a</think>\n<answer>c</answer> ", True, 1),
        ("<answer>c</answer><think>a</think>", False, 0),
        ("<think>a</think><think>a</think><answer>c</answer>", False, 0),
        ("<think>a<answer>c</answer></think>", False, 0),
        ("<think>a<answer>c</answer>", False, 0),
        ("<answer>c</answer>", False, 0),
    ],
)
def test_format(text, whole, expected):
    assert value("format", text, tags=["think", "answer"], whole=whole) == expected


@pytest.mark.parametrize(
    ("text", "answer", "params", "expected"),
    [
        (" Paris\n", "Paris", {}, 1),
        (" Paris\n", "Paris", {"normalize": "none"}, 0),
        ("paris", "Paris", {}, 0),
        ("paris", "Paris", {"normalize": "lower"}, 1),
        ("The Paris!", "paris", {"normalize": "squad"}, 1),
        ("<answer>5</answer> <answer>6</answer>", 6, {"tag": "answer"}, 1),
        ("<answer>6", 6, {"tag": "answer"}, 0),
        ("a=1; a=2", "2", {"pattern": r"a=(\d)"}, 1),
        (r"<answer>\boxed{6}</answer>", [5, 6], {"tag": "answer", "boxed": True}, 1),
    ],
)
def test_exact_match(text, answer, params, expected):
    assert value("exact_match", text, answer=answer, **params) == expected


def test_a_reward_that_compares_stops_at_a_task_without_answer():
    for name in ("exact_match", "numeric_match", "f1", "squad_em", "boxed_answer", "contains"):
        with pytest.raises(UserError, match="no answer"):
            value(name, r"\boxed{5}")
    with pytest.raises(UserError, match="holds no number"):
        value("numeric_match", "5", answer="five")


@pytest.mark.parametrize(
    ("text", "answer", "params", "expected"),
    [
        ("so 12 + 30 = 42.", 42, {}, 1),
        ("42 or 43", 42, {}, 0),
        ("0.3", 0.1 + 0.2, {}, 1),
        ("1000001", 1000000, {}, 0),
        ("101", 100, {"rel_tol": 0.01}, 1),
        ("101.1", 100, {"rel_tol": 0.01}, 0),
        ("5.4", 5, {"abs_tol": 0.4}, 1),
        ("5.41", 5, {"abs_tol": 0.4}, 0),
        ("0.75", "3/4", {}, 1),
        (r"\boxed{-1,234} in 7 steps", -1234, {"boxed": True}, 1),
        ("<answer>8</answer> 9", 8, {"tag": "answer"}, 1),
        ("no idea", 8, {}, 0),
        ("7", ["6", "7"], {}, 1),
    ],
)
def test_numeric_match(text, answer, params, expected):
    assert value("numeric_match", text, answer=answer, **params) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{1,000.0}", 1000, 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{5\text{ cm}}", "5 cm", 1),
        (r"\boxed{5}", r"thus \boxed{5}", 1),
        (r"\boxed{6}", "5", 0),
        (r"\boxed{}", "", 0),
        ("5", "5", 0),
    ],
)
def test_boxed_answer(text, answer, expected):
    assert value("boxed_answer", text, answer=answer) == expected


@pytest.mark.parametrize(
    ("text", "answer", "f1", "em"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1),
        ("tower in Paris", "Eiffel Tower", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), 0),
        ("yes it is", "yes", 0.0, 0),
        ("Yes.", "yes", 1.0, 1),
        ("no", "noanswer", 0.0, 0),
        ("a b b", ["x", "b b c"], 0.8, 0),
        ("dog", "cat", 0.0, 0),
    ],
)
def test_squad_f1_and_em(text, answer, f1, em):
    assert value("f1", text, answer=answer) == pytest.approx(f1, abs=1e-12)
    assert value("squad_em", text, answer=answer) == em
    assert value("squad_em", f"x <answer>{text}</answer>", answer=answer, tag="answer") == em


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "x"}', 1),
        ('Here:\n```json\n{"name": "x"}\n```\nDone.', 1),
        ('{"name": 5}', 0),
        ('{"name": "x"', 0),
        ('{"name": NaN}', 0),
        ("[" * 200_000, 0),
        ("", 0),
    ],
)
def test_json_schema(text, expected):
    assert value("json_schema", text, schema=SCHEMA) == expected


def test_tool_calls():
    rollout = rollout_saying("x", metrics={"tool_calls/ok": 2.0, "tool_calls/timeout": 1.0})
    count = REWARDS["tool_calls"]
    assert [count(rollout, min_calls=n) for n in (1, 2, 3)] == [1.0, 1.0, 0.0]
    assert count(rollout, max_calls=1) == 0.0
    assert count(rollout, min_calls=3, status="any") == 1.0
    assert count(rollout_saying("x")) == 0.0
    own = rollout_saying("x", metrics={"tool_calls/ok": 3.0, "tool/search/ok": 1.0})
    assert [count(own, tool=name) for name in ("search", "python")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer", "params", "expected"),
    [
        (r"so \boxed{\frac{2}{4}}", "0.5", {}, 1),
        (r"so \boxed{x^2+2x+1}", "(x+1)^2", {"boxed": True}, 1),
        (r"<answer>$\sqrt{8}$</answer> 3", r"2\sqrt{2}", {"tag": "answer"}, 1),
        (r"so \boxed{7}", ["6", 8], {}, 0),
        ("no formula", "6", {"boxed": True}, 0),
    ],
)
def test_math_equivalence(text, answer, params, expected):
    assert value("math_equivalence", text, answer=answer, timeout_s=60.0, **params) == expected


def test_math_equivalence_survives_an_expression_without_end():
    endless = r"\boxed{\sum_{n=1}^{99999999999} \frac{\sin(n^{n})}{n!}}"
    start = time.monotonic()
    assert value("math_equivalence", endless, answer=r"9^{9^{9^{9}}}", timeout_s=1.0) == 0
    assert 1.0 <= time.monotonic() - start < 30
    assert value("math_equivalence", r"\boxed{4}", answer="2+2", timeout_s=60.0) == 1


def test_random_is_uniform_and_repeatable():
    rollouts = [Rollout(id=f"0/task/{number}") for number in range(4000)]
    drawn = [REWARDS["random"](rollout) for rollout in rollouts]
    assert drawn == [REWARDS["random"](rollout) for rollout in rollouts]
    assert drawn != [REWARDS["random"](rollout, seed=1) for rollout in rollouts]
    assert abs(sum(drawn) / 4000 - 0.5) < 0.02
    assert abs(sum(x * x for x in drawn) / 4000 - 1 / 3) < 0.02


def test_verifiers():
    assert VERIFIERS["is_not_empty"](rollout_saying("x"))
    assert not VERIFIERS["is_not_empty"](rollout_saying("x", " \n"))
    assert not VERIFIERS["is_not_empty"](rollout_saying())
    assert VERIFIERS["finished"](rollout_saying("x", stop_reason="answered"))
    assert not VERIFIERS["finished"](rollout_saying("x", stop_reason="length"))
    assert VERIFIERS["used_tool"](rollout_saying("x", metrics={"tool_calls/ok": 1.0}))
    assert not VERIFIERS["used_tool"](rollout_saying("x", metrics={"tool_calls/timeout": 1.0}))


def test_a_built_in_as_a_step_reward_judges_each_turn():
    rollout = rollout_saying("some", "calm", "is")
    function = resolve_reward("penalize_text_containing", "step")
    spec = RewardSpec("no_s", function, "step", weight=0.5, params={"text": "s"})
    asyncio.run(RewardCalculator([spec]).score([rollout]))
    assert rollout.step_rewards == [-50.0, 0.0, -50.0]
    assert spec.weighted_range == (-50.0, 0.0)
    with pytest.raises(UserError, match="no parameter 'scope'"):
        RewardSpec("no_s", function, "step", params={"text": "s", "scope": "all"})


BAD_PARAMS = [
    ("contains", {"text": ""}, "non-empty"),
    ("contains", {"text": "x", "scope": "first"}, "last or all"),
    ("penalize_text_containing", {}, "needs the parameter 'text'"),
    ("regex", {"pattern": "("}, "regular expression"),
    ("length", {}, "no bound"),
    ("length", {"min_words": 5, "max_words": 4}, "above"),
    ("exact_match", {"normalize": "upper"}, "expected one of"),
    ("numeric_match", {"rel_tol": -1.0}, "rel_tol"),
    ("format", {"tags": []}, "tag names"),
    ("json_schema", {"schema": {"type": "strin"}}, "not a JSON schema"),
    ("tool_calls", {"min_calls": 3, "max_calls": 2}, "above"),
    ("tool_calls", {"status": "good"}, "tool_error"),
    ("math_equivalence", {"timeout_s": 0}, "timeout_s"),
    ("f1", {"taag": "answer"}, "valid parameters: tag, pattern, scope"),
]


@pytest.mark.parametrize(("name", "params", "message"), BAD_PARAMS)
def test_impossible_parameters_are_refused_when_the_set_up_is_built(name, params, message):
    with pytest.raises(UserError, match=message) as caught:
        RewardSpec("mine", resolve_reward(name, "rollout"), "rollout", params=params)
    assert "mine" in str(caught.value)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, params, extra in (
        ("math_equivalence", {}, "math"),
        ("json_schema", {"schema": {}}, "json"),
    ):
        with pytest.raises(UserError, match=rf"pip install 'retrain\[{extra}\]'"):
            RewardSpec("r", resolve_reward(name, "rollout"), "rollout", params=params)


def test_names_resolve(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from retrain.rewards import reward, verifier\n"
        "def plain(rollout): return 2.0\n"
        "@reward\ndef marked(rollout): return 3.0\n"
        "@verifier\ndef gate(rollout): return True\n"
        "number = 5\n"
    )
    assert resolve_reward("f1", "rollout") is REWARDS["f1"]
    assert resolve_verifier("finished") is VERIFIERS["finished"]
    assert resolve_reward(f"{file}:plain", "rollout")(None) == 2.0
    assert resolve_reward(f"{file}:marked", "step")(None) == 3.0
    assert resolve_verifier(f"{file}:gate")(None) is True
    assert resolve_verifier(f"{file}:plain")(None) == 2.0
    for resolve, name, message in (
        (lambda n: resolve_reward(n, "rollout"), "exact_mach", "did you mean 'exact_match'"),
        (resolve_verifier, "finishd", "did you mean 'finished'"),
        (lambda n: resolve_reward(n, "step"), "llm_judge", "is a rollout reward, not a step"),
        (lambda n: resolve_reward(n, "rollout"), "pairwise_judge", "is a group reward"),
        (lambda n: resolve_reward(n, "group"), "f1", "rollout reward"),
        (lambda n: resolve_reward(n, "step"), "tool_calls", "rollout reward"),
        (lambda n: resolve_reward(n, "rollout"), f"{file}:gate", "is a verifier"),
        (resolve_verifier, f"{file}:marked", "is a reward"),
        (resolve_verifier, "f1", "is a reward"),
        (resolve_verifier, f"{file}:number", "not a function"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(name)


def test_every_built_in_documents_its_range_and_an_example():
    for name, function in REWARDS.items():
        text = inspect.getdoc(function) or ""
        assert "Range [" in text and f"Example: `{name}:" in text, name


def test_importing_rewards_loads_nothing_heavy():
    code = (
        "import sys, retrain.rewards;"
        "bad = {'torch', 'sympy', 'math_verify', 'jsonschema', 'numpy', 'pydantic_monty'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
