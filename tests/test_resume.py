"""A run that is killed anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from killing import KillServer, left_behind
from retrain.envs import Environment, Step
from retrain.tracking.checkpoints import Checkpoints
from retrain.tracking.run_dir import RunDirectory, read_metrics
from retrain.types import Message, MessageType, Rollout
from runs import hyperparameters, rl_config, sft_section

KILLS = 10
"""Random moments for each of the two pipelines."""


class Erratic(Environment):
    """Three turns whose answers are always the same, and whose time never is."""

    async def step(self, rollout: Rollout, message: Message) -> Step:
        await asyncio.sleep(os.urandom(1)[0] / 10_000)
        turn = len(rollout.model_messages)
        if turn == 3:
            return Step(reward=float(len(message.content) % 3), stop="environment")
        return Step([Message(f"Go on, {turn}: {len(message.content)}.", MessageType.MESSAGE)])


def pipeline(output_dir: Path) -> dict[str, Any]:
    """SFT, an evaluation, GRPO with KL in a world that takes what time it likes, another one."""
    hyper = hyperparameters(
        steps=5,
        max_new_tokens=14,
        epochs=2,
        kl={"coefficient": 0.01, "refresh_steps": 2},
        schedule="cosine",
        dynamic_sampling_rounds=1,
    )
    return rl_config(
        output_dir,
        sft=sft_section(steps=20),
        environment={"type": "python", "path": "test_resume:Erratic"},
        prompt_source={"type": "python", "function": "runs:questions", "params": {"n": 7}},
        algorithm={"hyperparameters": hyper},
        evaluation={
            "prompt_source": {"type": "python", "function": "runs:questions", "params": {"n": 4}},
            "every_steps": 2,
            "success_threshold": 0.5,
        },
        checkpoint={"every_steps": 1, "keep_best": {"metric": "reward/mean"}},
        stages=[
            {
                "kind": "sft",
                "environment": {"type": "smolagent", "tools": ["python"]},
                "checkpoint": {"every_steps": 4, "keep_best": None},
            },
            {"kind": "eval", "name": "before"},
            {"kind": "rl"},
            {"kind": "eval", "name": "after"},
        ],
    )


def ppo_lora(output_dir: Path) -> dict[str, Any]:
    """PPO with a critic of its own on a LoRA policy, from a stream of tasks; one process kills."""
    hyper = hyperparameters(
        steps=6,
        max_new_tokens=8,
        critic={"backbone": "own", "warmup_steps": 2},
        mini_batches=2,
        optimizer="muon",
    )
    config = rl_config(
        output_dir,
        prompt_source={
            "type": "python",
            "function": "runs:questions",
            "params": {"n": 5},
            "streaming": True,
            "shuffle_buffer": 3,
        },
        environment={"type": "qa"},
        algorithm={"name": "ppo", "hyperparameters": hyper},
        reward_setup={"rollout_reward_configs": {"window": {"function": "test_resume:Window"}}},
        checkpoint={"every_steps": 2},
    )
    config["model"]["peft"] = {"r": 4}
    return config


class Window:
    """A reward that is relative to the last rollouts: it has a state."""

    def __init__(self, size: int = 7) -> None:
        self._size = size
        self._seen: list[float] = []

    def __call__(self, rollout: Any) -> float:
        mean = sum(self._seen) / len(self._seen) if self._seen else 0.0
        return len(rollout.completion) - mean

    def end_step(self, rollouts: Any) -> None:
        self._seen = [*self._seen, *(float(len(r.completion)) for r in rollouts)][-self._size :]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = list(state["seen"])


PIPELINES = {"pipeline": pipeline, "ppo_lora": ppo_lora}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillServer]:
    with KillServer(tmp_path_factory.mktemp("server"), hash_seed=1) as started:
        yield started


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """What each pipeline leaves when nothing happens to it, and how long it takes: in a process
    that has nothing in common with those that are killed."""
    found = {}
    with KillServer(tmp_path_factory.mktemp("other_server"), hash_seed=2) as server:
        for name, make in PIPELINES.items():
            directory = tmp_path_factory.mktemp(name)
            started = time.monotonic()
            assert server.run(make(directory)) == 0, server.said()
            found[name] = (left_behind(directory / "t-001"), time.monotonic() - started)
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_killed_at_random_and_resumed_it_ends_with_the_same_bits(
    name: str, server: KillServer, expected: dict[str, Any], tmp_path: Path
) -> None:
    whole, seconds = expected[name]
    moments = random.Random(name)
    kills = resumes = 0
    while kills < KILLS:
        directory = tmp_path / str(resumes)
        config = PIPELINES[name](directory)
        code = server.run(config, after_s=moments.uniform(0.1, seconds))
        while code == -9:
            kills += 1
            code = server.run(config, "auto", after_s=moments.uniform(0.1, 1.5 * seconds))
        assert code == 0, server.said()
        resumes += 1
        assert sorted(path.name for path in directory.glob("t-*")) == ["t-001", "t-latest"]
        assert left_behind(directory / "t-001") == whole


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_goes_on_to_the_same_bits(
    name: str, number: int, server: KillServer, expected: dict[str, Any], tmp_path: Path
) -> None:
    """As above, but nothing that was learnt is learnt again: it goes on where it stopped."""
    whole, _ = expected[name]
    config = PIPELINES[name](tmp_path)
    run = tmp_path / "t-001"
    lines = [str(run / "metrics.jsonl"), len(whole["metrics"]) - 5]
    code = server.run(config, after_lines=lines, after_s=0.02, signal=number)
    assert code == 128 + number, server.said()
    assert RunDirectory(run).about()["status"] == "interrupted"
    stages = [(r["stage"], r["step"]) for r in read_metrics(run / "metrics.jsonl")]
    trained = [row for row in stages if row[0] in ("sft", "rl")]
    checkpoint, damaged = Checkpoints(run / "checkpoints").newest_good()
    assert checkpoint is not None and not damaged
    assert (checkpoint.about["stage"], checkpoint.about["step"]) == trained[-1]
    assert server.run(config, str(run)) == 0, server.said()
    left = left_behind(run)
    for what in ("metrics", "rollouts", "results"):
        assert left[what] == whole[what]
    for path in whole["tensors"]:
        if path.startswith(("rl/", "sft/")):
            assert left["tensors"][path] == whole["tensors"][path]


def test_two_undisturbed_runs_are_equal_and_a_seed_makes_another(
    server: KillServer, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Without this, equal hashes would say little."""
    assert server.run(pipeline(tmp_path / "again")) == 0
    assert left_behind(tmp_path / "again" / "t-001") == expected["pipeline"][0]
    assert server.run(pipeline(tmp_path / "other") | {"seed": 1}) == 0
    other = left_behind(tmp_path / "other" / "t-001")
    weights = "rl/model.safetensors"
    assert other["tensors"][weights] != expected["pipeline"][0]["tensors"][weights]
    steps = [(r["stage"], r["step"]) for r in other["metrics"]]
    assert len(set(steps)) == len(steps) == 20 + 10 + 1 + 5 + 2 + 1
    turns = [row["turns/mean"] for row in other["metrics"] if row["stage"] == "rl"]
    assert min(turns) > 1, "the world's own time matters from the second turn on"


