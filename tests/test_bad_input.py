"""Mistakes of the user's through the real command line: one clear message, and nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner, Result

from retrain.cli import app
from runs import hyperparameters, model_section, rl_config, sft_section
from tiny import byte_tokenizer, tiny_qwen3

Config = dict[str, Any]
Break = Callable[[Config, Path], None]


def write(config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], Result]:
    monkeypatch.setattr("retrain.cli._set_up_logging", lambda level: None)
    disable_progress_bar()

    def run(config: Config) -> Result:
        return CliRunner().invoke(app, ["run", str(write(config, tmp_path))])

    return run


def jsonl(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def source(path: str, **keys: Any) -> Config:
    return {"prompt_source": {"type": "file", "path": path, **keys}}


def reward(name: str, **keys: Any) -> Config:
    return {"reward_setup": {"rollout_reward_configs": {name: keys}}}


def saved_model(tmp_path: Path, *, tokenizer: bool = True) -> str:
    tiny_qwen3().save_pretrained(tmp_path / "model")
    if tokenizer:
        byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def tools(*names: str) -> Config:
    return {"environment": {"type": "smolagent", "tools": list(names)}}


def empty_directory(tmp_path: Path) -> str:
    (tmp_path / "nothing").mkdir()
    return str(tmp_path / "nothing")


GOOD = '{"prompt": "a", "answer": "b"}'

CASES: dict[str, tuple[Callable[[Path], Config], list[str]]] = {
    "data file": (
        lambda p: source(f"{p}/none.jsonl"),
        ["no such file", "none.jsonl"],
    ),
    "malformed line": (
        lambda p: source(jsonl(p, GOOD, '{"prompt": ')),
        ["data.jsonl, line 2"],
    ),
    "missing column": (
        lambda p: source(jsonl(p, GOOD), prompt_column="question"),
        ["question", "prompt, answer"],
    ),
    "missing answer column": (
        lambda p: source(jsonl(p, GOOD), answer_column="solution"),
        ["solution", "prompt, answer"],
    ),
    "empty data": (lambda p: source(jsonl(p)), ["prompt source has no task", "It is empty"]),
    "unknown reward": (lambda p: reward("exact_mach"), ["exact_mach", "exact_match"]),
    "unknown reward path": (lambda p: reward("x", function="runs:digitz"), ["digitz", "'digits'"]),
    "reward parameters": (
        lambda p: reward("exact_match", params={"colour": "red"}),
        ["exact_match", "colour"],
    ),
    "unknown tool": (lambda p: tools("pyton"), ["pyton", "python"]),
    "model directory": (
        lambda p: {"model": {"name_or_path": f"{p}/no/model"}},
        ["no/model does not exist", "model.name_or_path"],
    ),
    "model without config": (
        lambda p: {"model": {"name_or_path": empty_directory(p)}},
        ["has no config.json", "Hugging Face format"],
    ),
    "model without tokenizer": (
        lambda p: {"model": {"name_or_path": saved_model(p, tokenizer=False)}},
        ["has no tokenizer", "tokenizer.save_pretrained"],
    ),
    "long prompt": (
        lambda p: source(jsonl(p, GOOD, json.dumps({"prompt": "long " * 400}))),
        ["prompt_source", "the context limit is 192", "Shorten the prompt"],
    ),
    "long tool description": (
        lambda p: {
            "environment": {"type": "smolagent", "tools": ["python"], "describe_tools": True},
            "engine": {"context_limit": 60},
        },
        ["prompt_source", "the context limit is 60"],
    ),
    "group size": (
        lambda p: {"algorithm": {"hyperparameters": hyperparameters(group_size=1)}},
        ["algorithm.hyperparameters", "group_size 1", "at least 2"],
    ),
    "lora target": (
        lambda p: {
            "model": {"name_or_path": saved_model(p), "peft": {"target_modules": ["query"]}}
        },
        ["model.peft.target_modules", "query", "q_proj"],
    ),
    "sandbox": (lambda p: {"sandbox": {"type": "docker"}}, ["sandbox.type", "docker", "monty"]),
    "engine": (lambda p: {"engine": {"type": "warp"}}, ["engine.type", "warp", "torch"]),
    "algorithm": (lambda p: {"algorithm": {"name": "alchemy"}}, ["alchemy", "grpo"]),
    "backend": (lambda p: {"algorithm": {"backend": "jax"}}, ["jax", "torch"]),
    "environment": (
        lambda p: {"environment": {"type": "python", "path": "runs:Countdwn"}},
        ["Countdwn", "'Countdown'"],
    ),
    "environment parameters": (
        lambda p: {"environment": {"type": "python", "path": "runs:Countdown", "params": {"x": 1}}},
        ["environment.params", "runs:Countdown", "'x'"],
    ),
    "traces without an answer": (
        lambda p: {
            "sft": sft_section(
                dataset=jsonl(p, '{"messages": [{"role": "user", "content": "a"}]}')
            ),
            "stages": [{"kind": "sft"}],
        },
        ["data.jsonl, line 1", "no assistant message"],
    ),
    "traces that are missing": (
        lambda p: {"sft": sft_section(dataset=f"{p}/no.jsonl"), "stages": [{"kind": "sft"}]},
        ["no such file", "no.jsonl"],
    ),
    "success reward": (
        lambda p: {
            "evaluation": {
                "prompt_source": {"type": "list", "prompts": ["a"]},
                "success_reward": "digit",
            }
        },
        ["evaluation.success_reward", "digit", "digits"],
    ),
    "vocabulary": (
        lambda p: {"model": model_section(vocab_size=5)},
        ["vocab_size", "tokenizer"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_clear_message_and_leaves_no_run(
    case: str, tmp_path: Path, run: Callable[[Config], Result]
) -> None:
    change, expected = CASES[case]
    result = run(rl_config(tmp_path / "runs") | change(tmp_path))
    assert result.exit_code == 2, result.output
    for part in expected:
        assert part in result.stderr, result.stderr
    cause, *rest = result.stderr.splitlines()
    assert cause.startswith("error: ") and rest, "a next step follows"
    assert "Traceback" not in result.stderr and len(rest) < 5
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_raises_exits_with_2_and_shows_the_rollout(
    tmp_path: Path, run: Callable[[Config], Result]
) -> None:
    result = run(rl_config(tmp_path / "runs") | reward("mine", function="runs:raises"))
    assert result.exit_code == 2
    assert "error: reward 'mine' failed: KeyError: 'oops'" in result.stderr
    assert "[message] What is" in result.stderr and "Traceback" not in result.stderr


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing but the message: no warning of a library below, no progress bar."""
    config = rl_config(tmp_path / "runs", model={"name_or_path": f"{tmp_path}/no/model"})
    done = subprocess.run(
        [sys.executable, "-c", "from retrain.cli import main; main()", "run",
         str(write(config, tmp_path))],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: model directory {tmp_path}/no/model does not exist\n  Check model.name_or_path.\n"
    )
    assert not (tmp_path / "runs").exists()
