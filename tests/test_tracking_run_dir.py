"""The run directory: names, links, atomic writes, metrics and rollout files."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retrain.tracking.run_dir import RunDirectory, read_metrics
from retrain.types import Rollout, UserError


def test_runs_are_numbered_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path, "poem")
    (tmp_path / "poem-007").mkdir()
    (tmp_path / "poem-hand-made").mkdir()
    other = RunDirectory.create(tmp_path, "poe")
    second = RunDirectory.create(tmp_path, "poem")
    assert [r.path.name for r in (first, other, second)] == ["poem-001", "poe-001", "poem-008"]
    link = tmp_path / "poem-latest"
    assert link.is_symlink() and link.resolve() == second.path.resolve()
    assert os.readlink(link) == "poem-008", "relative, so that the tree can be moved"


def test_numbering_continues_past_999(tmp_path: Path) -> None:
    (tmp_path / "a-999").mkdir()
    assert RunDirectory.create(tmp_path, "a").path.name == "a-1000"


def test_concurrent_runs_get_directories_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda _: RunDirectory.create(tmp_path, "x"), range(48)))
    assert sorted(run.path.name for run in runs) == [f"x-{n:03d}" for n in range(1, 49)]


def test_something_else_in_the_place_of_the_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x-latest").mkdir()
    run = RunDirectory.create(tmp_path, "x")
    assert run.path.is_dir() and not (tmp_path / "x-latest").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-001", "x-latest"]


def test_write_text_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_text("transcripts/a.txt", "old")
    path = run.write_text("transcripts/a.txt", "new – \ud800")
    assert path.read_text(encoding="utf-8") == "new – \\ud800"
    assert [p.name for p in (tmp_path / "transcripts").iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*config\.yaml: ") as caught:
        RunDirectory(tmp_path).write_text("config.yaml", "text")
    assert "Free space" in caught.value.next_step
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_an_output_dir_that_is_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*runs"):
        RunDirectory.create(tmp_path / "runs", "x")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        RunDirectory(tmp_path / "runs").log_metrics("rl", 0, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        RunDirectory(tmp_path).log_metrics("rl", 0, {"loss": 1.0})


def test_metrics_are_strict_json_with_null_for_what_it_cannot_hold(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log_metrics("rl", 3, {"reward/mean": 0.5, "loss": math.nan, "a": math.inf, "forks": 2})
    run.log_metrics("after", 0, {"eval/greedy/success": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == (
        '{"stage": "rl", "step": 3, "reward/mean": 0.5, "loss": null, "a": null, "forks": 2}'
    )
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_a_metric_cannot_hide_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'step'"):
        RunDirectory(tmp_path).log_metrics("rl", 3, {"step": 1.0})


def test_lines_of_two_processes_do_not_mix(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from retrain.tracking.run_dir import RunDirectory\n"
        "run = RunDirectory(Path(sys.argv[1]))\n"
        "row = {'m' * 50 + str(k): k for k in range(9)}\n"
        "for i in range(300): run.log_metrics(sys.argv[2], i, row)"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, s]) for s in ("a", "b")]
    assert [worker.wait() for worker in workers] == [0, 0]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["stage"] == "a"] == list(range(300))
    assert len(rows) == 600


def test_a_last_line_cut_by_a_crash_is_left_out_and_other_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "rl", "step": 0}\n{"stage": "r')
    assert read_metrics(path) == [{"stage": "rl", "step": 0}]
    path.write_text('{"stage": "rl"\n{"stage": "rl", "step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is not JSON"):
        read_metrics(path)
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_rollout_files_are_reproducible_and_carry_advantages(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rollouts = [Rollout(id="a", reward=1.0), Rollout(id="b")]
    path = run.write_rollouts("rl", 12, rollouts, {"a": -0.5})
    assert path == tmp_path / "rollouts" / "rl-000012.jsonl.gz"
    first = path.read_bytes()
    assert first[4:8] == bytes(4), "no time in the gzip header"
    assert run.write_rollouts("rl", 12, rollouts, {"a": -0.5}).read_bytes() == first
    records = [json.loads(line) for line in gzip.decompress(first).splitlines()]
    assert [r.get("advantage") for r in records] == [-0.5, None]
    assert "advantage" not in records[1]


def test_a_run_has_its_first_files_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        RunDirectory.create(tmp_path, "x", {"config.yaml": "seed: 1\n"})
    assert not list(tmp_path.iterdir())
    run = RunDirectory.create(tmp_path, "x", {"config.yaml": "seed: 1\n"})
    assert run.path.name == "x-001" and (run.path / "config.yaml").read_text() == "seed: 1\n"
