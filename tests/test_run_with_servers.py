"""Whole runs with an inference server of the run's own as engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import retrain
from engine_servers.launch import FAKE
from retrain.types import NO_VERSION, Rollout, UserError
from runs import hyperparameters, metrics_of, model_section, rl_config, rollouts_of

TESTS = Path(__file__).parent


def server_engine(kind: str = "vllm", knobs: Path | None = None, **keys: Any) -> dict[str, Any]:
    """The section of an engine whose server the run starts: the test server, by the real one's
    command line."""
    path = os.pathsep.join([str(FAKE), str(TESTS), str(TESTS.parent / "src")])
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if knobs is not None:
        env["ENGINE_SERVER_KNOBS"] = str(knobs)
    return {"type": kind, "python": sys.executable, "env": env, **keys}


def versions(rollout: Rollout) -> set[int]:
    return {v for s in rollout.segments for v in s.versions if v != NO_VERSION}


def check_whole(path: Path, steps: int, per_step: int) -> None:
    """No rollout is missing, none is there twice, none is masked."""
    found = rollouts_of(path)
    assert sorted(found) == list(range(1, steps + 1))
    for rollouts in found.values():
        assert len({r.id for r in rollouts}) == len(rollouts) == per_step
        assert [r.error for r in rollouts] == [None] * per_step


@pytest.mark.parametrize("peft", [None, {"r": 4}], ids=["full", "lora"])
def test_a_run_is_that_of_the_engine_in_the_process(
    tmp_path: Path, peft: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM's test server draws with the engine's own numbers: only the last bits may differ."""
    model = model_section() | ({"peft": peft} if peft else {})
    algorithm = {"hyperparameters": hyperparameters(steps=3, epochs=2)}
    config = rl_config(tmp_path, model=model, algorithm=algorithm)
    expected = retrain.run_sync(config)
    engine = server_engine(untie_embeddings=None if peft else True)
    result = retrain.run_sync(config | {"engine": engine})

    for step, rollouts in rollouts_of(expected.path).items():
        found = rollouts_of(result.path)[step]
        assert [r.full_token_ids() for r in found] == [r.full_token_ids() for r in rollouts]
        assert all(versions(r) == {2 * (step - 1)} for r in found)
        for mine, theirs in zip(found, rollouts, strict=True):
            for a, b in zip(mine.segments, theirs.segments, strict=True):
                assert list(a.logprobs) == pytest.approx(list(b.logprobs), abs=1e-4)
    rows = metrics_of(result.path)
    assert all(row["engine/probe_gap"] < 1e-4 and row["engine/update_s"] > 0 for row in rows)
    assert all(row["logprob_gap/max"] < 1e-4 for row in rows)
    losses = [row["loss"] for row in metrics_of(expected.path)]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    said = capsys.readouterr().out
    assert f"starting vllm; its log: {result.path.resolve() / 'engine' / 'vllm-0.log'}" in said
    assert "vllm serves" in (result.path / "engine" / "vllm-0.log").read_text()
    assert not (result.path / "engine" / "weights").exists()


@pytest.mark.parametrize("peft", [None, {"r": 4}], ids=["full", "lora"])
def test_a_run_with_sglang(tmp_path: Path, peft: dict[str, Any] | None) -> None:
    model = model_section() | ({"peft": peft} if peft else {})
    hyper = hyperparameters(steps=3)
    config = rl_config(tmp_path, model=model, algorithm={"hyperparameters": hyper})
    result = retrain.run_sync(config | {"engine": server_engine("sglang")})
    check_whole(result.path, steps=3, per_step=6)
    sampled_under = [
        sorted({v for r in step for v in versions(r)}) for step in rollouts_of(result.path).values()
    ]  # a step that teaches nothing makes none
    assert sampled_under[0] == [0] and sampled_under == sorted(sampled_under)
    assert all(len(found) == 1 for found in sampled_under) and sampled_under[-1] != [0]
    for row in metrics_of(result.path):
        assert row["engine/probe_gap"] < 1e-4 and row.get("logprob_gap/max", 0) < 1e-4
    assert "sglang serves" in (result.path / "engine" / "sglang-0.log").read_text()


