"""Checkpoints that are damaged, full disks, other configs: what the user sees, and what goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retrain
from killing import left_behind
from retrain.config import load_config
from retrain.loops.check import check
from retrain.loops.resume import Change, differences
from retrain.loops.run import RunResult
from retrain.tracking import durable
from retrain.tracking.checkpoints import Checkpoints, read_checkpoint
from retrain.tracking.run_dir import RunDirectory, read_metrics
from retrain.types import UserError
from runs import hyperparameters, model_section, rl_config, sft_section

STEPS = 4


def config(output_dir: Path, **sections: Any) -> dict[str, Any]:
    hyper = hyperparameters(steps=STEPS)
    return rl_config(
        output_dir,
        algorithm={"hyperparameters": hyper},
        environment={"type": "qa"},
        checkpoint={"every_steps": 1, "keep_last": 3},
        **sections,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return retrain.run_sync(config(tmp_path_factory.mktemp("whole"))).path


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """That run as it was after its third step: as a kill would have left it."""
    shutil.copytree(whole, tmp_path / "t-001")
    run = RunDirectory(tmp_path / "t-001")
    shutil.rmtree(run.path / "checkpoints" / "rl")
    run.describe(status="running")
    return run.path


def resume(begun: Path, **sections: Any) -> RunResult:
    return retrain.run_sync(config(begun.parent, **sections), resume="latest")


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "torn weights": (
        lambda path: os.truncate(path / "model.safetensors", 1000),
        "rl-000003: model.safetensors has 1000 bytes, not",
    ),
    "a flipped bit": (
        lambda path: flip(path / "model.safetensors"),
        "rl-000003: model.safetensors has another checksum",
    ),
    "another optimizer": (
        lambda path: flip(path / "resume" / "tensors.safetensors"),
        "rl-000003: resume/tensors.safetensors has another checksum",
    ),
    "no optimizer": (
        lambda path: (path / "resume" / "tensors.safetensors").unlink(),
        "rl-000003: resume/tensors.safetensors: No such file",
    ),
    "a torn manifest": (
        lambda path: os.truncate(path / "manifest.json", 100),
        "rl-000003: manifest.json cannot be read",
    ),
    "no manifest": (
        lambda path: (path / "manifest.json").unlink(),
        "rl-000003 has no manifest.json",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(
    damage: str, begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, message = DAMAGES[damage]
    act(begun / "checkpoints" / "rl-000003")
    resume(begun)
    said = capsys.readouterr().out
    assert f"damaged, so not used: {message}" in said
    assert f"resuming rl after step 2, from {begun}/checkpoints/rl-000002" in said
    assert left_behind(begun) == left_behind(whole)
    assert Checkpoints(begun / "checkpoints").newest_good()[1] == []


def test_when_all_are_damaged_nothing_is_touched(begun: Path) -> None:
    for path in (begun / "checkpoints").iterdir():
        flip(path / "config.json")
    before = left_behind(begun)
    for which in ("latest", "auto"):
        with pytest.raises(UserError) as error:
            retrain.run_sync(config(begun.parent), resume=which)
        assert str(error.value).count("config.json has another checksum") == 3
        assert "Put one back as it was" in str(error.value)
    assert left_behind(begun) == before


def test_a_run_without_a_checkpoint_begins_again(
    begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(begun / "checkpoints")
    resume(begun)
    assert "resuming: there is no checkpoint, so from the start" in capsys.readouterr().out
    assert left_behind(begun) == left_behind(whole)


def test_leftovers_of_a_kill_are_swept_away(begun: Path) -> None:
    for name in (".rl.123.part", ".rl-000001.gone"):
        (begun / "checkpoints" / name).mkdir()
    resume(begun)
    assert not list((begun / "checkpoints").glob(".*"))


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """The third checkpoint finds the disk full; with space again, the run ends as any other."""
    real, written = durable.write, []

    def write(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(durable, "write", write)
        retrain.run_sync(config(tmp_path))
    run = tmp_path / "t-001"
    assert str(error.value) == (
        f"cannot write {run}/checkpoints/rl-000003: No space left on device\n"
        "  Free space, fix the permissions, or choose another output_dir. The one before, "
        f"{run}/checkpoints/rl-000002, is whole: go on from it with --resume."
    )
    assert not list((run / "checkpoints").glob(".*"))
    assert RunDirectory(run).about()["status"] == "failed"
    assert resume(run).path == run
    assert left_behind(run) == left_behind(whole)


def test_a_config_that_may_not_change_is_refused_key_by_key(begun: Path) -> None:
    before = (begun / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        resume(begun, seed=3, model={**config(begun)["model"], "torch_dtype": "bfloat16"})
    assert str(error.value) == (
        f"{begun} was begun with another config:\n"
        "  seed: 0 in the run, 3 now\n"
        "  model.torch_dtype: 'float32' in the run, 'bfloat16' now\n"
        "  Give the config, and the --set, of the run; or start a new run without --resume."
    )
    assert (begun / "metrics.jsonl").read_bytes() == before


def test_what_may_change_is_listed(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume(begun, engine={"max_slots": 24}, logging_level="error")
    said = capsys.readouterr().out
    assert "changed: logging_level: 'warning' in the run, 'error' now\n" in said
    assert "changed: engine.max_slots: 128 in the run, 24 now\n" in said
    assert "not bit for bit what it would have been: engine.max_slots\n" in said


def test_other_circumstances_are_told_of(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory(begun).describe(torch="1.0", deterministic=True)
    resume(begun)
    expected = f"not bit for bit what it would have been: torch was 1.0, is {torch.__version__}\n"
    assert expected in capsys.readouterr().out


def test_differences_by_hand() -> None:
    before = {"a": 1, "b": {"c": [1, {"d": 2}], "e": None}, "gone": 0}
    now = {"a": 1, "b": {"c": [1, {"d": 3}], "e": []}, "new": 0}
    assert list(differences(before, now)) == [
        Change("b.c.1.d", 2, 3),
        Change("b.e", None, []),
        Change("gone", 0, "(nothing)"),
        Change("new", "(nothing)", 0),
    ]


def test_which_run_is_resumed(begun: Path, whole: Path) -> None:
    changed = config(begun.parent)
    with pytest.raises(UserError, match="there is no run of other in"):
        retrain.run_sync({**changed, "experiment_name": "other"}, resume="latest")
    with pytest.raises(UserError, match=r"there is no run directory, with a config\.yaml"):
        retrain.run_sync(changed, resume=begun.parent)
    assert resume(begun).path == begun
    with pytest.raises(UserError, match="t-001 is complete: there is nothing to resume"):
        resume(begun)
    assert retrain.run_sync(changed, resume="auto").path.name == "t-002"


def test_a_run_has_one_writer(begun: Path) -> None:
    with RunDirectory(begun).locked(), pytest.raises(UserError, match="another process is writing"):
        resume(begun)


def test_the_stages_of_one_kind_are_resumed_by_the_same_command(tmp_path: Path) -> None:
    changed = config(tmp_path, sft=sft_section(steps=2))
    run = retrain.run_sync(changed, only="sft").path
    RunDirectory(run).describe(status="running")
    with pytest.raises(UserError, match="was begun with the stages sft only"):
        retrain.run_sync(changed, resume="latest")


def test_metrics_that_are_missing_are_an_error(begun: Path) -> None:
    path = begun / "metrics.jsonl"
    os.truncate(path, 10)
    with pytest.raises(UserError, match=r"metrics\.jsonl has 10 bytes; at the checkpoint it had"):
        resume(begun)


def test_a_line_that_a_crash_tore_is_written_again(begun: Path, whole: Path) -> None:
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    resume(begun)
    rows = [(row["stage"], row["step"]) for row in read_metrics(begun / "metrics.jsonl")]
    assert rows == [("rl", step) for step in range(1, STEPS + 1)]


def test_the_best_are_kept(tmp_path: Path) -> None:
    for mode, pick in (("max", max), ("min", min)):
        best = {"metric": "reward/mean", "mode": mode, "count": 2}
        changed = config(tmp_path / mode)
        changed["checkpoint"] = {"every_steps": 1, "keep_last": 1, "keep_best": best}
        run = retrain.run_sync(changed).path
        rewards = {row["step"]: row["reward/mean"] for row in read_metrics(run / "metrics.jsonl")}
        during = {step: rewards[step] for step in range(1, STEPS)}
        first = pick(during, key=lambda step: during[step])
        kept = {path.name for path in (run / "checkpoints").iterdir()}
        assert f"rl-{first:06d}" in kept and f"rl-{STEPS - 1:06d}" in kept and "rl" in kept
        about = read_checkpoint(run / "checkpoints" / f"rl-{first:06d}").about
        assert about["value"] == pytest.approx(rewards[first])
        assert len(kept) in (3, 4)


def test_a_metric_that_there_is_not_rates_nothing(tmp_path: Path) -> None:
    changed = config(tmp_path)
    changed["checkpoint"] = {"every_steps": 1, "keep_best": {"metric": "reward/maen"}}
    with pytest.raises(
        UserError, match=r"no step of rl has a metric reward/maen\n  Did you mean rew"
    ):
        retrain.run_sync(changed)
    changed["checkpoint"]["keep_best"]["metric"] = "reward/mean"
    assert retrain.run_sync(changed, resume="latest").path == tmp_path / "t-001"
    changed["checkpoint"]["keep_best"]["metric"] = "eval/greedy/success"
    with pytest.raises(UserError, match=r"eval/greedy/success: no evaluation during stage rl"):
        load_config(changed)


def test_a_manifest_tells_every_file(whole: Path) -> None:
    path = whole / "checkpoints" / "rl"
    manifest = json.loads((path / "manifest.json").read_text())
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert len({p.stat().st_mode for p in path.rglob("*") if p.is_file()}) == 1
    size, digest = manifest["files"]["config.json"]
    assert size == (path / "config.json").stat().st_size and len(digest) == 64


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "bit for bit, if tools, .* and the model lets the engine be deterministic"),
        ({"engine": {"deterministic": True}}, "bit for bit, if tools, .* give the same again$"),
        (
            {"engine": {"deterministic": False}},
            "goes on, but not bit for bit: engine.deterministic is false$",
        ),
        (
            {"model": {**model_section(), "torch_dtype": "bfloat16"}},
            "goes on, but not bit for bit: model.torch_dtype is bfloat16$",
        ),
    ],
)
def test_check_says_whether_a_run_resumes_to_the_bit(
    sections: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    said = check(load_config(config(tmp_path) | sections)).splitlines()
    assert re.match(f"resuming: {expected}", said[-1])


def test_an_engine_that_must_be_deterministic_and_cannot_is_refused(tmp_path: Path) -> None:
    recurrent = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 1}
    model = model_section() | {"torch_dtype": "float32"}
    model["from_scratch"] = {**model["from_scratch"], "model_type": "mamba", "config": recurrent}
    changed = config(tmp_path) | {"model": model, "engine": {"context_limit": 64}}
    changed["engine"]["deterministic"] = True
    with pytest.raises(UserError, match=r"engine\.deterministic: MambaForCausalLM .* recomputes"):
        retrain.run_sync(changed)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_deterministic_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recurrent = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 1}
    model = model_section()
    model["from_scratch"] = {**model["from_scratch"], "model_type": "mamba", "config": recurrent}
    changed = config(tmp_path) | {"model": model, "engine": {"context_limit": 64}}
    changed["algorithm"] = {"hyperparameters": hyperparameters(steps=1)}
    changed["checkpoint"] = {}
    run = retrain.run_sync(changed).path
    assert "the engine is not deterministic here" in capsys.readouterr().out
    assert RunDirectory(run).about()["deterministic"] is False


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_checkpoint_of_the_same_name_is_replaced_and_never_lost(
    failing: int, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At either rename the disk is full, or the process dies before it can clean up."""
    about = {"stage": "rl", "step": 1, "finished": False, "metric": None, "value": None}
    real, renamed = durable.rename, []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write("rl", about, lambda path: durable.write(path / "x", b"old"))

    def rename(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) == failing:
            raise fault
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt)):
        patch.setattr(durable, "rename", rename)
        patch.setattr(Checkpoints, "sweep", lambda self: None)
        checkpoints.write("rl", about, lambda path: durable.write(path / "x", b"new"))
    checkpoints.sweep()
    good, problems = checkpoints.newest_good()
    assert good is not None and not problems
    assert (good.path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["rl"]
    checkpoints.write("rl", about, lambda path: durable.write(path / "x", b"new"))
    assert (tmp_path / "rl" / "x").read_text() == "new"


def test_values_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    rated = [("loss", 5.0), ("loss", 6.0), ("reward", 0.9), ("reward", 0.2), ("reward", 0.1)]
    for step, (metric, value) in enumerate(rated):
        about = {"stage": "rl", "step": step, "finished": False, "metric": metric, "value": value}
        checkpoints.write(f"rl-{step}", about, lambda path: None)
    checkpoints.drop_old("rl", keep_last=1, keep_best=1, metric="reward", highest=True)
    assert [checkpoint.path.name for checkpoint in checkpoints.all()] == ["rl-2", "rl-4"]


def test_fewer_steps_than_are_done_are_refused_and_as_many_end_the_stage(begun: Path) -> None:
    changed = config(begun.parent)
    changed["algorithm"]["hyperparameters"]["steps"] = 2
    with pytest.raises(UserError, match="rl is to have 2 steps now, and has made 3"):
        retrain.run_sync(changed, resume="latest")
    changed["algorithm"]["hyperparameters"]["steps"] = 3
    result = retrain.run_sync(changed, resume="latest")
    assert result.checkpoint == begun / "checkpoints" / "rl"
    rows = read_metrics(begun / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
