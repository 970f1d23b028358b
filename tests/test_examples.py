"""The examples: every YAML in the repository is a config, and each example runs at tiny size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from retrain import Message, MessageType, Rollout, load_config, run_sync
from retrain.cli import app
from retrain.data import load_traces
from retrain.loops.build import build_calculator
from retrain.sandbox import MontySandbox

ROOT = Path(__file__).parents[1]
YAMLS = sorted(
    path
    for folder in ("benchmarks", "docs", "examples", "src")
    for suffix in ("yaml", "yml")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
)
TINY: dict[str, Any] = {
    "from_scratch": {
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
        },
        "tokenizer": {
            "vocab_size": 300,
            "corpus": "examples/python_use.py:words",
            "special_tokens": ["<code>", "</code>", "<interpreter>", "</interpreter>"],
        },
    }
}
GOOD = """\
A happy cat in golden light,
A warm and merry, purring ball,
We laugh and play from noon to night,
A joyful friend, beloved by all."""
WITH_S = """\
The cat sits in the sun,
It purrs and has some fun,
A happy little one,
When all the day is done."""
NO_CAT = GOOD.replace("cat", "dog")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_is_a_config(path: Path) -> None:
    load_config(path)


def test_the_examples_yamls_are_among_them() -> None:
    assert {"train.yaml", "poem.yaml", "demo.yaml"} <= {path.name for path in YAMLS}


async def poem_reward(text: str) -> Rollout:
    setup = load_config("examples/no_s_poem/poem.yaml").reward_setup
    rollout = Rollout(stop_reason="answered")
    rollout.add_messages(
        Message("A poem, please.", MessageType.MESSAGE), Message(text, MessageType.MODEL)
    )
    await build_calculator(setup, MontySandbox()).score([rollout])
    return rollout


@pytest.mark.parametrize(
    ("text", "total"),
    [
        (GOOD, 0 + 10 * 26 / 26 + 5 * 3 / 3 + 1),
        (WITH_S, -100 + 10 * 16 / 22 + 5 * 2 / 3 + 1),
        (NO_CAT, -110),
        ("A happy cat.", -110),
        ("A cat ball\n" * 4, -110),
        ("", -110),
    ],
)
async def test_poems_written_by_hand_get_what_the_rules_say(text: str, total: float) -> None:
    assert (await poem_reward(text)).reward == pytest.approx(total, abs=1e-9)


async def test_a_poems_parts_say_where_its_reward_comes_from() -> None:
    parts = {part.name: part for part in (await poem_reward(WITH_S)).reward_parts}
    assert parts["words_without_s"].raw == pytest.approx(16 / 22)
    assert parts["words_without_s"].weight == 10
    assert parts["penalize_text_containing"].value == -100
    gated = (await poem_reward(NO_CAT)).reward_parts
    assert [part.verifier for part in gated] == ["examples/no_s_poem/poem.py:mentions_a_cat"]


def test_the_poem_checks_without_a_hub_and_without_warnings() -> None:
    result = CliRunner().invoke(app, ["check", "examples/no_s_poem/poem.yaml"])
    assert result.exit_code == 0, result.output
    assert "failing it makes the total -110" in result.output
    assert "warning" not in result.output


def test_check_warns_when_a_poem_that_is_none_would_pay() -> None:
    arguments = [
        "check",
        "examples/no_s_poem/poem.yaml",
        "--set",
        "reward_setup.verifier_penalty=0",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "pays 0, but passing can pay as little as -100" in result.output


def test_the_poem_runs_with_a_tiny_model(tmp_path: Path) -> None:
    settings = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "warmup_steps": 0}
    config = load_config("examples/no_s_poem/poem.yaml").model_dump(mode="json")
    config |= {"model": TINY, "output_dir": str(tmp_path), "tracking": {"plots": False}}
    config["algorithm"]["hyperparameters"] |= settings | {"max_new_tokens": 8}
    config["evaluation"]["modes"][0]["repeats"] = 1
    result = run_sync(config)
    assert [e.stage for e in result.evaluations] == ["before", "after"]
    assert result.metrics["reward/mean"] == -110


def test_the_word_problems_run_with_a_tiny_model(tmp_path: Path) -> None:
    config = load_config("examples/word_problems/train.yaml").model_dump(mode="json")
    config |= {"model": TINY, "output_dir": str(tmp_path), "tracking": {"plots": False}}
    settings = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "warmup_steps": 0}
    config["algorithm"]["hyperparameters"] |= settings
    config["sft"] |= {"steps": 2, "batch_size": 2, "params": {"n": 8}, "warmup_steps": 0}
    config["evaluation"]["prompt_source"]["limit"] = 2
    result = run_sync(config)
    assert [(e.stage, e.n) for e in result.evaluations] == [
        ("before", 8), ("before", 2), ("after", 8), ("after", 2),
    ]  # fmt: skip
    assert result.checkpoint == result.path / "checkpoints" / "rl"


def test_traces_of_the_word_problems_leave_the_problems_themselves_alone() -> None:
    sft = load_config("examples/word_problems/train.yaml").sft
    assert sft is not None
    lines = Path("examples/word_problems/problems.jsonl").read_text().splitlines()
    problems = {json.loads(line)["prompt"] for line in lines}
    traces = load_traces(sft.dataset, params=sft.params)
    assert len(traces) > 0.99 * sft.params["n"]
    assert not problems & {trace.messages[0].content for trace in traces}
    right = sum(is_right(trace.messages) for trace in traces) / len(traces)
    assert right == pytest.approx(sft.params["share_right"], abs=0.03)


def is_right(messages: tuple[Message, ...]) -> bool:
    """Whether the call is what the prompt asks for; its result and the answer follow from it."""
    prompt, call, result, answer = (message.content for message in messages)
    expression = re.fullmatch(r"<code>([-+*()\d]+)</code>", call)
    assert expression is not None and str(eval(expression[1])) == result == answer
    a, b, c = map(int, re.findall(r"\d+", prompt))
    if re.search(r"loose|more|finds", prompt):
        return int(answer) == a * b + c
    if re.search(r"lost|takes .* out|are bad|gives", prompt):
        return int(answer) == (a - b) * c
    return int(answer) == a * b - c


def test_the_python_example_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/python_use.py", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "completed: reward" in done.stdout
    rows = (tmp_path / "python-use-001" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_plain_pytorch_learns(architecture: str) -> None:
    done = subprocess.run(
        [sys.executable, "examples/plain_pytorch.py", architecture],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(value) for value in re.findall(r"reward (\d\.\d+)", done.stdout)]
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8