def short(output_dir: Path) -> dict[str, Any]:
    """Three steps of RL, a checkpoint after each, of which the second makes the first go."""
    config = pipeline(output_dir)
    config["stages"] = [{"kind": "rl"}]
    changed = {"steps": 3, "prompts_per_step": 1, "kl": None, "max_new_tokens": 4}
    config["algorithm"]["hyperparameters"] |= changed
    config["checkpoint"] = {"every_steps": 1, "keep_last": 1}
    for section in ("sft", "evaluation"):
        del config[section]
    return config


def test_every_step_on_the_disk_may_be_the_last(server: KillServer, tmp_path: Path) -> None:
    """All of the second checkpoint: with fewer there is nothing to lose."""
    count = tmp_path / "count.json"
    assert server.run(short(tmp_path / "whole"), count=str(count)) == 0, server.said()
    whole = left_behind(tmp_path / "whole" / "t-001")
    names = json.loads(count.read_text())
    first = names.index("rename") + 2  # the rename, and the sync that is part of it
    second = names[first:].index("remove") + 1
    assert {"save_file", "write", "sync", "rename"} <= set(names[first:][:second])
    for number, name in list(enumerate(names))[first:][: second + 1]:
        config = short(tmp_path / str(number))
        torn = name in ("save_file", "write")
        assert server.run(config, at=number, torn=torn) == -9, (number, name)
        assert server.run(config, "auto") == 0, (number, name, server.said())
        left = left_behind(tmp_path / str(number) / "t-001")
        assert left == whole, (number, name)
        checkpoints = tmp_path / str(number) / "t-001" / "checkpoints"
        assert not [p.name for p in checkpoints.iterdir() if p.name.startswith(".")]
