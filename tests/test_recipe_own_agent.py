"""The page from_your_agent.md: its commands as they stand there, on fewer questions."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from other_agents import AGENTS, share_right
from recipe_pages import ROOT, check_what_trains
from retrain import load_config
from retrain.recipes.own_agent import tasks
from retrain.recipes.own_agent.agent import SYSTEM, calculate
from retrain.recipes.own_agent.expert import expression
from retrain.tracking.rollouts import read_rollouts

RECIPE = ROOT / "src" / "retrain" / "recipes" / "own_agent"
PAGE = ROOT / "docs" / "from_your_agent.md"
_BLOCK = re.compile(r"^<!-- run: (?P<label>\w+) -->\n```bash\n(?P<text>.*?)^```$", re.M | re.S)
_MARGIN = re.compile(r"margin: \*\*(\d\.\d+)\*\*")

FEWER = {
    "setup": ("tasks > tasks.jsonl", "tasks -n 1500 > tasks.jsonl"),
    "distill": ("records.jsonl", "records.jsonl --set distillation.epochs=3"),
}
"""What the test changes: 1,500 traces, each three times, in place of 5,000."""


@dataclass(frozen=True)
class Walk:
    """What following the page left."""

    path: Path
    said: dict[str, str]
    """By the label of the command."""

    def success(self, run: str, stage: str) -> float:
        rows = json.loads((self.path / "runs" / run / "results.json").read_text())
        [row] = [row for row in rows if row["stage"] == stage]
        return float(row["successes"] / row["n"])


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    directory = tmp_path_factory.mktemp("walk")
    started: list[subprocess.Popen[str]] = []
    try:
        said = {}
        for block in _BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
            label, text = block["label"], block["text"]
            if label in FEWER:
                assert FEWER[label][0] in text
                text = text.replace(*FEWER[label])
            said[label] = _shell(text, directory, directory / f"{label}.log", started)
        yield Walk(directory, said)
    finally:
        for process in started:  # the expert goes on in the background
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def _shell(text: str, directory: Path, log: Path, started: list[subprocess.Popen[str]]) -> str:
    """Run a block; what it printed."""
    run = 'retrain() { python -c "from retrain.cli import main; main()" "$@"; }\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-ec", run + text],
            cwd=directory,
            env=environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        code = process.wait()
    said = log.read_text()
    assert code == 0, said
    return said


def test_the_agent_knows_nothing_of_retrain() -> None:
    tree = ast.parse((RECIPE / "agent.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "openai" in names
    assert not any(name.startswith("retrain") for name in names)


def test_held_out_questions_are_never_recorded() -> None:
    train = {row["prompt"] for row in tasks.questions("train", 5000)}
    test = {row["prompt"] for row in tasks.questions("test", 200)}
    assert (len(train), len(test)) == (5000, 200)
    assert not train & test
    assert any(SYSTEM in text for text in islice(tasks.corpus(), 1))


def test_the_expert_is_right_as_often_as_it_says() -> None:
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in tasks.questions("train", 3000):
        asked[row["form"]] += 1
        right[row["form"]] += str(calculate(expression(row["prompt"]))) == row["answer"]
    for form, share in {"a*b+c": 0.95, "(a-b)*c": 0.95, "a*b-c": 0.4}.items():
        assert right[form] / asked[form] == pytest.approx(share, abs=0.04)


def test_both_configs_run_the_same_agent() -> None:
    first, second = (load_config(RECIPE / f"{name}.yaml") for name in ("own_agent", "rl"))
    assert first.environment == second.environment
    assert first.environment.type == "external"
    assert first.evaluation == second.evaluation


def test_the_student_comes_near_the_expert_and_rl_takes_it_past(walk: Walk) -> None:
    [(right, asked)] = re.findall(r"(\d+) of (\d+) right", walk.said["record"])
    expert = int(right) / int(asked)
    assert (int(asked), 0.7 < expert < 0.85) == (1500, True)
    assert "kept 1,500 of 1,500 conversations" in walk.said["distill"]
    assert walk.success("own-agent-latest", "before") <= 0.1
    student = walk.success("own-agent-latest", "after")
    assert student >= 0.8 * expert
    before, after = (walk.success("own-agent-rl-latest", s) for s in ("before", "after"))
    assert before == pytest.approx(student, abs=0.1)
    found = _MARGIN.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert after >= before + float(found[1])
    assert after > expert


def test_what_trained_is_what_was_sampled_for_the_agent(walk: Walk) -> None:
    run = walk.path / "runs" / "own-agent-rl-latest"
    rollouts = list(read_rollouts(max((run / "rollouts").glob("rl-*.jsonl.gz"))))
    check_what_trains(rollouts)
    forked = [rollout for rollout in rollouts if len(rollout.segments) > 1]
    assert len(forked) < 0.1 * len(rollouts)
    for rollout in forked:  # a call that was never closed ended its turn; the result opens it again
        assert any(call.error for m in rollout.messages for call in m.tool_calls)


def test_the_same_agent_works_on_the_trained_model(walk: Walk) -> None:
    [(right, asked)] = re.findall(r"(\d+) of (\d+) right", walk.said["serve"])
    after = walk.success("own-agent-rl-latest", "after")
    assert int(right) / int(asked) == pytest.approx(after, abs=0.1)


@pytest.mark.parametrize("framework", AGENTS)
async def test_the_trained_model_works_in_other_frameworks(walk: Walk, framework: str) -> None:
    checkpoint = walk.path / "runs" / "own-agent-rl-latest" / "checkpoints" / "rl"
    assert await share_right(checkpoint, framework, 30) >= 0.6
