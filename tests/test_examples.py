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

from retrain import Message, load_config, run_sync
from retrain.data import load_traces

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


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_is_a_config(path: Path) -> None:
    load_config(path)


def test_the_examples_yamls_are_among_them() -> None:
    assert {"train.yaml", "poem.yaml", "aime.yaml", "retool.yaml", "demo.yaml"} <= {
        path.name for path in YAMLS
    }


def test_the_poem_runs_with_a_tiny_model(tmp_path: Path) -> None:
    settings = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "warmup_steps": 0}
    config = load_config("src/retrain/recipes/no_s_poem/poem.yaml").model_dump(mode="json")
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
