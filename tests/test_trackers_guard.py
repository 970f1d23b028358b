"""A tracker that fails, hangs, dies or is slow is no trouble to a run; what a config may say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.config import load_config, resolve_stages
from retrain.loops.check import check
from retrain.tracking.trackers import RunInfo, Trackers, build_trackers, sharing
from retrain.tracking.trackers.base import GRACE_S, Kept, RolloutRow
from retrain.tracking.trackers.guard import (
    MOST_FAILURES,
    MOST_ROLLOUTS,
    GuardedTracker,
)
from retrain.types import Message, MessageType, RewardPart, Rollout, UserError
from runs import hyperparameters, metrics_of, rl_config, sft_section


def recorded(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def guarded(tmp_path: Path, trouble: str = "", at: str = "") -> GuardedTracker:
    params = {"path": str(tmp_path / "calls"), "trouble": trouble, "at": at}
    path = "recorder:Recorder"
    return GuardedTracker("python", path, params, finish_timeout_s=60.0)


def use(tracker: GuardedTracker, tmp_path: Path, calls: int = 8, timeout_s: float = 60.0) -> None:
    tracker.start(RunInfo("r", tmp_path, {}), lambda where: None)
    for step in range(calls):
        tracker.call("log_metrics", step, {"a": float(step)})
    tracker.finish("completed")
    tracker.join(timeout_s)
    tracker.end()


def test_calls_come_in_order_and_what_is_printed_goes_to_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    tracker = guarded(tmp_path)
    tracker.start(RunInfo("r", tmp_path, {}, rewound_to=3), said.append)
    for step in range(3):
        tracker.call("log_metrics", step, {"a": float(step)})
    tracker.finish("interrupted")
    tracker.join(60.0)
    tracker.end()
    assert recorded(tmp_path / "calls") == [
        ["start", "r", 3],
        *(["log_metrics", step, {"a": step}] for step in range(3)),
        ["finish", "interrupted"],
    ]
    assert said == ["python: here"]
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "trackers" / "python.log").read_text() == "a banner\n" * 5


def test_failures_are_told_once_and_then_it_is_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(guarded(tmp_path, "raises", "log_metrics"), tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "tracker python failed: ConnectionError: no network; the run goes on",
        f"tracker python failed {MOST_FAILURES} times in a row: ConnectionError: no network; "
        "the run goes on without it",
        f"tracker python: 0 calls dropped, {MOST_FAILURES} failed",
    ]
    calls = [call[0] for call in recorded(tmp_path / "calls")]
    assert calls.count("log_metrics") == MOST_FAILURES


@pytest.mark.parametrize(
    ("trouble", "at", "told"),
    [
        ("raises", "start", "did not start: ConnectionError: no network"),
        ("dies", "start", "EOFError: its process has ended"),
        ("dies", "log_metrics", "EOFError: its process has ended"),
    ],
)
def test_one_that_does_not_start_or_dies_is_switched_off(
    trouble: str, at: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(guarded(tmp_path, trouble, at), tmp_path)
    assert caplog.records[0].getMessage() == f"tracker python {told}; the run goes on without it"


def test_few_calls_with_rollouts_wait(tmp_path: Path) -> None:
    tracker = guarded(tmp_path, "hangs", "log_metrics")
    tracker.start(RunInfo("r", tmp_path, {}), lambda where: None)
    tracker.call("log_metrics", 0, {})
    for step in range(MOST_ROLLOUTS + 3):
        tracker.call("log_rollouts", "rl", step, [])
    tracker.call("log_metrics", 1, {})
    assert tracker.dropped == 3
    tracker.join(0.0)
    tracker.end()
    free = guarded(tmp_path / "free")
    (tmp_path / "free").mkdir()
    free.start(RunInfo("r", tmp_path / "free", {}), lambda where: None)
    deadline = time.monotonic() + 30.0
    for step in range(2 * MOST_ROLLOUTS):
        free.call("log_rollouts", "rl", step, [])
        while free._calls.qsize():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert free.dropped == 0, "one that was made leaves room for another"
    free.join(0.0)
    free.end()


def test_wandb_without_a_network_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    path = "retrain.tracking.trackers.wandb:WandbTracker"
    tracker = GuardedTracker("wandb", path, {"project": "p"}, finish_timeout_s=60.0)
    started = time.monotonic()
    tracker.start(RunInfo("r", tmp_path, {}), lambda where: None)
    tracker.call("log_metrics", 1, {"a": 1.0})
    tracker.finish("completed")
    tracker.join(8.0)
    tracker.end()
    assert time.monotonic() - started < 15.0 + GRACE_S
    assert any("tracker wandb" in record.getMessage() for record in caplog.records)


# Whole runs


def small(directory: Path, *trackers: Any, **tracking: Any) -> dict[str, Any]:
    given = {"progress": "off", "plots": False, "trackers": list(trackers), **tracking}
    return rl_config(directory, environment={"type": "qa"}, tracking=given)


def own(path: Path, **params: Any) -> dict[str, Any]:
    params = {"path": str(path), **params}
    return {"type": "python", "path": "recorder:Recorder", "params": params}


def test_a_run_with_a_tracker_that_hangs_completes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = own(tmp_path / "calls", trouble="hangs", at="log_metrics")
    result = retrain.run_sync(small(tmp_path, tracker, finish_timeout_s=0.5))
    assert result.status == "completed" and len(metrics_of(result.path)) == 2
    assert "tracker python was not done after" in caplog.text


def test_evaluations_reach_a_tracker_at_their_interval(tmp_path: Path) -> None:
    source = {"type": "python", "function": "runs:questions", "params": {"n": 3, "first": 60}}
    config = small(tmp_path, own(tmp_path / "calls"), rollouts_logged=2, rollouts_logged_every=3)
    config["algorithm"] = {"hyperparameters": hyperparameters(steps=4)}
    config["evaluation"] = {"prompt_source": source, "every_steps": 2}
    config["evaluation"]["modes"] = [{"name": "greedy", "temperature": 0.0}]
    config["stages"] = [{"kind": "rl"}]
    result = retrain.run_sync(config)
    calls = recorded(tmp_path / "calls")
    steps = [call[1] for call in calls if call[0] == "log_metrics" and "eval/greedy/n" in call[2]]
    assert steps == [2, 4]
    evaluated = metrics_of(result.path, "rl-eval")
    assert [row["eval/greedy/n"] for row in evaluated] == [3.0, 3.0]
    logged = [(call[1], call[2], len(call[3])) for call in calls if call[0] == "log_rollouts"]
    assert logged == [("rl-eval-greedy", 2, 2), ("rl", 3, 2), ("rl-eval-greedy", 4, 2)]
    assert [call[1] for call in calls if call[0] == "log_artifact"] == []
    assert calls[-1] == ["finish", "completed"]


def test_a_failed_run_says_so_and_artifacts_are_given_if_asked(tmp_path: Path) -> None:
    config = small(tmp_path, own(tmp_path / "failed"))
    rewards = {"rollout_reward_configs": {"r": {"function": "runs:raises"}}}
    with pytest.raises(UserError):
        retrain.run_sync(config | {"reward_setup": rewards})
    assert recorded(tmp_path / "failed")[-1] == ["finish", "failed"]
    config = small(tmp_path, own(tmp_path / "calls"), artifacts=True)
    result = retrain.run_sync(config)
    given = [call[1:] for call in recorded(tmp_path / "calls") if call[0] == "log_artifact"]
    assert given == [["checkpoint", str(result.checkpoint)]]


# What is sent


def test_names_are_prefixed_only_where_several_stages_log_them() -> None:
    assert sharing([("rl", "rl", True)]) == set()
    stages = [("sft", "sft", False), ("rl", "rl", False), ("after", "eval", False)]
    assert sharing(stages) == {"sft", "rl"}
    stages = [("before", "eval", False), ("rl", "rl", True)]
    assert sharing(stages) == {"before", "rl-eval"}


class Told(GuardedTracker):
    def __init__(self) -> None:
        super().__init__("told", "", {}, finish_timeout_s=1.0)
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *arguments: Any) -> None:
        self.calls.append((method, *arguments))


def test_the_axis_goes_on_over_stages_and_rollouts_are_spread() -> None:
    told = Told()
    trackers = Trackers([told], prefixed=["sft"], rollouts=3, rollouts_every=5)
    trackers.log_metrics("sft", 2, {"loss": 1.5, "bad": float("nan"), "worse": float("inf")})
    trackers.begin_stage(2)
    trackers.log_metrics("rl", 5, {"loss": 0.5})
    rollouts = [Rollout(id=str(i)) for i in range(8)]
    trackers.log_rollouts("rl", 4, rollouts, training=True)
    trackers.log_rollouts("rl", 5, rollouts, {"2": 0.25}, training=True)
    trackers.log_rollouts("rl-eval", 4, rollouts[:2])
    metrics, sampled = told.calls[:2], told.calls[2:]
    assert metrics == [("log_metrics", 2, {"sft/loss": 1.5}), ("log_metrics", 7, {"loss": 0.5})]
    assert [(name, step, [row.id for row in rows]) for _, name, step, rows in sampled] == [
        ("rl", 7, ["0", "2", "5"]),
        ("rl-eval", 6, ["0", "1"]),
    ]
    assert [row.advantage for row in sampled[0][3]] == [None, 0.25, None]


def test_a_row_says_what_was_said_and_what_it_was_worth() -> None:
    said = [("be brief", MessageType.SYSTEM), ("2+3?", MessageType.MESSAGE)]
    said += [("<code>2+3</code>", MessageType.MODEL), ("5", MessageType.TOOL)]
    rollout = Rollout(id="a", group_id="g", reward=1.25, stop_reason="answered")
    rollout.messages = [Message(*pair) for pair in (*said, ("five", MessageType.MODEL))]
    parts = [("exact", 1.0), ("short", 0.5), ("short", -0.25)]
    rollout.reward_parts = [RewardPart(n, "rollout", None, v, 1.0, v) for n, v in parts]
    row = RolloutRow.of(rollout, -0.5)
    assert row.prompt == "be brief\n2+3?"
    assert row.completion == "<code>2+3</code>\n[tool] 5\nfive"
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.reward_parts == {"exact": 1.0, "short": 0.25}
    assert (row.reward, row.advantage, row.stop_reason) == (1.25, -0.5, "answered")
    rollout.mask("engine", "gone")
    assert RolloutRow.of(rollout).reward is None


def test_kept_facts_are_read_back(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "x")
    assert kept.read() == {}
    kept.write(id="a", rows=3)
    assert Kept(tmp_path, "x").read() == {"id": "a", "rows": 3}
    (tmp_path / "trackers" / "x.json").write_text("[]")
    assert kept.read() == {}


# The config


@pytest.mark.parametrize(
    ("tracking", "told"),
    [
        ({"trackers": ["wandbb"]}, "wandb"),
        ({"trackers": [{"type": "wandb", "projekt": "x"}]}, "projekt"),
        ({"trackers": ["mlflow", "mlflow"]}, "mlflow is there twice"),
        ({"rollouts_logged": 3}, "rollouts_logged: nothing of it acts without trackers"),
        (
            {"trackers": [{"type": "wandb", "mode": "disabled"}], "artifacts": True},
            "artifacts: nothing of it acts without trackers, and those that are listed are dis",
        ),
        (
            {"trackers": [{"type": "wandb", "mode": "disabled"}, "tensorboard"], "artifacts": True},
            "tensorboard holds no checkpoints",
        ),
        ({"finish_timeout_s": 3.0}, "finish_timeout_s: nothing of it acts without trackers"),
        ({"trackers": ["tensorboard"], "artifacts": True}, "tensorboard holds no checkpoints"),
        (
            {"trackers": ["mlflow"], "rollouts_logged": 0, "rollouts_logged_every": 2},
            "rollouts_logged_every does nothing",
        ),
        ({"trackers": [{"type": "python", "path": "runs:digits"}]}, "runs:digits has no start"),
        ({"trackers": [{"type": "python", "path": "runs:digit"}]}, "did you mean 'digits'"),
    ],
)
def test_refusals(tracking: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        retrain.run_sync(rl_config(tmp_path, tracking=tracking))
    assert list(tmp_path.iterdir()) == []


def test_keys_of_rollouts_need_a_stage_that_makes_some(tmp_path: Path) -> None:
    given = rl_config(tmp_path, sft=sft_section(), stages=[{"kind": "sft"}])
    given["tracking"] = {"trackers": ["mlflow"], "rollouts_logged": 3}
    with pytest.raises(UserError, match=r"tracking\.rollouts_logged: no stage makes rollouts"):
        resolve_stages(load_config(given))


@pytest.mark.parametrize(
    ("tracking", "told"),
    [
        ({"rollouts_logged_every": 2}, "rollouts_logged_every does nothing: it counts steps of RL"),
        ({"artifacts": True}, "artifacts does nothing: no stage trains"),
    ],
)
def test_keys_need_a_stage_that_they_act_in(
    tracking: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = {"type": "python", "function": "runs:questions", "params": {"n": 1, "first": 60}}
    given = rl_config(tmp_path, evaluation={"prompt_source": source}, stages=[{"kind": "eval"}])
    given["tracking"] = {"trackers": ["mlflow"], "rollouts_logged": 3}
    load_config(given)
    given["tracking"] |= tracking
    with pytest.raises(UserError, match=told):
        load_config(given)


def test_a_missing_package_is_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"pip install 'retrain\[trackio\]'"):
        retrain.run_sync(small(tmp_path / "runs", "trackio"))
    assert not (tmp_path / "runs").exists()


def test_check_describes_them_and_disabled_is_as_if_not_listed(tmp_path: Path) -> None:
    for package in ("wandb", "tensorboard", "mlflow"):
        pytest.importorskip(package)
    wandb = {"type": "wandb", "mode": "offline", "project": "p"}
    said = check(load_config(small(tmp_path, wandb, "tensorboard")))
    assert "tracker wandb: project p, mode offline" in said
    assert "tracker tensorboard\n" in said
    config = load_config(small(tmp_path, wandb | {"mode": "disabled"}))
    assert "tracker wandb" not in check(config)
    assert build_trackers(config.tracking)._trackers == []


def test_each_is_made_with_what_the_config_says(tmp_path: Path) -> None:
    """The keys that need a network to be seen acting."""
    trackers = [
        {"type": "trackio", "project": "p", "space_id": "me/space"},
        {"type": "tensorboard", "directory": str(tmp_path / "boards")},
    ]
    for tracker in trackers:
        pytest.importorskip(str(tracker["type"]))
    config = load_config(small(tmp_path, *trackers))
    trackio, tensorboard = build_trackers(config.tracking)._trackers
    assert trackio._params["space_id"] == "me/space"
    use(tensorboard, tmp_path)
    assert list((tmp_path / "boards" / "r").glob("events.*"))


def test_nothing_of_them_is_imported_without_need() -> None:
    code = (
        "import sys, retrain, retrain.config, retrain.tracking.trackers\n"
        "print({'wandb', 'tensorboard', 'trackio', 'mlflow', 'torch'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert said.stdout.strip() == "set()"
