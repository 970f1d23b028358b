"""The four trackers, read back through their own readers; a run with them has the bits of one
without; an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sqlite3
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.loops.interrupt import Interrupted
from retrain.tracking.run_dir import read_metrics
from retrain.tracking.trackers import RunInfo
from retrain.tracking.trackers.base import Kept
from retrain.tracking.trackers.guard import GuardedTracker
from retrain.tracking.trackers.mlflow import MLflowTracker
from retrain.tracking.trackers.wandb import WandbTracker
from retrain.types import Rollout
from runs import digits, hyperparameters, rl_config, rollouts_of, sft_section

LAST = 5
"""The global step that the run ends with: two of SFT, three of RL."""

calls = {"left": 0}


def stops_once(rollout: Rollout) -> float:
    """`digits`; Ctrl-C once `calls` are used up."""
    calls["left"] -= 1
    if calls["left"] == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return digits(rollout)


def config(directory: Path, trackers: list[Any]) -> dict[str, Any]:
    """SFT, RL that is evaluated after each step, an evaluation."""
    source = {"type": "python", "function": "runs:questions", "params": {"n": 2, "first": 60}}
    tracking: dict[str, Any] = {"progress": "off"}
    if trackers:
        tracking |= {"trackers": trackers, "rollouts_logged": 3, "rollouts_logged_every": 2}
        tracking |= {"artifacts": True, "finish_timeout_s": 120.0}
    return rl_config(
        directory,
        logging_level="error",
        environment={"type": "qa"},
        sft=sft_section(steps=2, batch_size=2),
        algorithm={"hyperparameters": hyperparameters(steps=3)},
        reward_setup={"rollout_reward_configs": {"d": {"function": "test_trackers:stops_once"}}},
        evaluation={
            "prompt_source": source,
            "every_steps": 1,
            "modes": [{"name": "T=1", "temperature": 1.0}],
        },
        stages=[{"kind": "sft"}, {"kind": "rl"}, {"kind": "eval", "name": "after"}],
        tracking=tracking,
    )


@dataclass(frozen=True)
class Ran:
    plain: Path
    tracked: Path
    place: Path
    """Where trackers write that do not write into the run directory."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run without trackers, and one with all of them: interrupted in the last step of RL, gone on
    with from the end of SFT, so that two steps of RL are logged twice."""
    for package in ("wandb", "tensorboard", "trackio", "mlflow"):
        pytest.importorskip(package)
    place = tmp_path_factory.mktemp("trackers")
    trackers: list[Any] = [
        {"type": "wandb", "mode": "offline", "project": "p", "name": "n", "tags": ["a"]}
        | {"group": "g", "entity": "e"},
        "tensorboard",
        {"type": "trackio", "project": "p", "name": "n", "directory": str(place / "trackio")},
        {"type": "mlflow", "tracking_uri": (place / "ml").as_uri(), "experiment": "x", "name": "n"},
    ]
    plain = retrain.run_sync(config(place / "plain", []))
    calls["left"] = 2 * 6 + 2 * 2 + 3
    with pytest.raises(Interrupted):
        retrain.run_sync(config(place / "tracked", trackers))
    (tracked,) = (place / "tracked").glob("t-0*")
    killed = [run.info.status for run in mlflow_runs(place)]
    assert killed == ["KILLED"]
    for checkpoint in (tracked / "checkpoints").glob("rl-*"):
        shutil.rmtree(checkpoint)
    calls["left"] = 0
    retrain.run_sync(config(place / "tracked", trackers), resume="latest")
    return Ran(plain.path, tracked, place)


def test_nothing_that_trains_or_is_measured_changes(ran: Ran) -> None:
    def measured(run: Path) -> list[dict[str, Any]]:
        timed = ("seconds", "tokens_per_s")
        return [
            {n: v for n, v in row.items() if not any(word in n for word in timed)}
            for row in read_metrics(run / "metrics.jsonl")
        ]

    def left(run: Path) -> dict[str, Any]:
        checkpoint = run / "checkpoints" / "rl"
        state = json.loads((checkpoint / "resume" / "state.json").read_text())
        for key in ("sizes", "results"):
            del state[key]
        return {"state": state, "bytes": (checkpoint / "model.safetensors").read_bytes()}

    assert measured(ran.plain) == measured(ran.tracked)
    assert left(ran.plain) == left(ran.tracked)


def test_no_log_but_that_of_trackio_says_anything(ran: Ran) -> None:
    logs = {path.stem: path.read_text() for path in (ran.tracked / "trackers").glob("*.log")}
    assert set(logs) == {"wandb", "tensorboard", "trackio", "mlflow"}
    assert "Traceback" not in "".join(logs.values())


def expected(ran: Ran) -> dict[tuple[str, int], float]:
    """(name, global step): value, of some metrics of the run."""
    found = {}
    for row in read_metrics(ran.tracked / "metrics.jsonl"):
        stage, step = str(row["stage"]), int(row["step"] or 0)
        moved = {"sft": 0, "sft-eval": 0, "rl": 2, "rl-eval": 2}
        at = LAST if stage == "after" else moved[stage] + step
        for name in ("loss", "reward/mean", "eval/T=1/reward"):
            if row.get(name) is not None:
                found[f"{stage}/{name}", at] = float(row[name] or 0)
    assert len(found) >= 2 + 3 + 3 + 1, "and the loss of those steps of RL that have one"
    return found


# Weights & Biases


def wandb_records(run: Path) -> list[Any]:
    """The records of each of the run's transaction logs, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        records = []
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            records.append(record)
        found.append(records)
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Of a LevelDB log: blocks of 32 KiB; CRC, length and type before each piece of a record."""
    at, pieces = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def history(records: list[Any]) -> list[dict[str, Any]]:
    def name(item: Any) -> str:
        return item.key or ".".join(item.nested_key)

    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{name(i): json.loads(i.value_json) for i in row.item} for row in rows]


def test_wandb_goes_on_with_one_run_over_its_own_axis(ran: Ran) -> None:
    parts = wandb_records(ran.tracked)
    first, second = map(history, parts)
    assert len({r.run.run_id for part in parts for r in part if r.HasField("run")}) == 1
    started = next(r.run for r in parts[1] if r.HasField("run"))
    assert (started.project, started.display_name, list(started.tags)) == ("p", "n", ["a"])
    assert (started.run_group, started.entity) == ("g", "e")
    configured = {item.key: item.value_json for item in started.config.update}
    assert json.loads(configured["experiment_name"]) == "t"
    steps = [row["_step"] for row in (*first, *second)]
    assert steps == sorted(set(steps)), "W&B drops what goes back"
    metrics = {
        (name, row["global_step"]): value
        for row in (*first, *second)
        for name, value in row.items()
        if not isinstance(value, dict)
    }
    for place, value in expected(ran).items():
        assert metrics[place] == pytest.approx(value), place
    axes = [r.metric for r in parts[1] if r.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "global_step" for m in axes)
    codes = [r.exit.exit_code for part in parts for r in part if r.HasField("exit")]
    assert codes == [255, 0]


def test_wandb_commits_each_call_and_counts_it_before(tmp_path: Path) -> None:
    """A W&B step that may have been used is not used again, whenever the process dies."""
    seen: list[tuple[int, bool, int]] = []

    class Run:
        id = "x"

        def log(self, values: Mapping[str, Any], step: int, commit: bool = False) -> None:
            seen.append((step, commit, Kept(tmp_path, "wandb").read()["rows"]))

    tracker = WandbTracker(project="p", mode="offline")
    tracker._run, tracker._kept = Run(), Kept(tmp_path, "wandb")
    tracker.log_metrics(4, {"a": 0.5})
    tracker.log_metrics(5, {"a": 1.5})
    assert seen == [(0, True, 1), (1, True, 2)]


def test_wandb_that_is_late_still_writes_what_it_was_given(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    params = {"project": "p", "mode": "offline"}
    tracker = GuardedTracker("wandb", "test_trackers:Late", params, finish_timeout_s=20.0)
    tracker.start(RunInfo("r", tmp_path, {}), lambda where: None)
    for step in range(4):
        tracker.call("log_metrics", step, {"a": step + 0.5})
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "trackers" / "late").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.finish("failed")
    tracker.join(0.0)
    tracker.end(30.0)
    (records,) = wandb_records(tmp_path)
    assert [row["global_step"] for row in history(records)] == [0, 1]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]


class Late(WandbTracker):
    """Hangs at the third step."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            (Path(self._run.dir).parents[2] / "trackers" / "late").touch()
            time.sleep(3600)
        super().log_metrics(step, metrics)