class During(threading.Thread):
    """Does something once, as soon as a run has made a number of steps."""

    def __init__(self, output_dir: Path, steps: int, act: Callable[[Path], None]) -> None:
        super().__init__(daemon=True)
        self._output_dir, self._steps, self._act = output_dir, steps, act
        self.acted = False
        self._left = threading.Event()

    def run(self) -> None:
        run = self._output_dir / "t-001"
        while not self._left.wait(0.01):
            if (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= self._steps:
                time.sleep(0.15)  # into the next step
                self._act(run)
                self.acted = True
                return

    def __enter__(self) -> During:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self.join()


def server_of(run: Path) -> int:
    """The process that serves a run's weights."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            served = any(str(run.resolve()) in word for word in command)
            if served and "keeper.py" not in " ".join(command):
                return int(entry.name)
    raise AssertionError("no server is running")


def slow(tmp_path: Path, **knobs: Any) -> Path:
    path = tmp_path / "knobs.json"
    given = ", ".join(f'"{name}": {value}' for name, value in {"delay_s": 0.02, **knobs}.items())
    path.write_text(f"{{{given}}}", encoding="utf-8")
    return path


def stall(tmp_path: Path) -> None:
    slow(tmp_path, delay_s=30)


def test_a_server_that_is_killed_in_mid_step_costs_nothing(tmp_path: Path) -> None:
    config = rl_config(
        tmp_path,
        engine=server_engine(knobs=slow(tmp_path), untie_embeddings=True),
        algorithm={"hyperparameters": hyperparameters(steps=4, max_new_tokens=24)},
    )
    with During(tmp_path, 2, lambda run: os.kill(server_of(run), signal.SIGKILL)) as kill:
        result = retrain.run_sync(config)
    assert kill.acted
    check_whole(result.path, steps=4, per_step=6)
    rows = metrics_of(result.path)
    assert sum(row.get("engine/restarts", 0) for row in rows) == 1
    assert all(row["logprob_gap/max"] < 1e-4 and row["rollouts/retried"] == 0 for row in rows)


def test_a_server_that_hangs_is_replaced(tmp_path: Path) -> None:
    config = rl_config(
        tmp_path,
        engine=server_engine(knobs=slow(tmp_path), untie_embeddings=True, health_timeout_s=0.5),
        algorithm={"hyperparameters": hyperparameters(steps=4, max_new_tokens=24)},
    )
    with During(tmp_path, 2, lambda run: os.kill(server_of(run), signal.SIGSTOP)) as hang:
        result = retrain.run_sync(config)
    assert hang.acted
    check_whole(result.path, steps=4, per_step=6)
    assert sum(row.get("engine/restarts", 0) for row in metrics_of(result.path)) == 1


def test_the_deadline_of_a_turn_ends_what_a_server_does_not(tmp_path: Path) -> None:
    """Its health is fine, its tokens no longer come."""
    knobs = slow(tmp_path)
    rollout = {"turn_timeout_s": 1, "timeout_s": 20, "retries": 1, "backoff_s": 0.1}
    config = rl_config(
        tmp_path,
        engine=server_engine(knobs=knobs, untie_embeddings=True),
        rollout=rollout | {"max_lost_steps": 1},
        algorithm={"hyperparameters": hyperparameters(steps=4, max_new_tokens=24)},
        stages=[{"kind": "rl"}],
    )
    with (
        During(tmp_path, 2, lambda _: stall(tmp_path)),
        pytest.raises(UserError, match=r"the engine gave no turn within 1 s") as stopped,
    ):
        retrain.run_sync(config)
    assert "--resume" in stopped.value.next_step


def test_overlapping_rollouts_change_versions_in_mid_generation(tmp_path: Path) -> None:
    hyper = hyperparameters(steps=5, max_new_tokens=40, max_staleness=1, correction={"kind": "tis"})
    config = rl_config(
        tmp_path,
        engine=server_engine(knobs=slow(tmp_path), untie_embeddings=True),
        environment={"type": "qa"},
        algorithm={"hyperparameters": hyper},
    )
    result = retrain.run_sync(config)
    check_whole(result.path, steps=5, per_step=6)
    found = rollouts_of(result.path)
    mixed = [r for rollouts in found.values() for r in rollouts if len(versions(r)) > 1]
    assert mixed, "no rollout saw new weights"
    for rollout in mixed:
        sampled = [v for s in rollout.segments for v in s.versions if v != NO_VERSION]
        assert sampled == sorted(sampled)
    for step, rollouts in found.items():
        assert all(step - 1 - min(versions(r)) <= 1 for r in rollouts)
    rows = metrics_of(result.path)
    assert max(row["staleness/steps_max"] for row in rows) == 1
    assert all(row["engine/probe_gap"] < 1e-4 for row in rows)


def test_the_tied_embedding_trap_stops_the_run(tmp_path: Path) -> None:
    config = rl_config(
        tmp_path,
        engine=server_engine(knobs=slow(tmp_path, keeps_head="true", delay_s=0)),
        algorithm={"hyperparameters": hyperparameters(learning_rate=0.05)},
    )
    config["engine"]["untie_embeddings"] = False
    with pytest.raises(UserError, match="does not serve version 1") as stopped:
        retrain.run_sync(config)
    assert "untie_embeddings: true" in stopped.value.next_step