def test_wandb_gets_tables_and_artifacts(ran: Ran) -> None:
    second = wandb_records(ran.tracked)[1]
    rows = history(second)
    tables = {n.partition(".")[0] for row in rows for n in row if n.startswith("traces/")}
    assert tables == {"traces/rl", "traces/rl-eval-T_1", "traces/after-T_1"}
    at = [row["global_step"] for row in rows if "traces/rl._type" in row]
    assert at == [4], "rollouts_logged_every is 2: step 2 of RL only"
    *_, file = sorted(ran.tracked.glob("wandb/*/files/media/table/traces/rl_*.json"))
    table = json.loads(file.read_text())
    assert len(table["data"]) == 3
    by_id = {rollout.id: rollout for rollout in rollouts_of(ran.tracked)[2]}
    for cells in table["data"]:
        row = dict(zip(table["columns"], cells, strict=True))
        rollout = by_id[row["id"]]
        assert row["reward"] == rollout.reward
        assert row["completion"] == rollout.completion
        assert row["prompt"].startswith("What is ")
        assert json.loads(row["reward_parts"]) == {"d": rollout.reward}
    names = {
        r.artifact.type or r.request.log_artifact.artifact.type
        for r in second
        if r.HasField("artifact") or r.request.HasField("log_artifact")
    }
    assert {"results", "curves", "checkpoint"} <= names


# TensorBoard


def test_tensorboard_purges_what_is_made_again(ran: Ran) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ran.tracked / "tensorboard"))
    events.Reload()
    found = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    for place, value in expected(ran).items():
        assert found[place] == pytest.approx(value, rel=1e-6), place
    assert [event.step for event in events.Scalars("rl/reward/mean")] == [3, 4, 5]
    *_, texts = events.Tensors("traces/rl")  # text is not purged
    assert texts.step == 4 and len(texts.tensor_proto.string_val) == 3
    assert b"What is " in texts.tensor_proto.string_val[0]
    assert b"parts: " in texts.tensor_proto.string_val[0]
    assert events.Tags()["images"] == ["curves"]
    assert b"success" in events.Tensors("results")[0].tensor_proto.string_val[0]


# trackio


def test_trackio_keeps_one_run_with_traces(ran: Ran) -> None:
    with contextlib.closing(sqlite3.connect(ran.place / "trackio" / "p.db")) as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id")
        metrics = [(run, name, step, json.loads(text)) for run, name, step, text in rows]
        traces = database.execute("select count(*) from traces").fetchone()[0]
        artifacts = {name for (name,) in database.execute("select type from artifacts")}
    assert len({row[0] for row in metrics}) == 1 and {row[1] for row in metrics} == {"n"}
    found = {(name, step): v for *_, step, values in metrics for name, v in values.items()}
    for place, value in expected(ran).items():
        assert found[place] == pytest.approx(value), place
    assert traces >= 3 + 3 * 2 + 2
    assert artifacts == {"results", "curves", "checkpoint"}


# MLflow


def mlflow_runs(place: Path) -> list[Any]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient((place / "ml").as_uri())
    experiment = client.get_experiment_by_name("x")
    return list(client.search_runs([experiment.experiment_id]))


def test_mlflow_keeps_one_run(ran: Ran) -> None:
    from mlflow.tracking import MlflowClient

    (run,) = mlflow_runs(ran.place)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "n")
    assert run.data.params["algorithm.hyperparameters.steps"] == "3"
    client = MlflowClient((ran.place / "ml").as_uri())
    history_of = functools.partial(client.get_metric_history, run.info.run_id)
    for (name, step), value in expected(ran).items():
        stored = name.replace("=", "_").replace("/", ".")
        assert {m.value for m in history_of(stored) if m.step == step} == {value}, name
    assert [m.step for m in history_of("rl.reward.mean")] == [3, 4, 3, 4, 5]
    below = ran.place / "ml" / run.info.experiment_id / run.info.run_id / "artifacts"
    kept = {str(path.relative_to(below)) for path in below.rglob("*") if path.is_file()}
    assert {"results.md", "curves.png", "checkpoint/model.safetensors"} <= kept
    table = json.loads((below / "rollouts" / "rl-000004.json").read_text())
    assert len(table["data"]) == 3 and "advantage" in table["columns"]


def test_mlflow_keeps_apart_names_that_differ_only_in_what_it_refuses(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    run = RunInfo("r", tmp_path / "r", {"a=b": 1, "a_b": 2})
    given = {"t=x+y": 1.0, "t=x-y": 2.0, "t_x_y": 3.0, "g/a.b": 4.0, "g.a/b": 5.0, "t=/../x": 6.0}
    given["n" * 300] = 7.0
    tracker = mlflow_tracker(tmp_path)
    tracker.start(run)
    tracker.log_metrics(1, given)
    again = mlflow_tracker(tmp_path)
    again.start(run)
    again.log_metrics(2, dict(reversed(given.items())))
    found = again._client.get_run(again._run_id).data
    assert sorted(found.metrics.values()) == sorted(given.values())
    assert {"t_x_y", "t_x-y", "g.a.b"} <= set(found.metrics), "the first of each keeps its own"
    assert found.metrics["t_x_y"] == 1.0 and found.metrics["g.a.b"] == 4.0, "resumed, too"
    assert sorted(found.params.values()) == ["1", "2"]


def test_a_parameter_that_mlflow_refuses_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    monkeypatch.setattr("retrain.tracking.trackers.mlflow._PARAM_CHARS", 7000)
    tracker = mlflow_tracker(tmp_path)
    tracker.start(RunInfo("r", tmp_path / "r", {"long": "x" * 6500, "seed": 3}))
    assert tracker._client.get_run(tracker._run_id).data.params == {"seed": "3"}
    assert "parameter long: " in capsys.readouterr().out


def mlflow_tracker(place: Path) -> MLflowTracker:
    return MLflowTracker(experiment="x", tracking_uri=(place / "ml").as_uri())
