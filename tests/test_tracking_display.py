"""What a user sees: progress lines, the live display, the picture of the curves."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from retrain.tracking.plots import _panels, _smooth, plot_curves
from retrain.tracking.progress import Progress, summary
from retrain.tracking.run_dir import RunDirectory, read_metrics
from retrain.types import UserError


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_stages(progress: Progress) -> None:
    with progress:
        progress.stage("sft", total=3, kind="sft")
        for step in range(1, 4):
            progress.update(step, {"loss": 2.0 / step, "tokens_per_s": 9400.0})
        progress.line("[note] kept as it is")
        progress.stage("second", total=70, kind="rl")
        for step in range(1, 71):
            progress.update(step, {"reward/mean": step / 100, "success": 0.5, "loss": 0.1})


def test_outside_a_terminal_a_stage_is_a_few_plain_lines() -> None:
    console = plain_console()
    run_stages(Progress(console=console))
    lines = printed(console).splitlines()
    assert lines[0] == "sft: 3 steps"
    assert lines[1] == "sft: 1/3  loss 2.000  9.4k tokens/s  0 s left"
    assert lines[3] == "[note] kept as it is"
    assert re.fullmatch(r"sft: done, 3 steps in \d+\.\d s  loss 0\.667  9\.4k tokens/s", lines[4])
    assert lines[5] == "second (rl): 70 steps"
    assert lines[6].startswith("second: 9/70  reward 0.09  success 0.50  ")
    assert lines[-1].startswith("second: done, 70 steps")
    assert len(lines[5:]) <= 10
    assert "\x1b" not in printed(console)


def test_a_stage_that_goes_on_counts_the_time_of_its_own_steps() -> None:
    console = plain_console()
    with Progress(console=console) as progress:
        progress.stage("sft", total=12, kind="sft", done=7)
        progress._started -= 5.0
        for step in range(8, 13):
            progress.update(step, {"loss": 1.0})
    lines = printed(console).splitlines()
    assert lines[0] == "sft: 12 steps, 7 of them done"
    assert lines[1] == "sft: 8/12  loss 1.000  20 s left"  # 5 s for one step
    assert re.fullmatch(r"sft: done, 5 steps in 5\.\d s  loss 1\.000", lines[-1])


def test_off_prints_only_what_it_is_told_to() -> None:
    console = plain_console()
    run_stages(Progress("off", console=console))
    assert printed(console) == "[note] kept as it is\n"


def test_a_terminal_gets_a_live_display() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    run_stages(Progress("auto", console=console))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(console))
    assert "70/70" in shown and "reward 0.70  success 0.50" in shown
    assert "3/3" in shown and "[note] kept as it is" in shown
    assert "done, 70 steps" not in shown


def test_an_error_ends_the_stage_as_stopped() -> None:
    console = plain_console()
    with pytest.raises(RuntimeError, match="boom"), Progress(console=console) as progress:
        progress.stage("rl", total=9, kind="rl")
        progress.update(4, {})
        raise RuntimeError("boom")
    assert printed(console).splitlines()[-1].startswith("rl: stopped, 4 steps in")


def test_an_update_without_a_stage_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs a stage"):
        Progress("off").update(1, {})


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"reward/mean": 0.625, "loss": 0.1}, "reward 0.62"),
        ({"eval/T=1/success": 0.31, "eval/T=1/form=a/success": 0.5}, "T=1 0.31"),
        ({"tokens_per_s/generate": 39_200.0}, "39k tokens/s"),
        ({"tokens_per_s": 850.0}, "850 tokens/s"),
        ({"tokens_per_s": math.inf}, ""),
    ],
)
def test_summary(metrics: dict[str, float], shown: str) -> None:
    assert summary(metrics) == shown


def test_smoothing_is_a_centred_mean() -> None:
    assert _smooth([1.0]) == [1.0]
    assert _smooth([0.0, 3.0, 6.0, 0.0]) == [1.5, 3.0, 3.0, 3.0]


def log_evaluation(run: RunDirectory, stage: str, step: int, share: float) -> None:
    name = "eval/T=1/success"
    metrics = {name: share, f"{name}_low": share - 0.05, f"{name}_high": share + 0.05}
    run.log_metrics(stage, step, {**metrics, "eval/T=1/form=a/success": 0.1})


def panel_titles(run: RunDirectory) -> list[str]:
    from matplotlib.figure import Figure

    titles = []
    for draw in _panels(read_metrics(run.path / "metrics.jsonl")):
        axes = Figure().add_subplot()
        draw(axes)
        titles.append(axes.get_title(loc="left").split(":")[0])
    return titles


def test_a_whole_run_has_four_panels(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    for step in range(1, 30):
        run.log_metrics("sft", step, {"loss": 3 / step})
    log_evaluation(run, "before", 0, 0.3)
    for step in range(1, 20):
        gap = {"logprob_gap/max": 1e-5, "logprob_gap/mean": 1e-6}
        run.log_metrics("rl", step, {"reward/mean": step / 20, "success": 0.5, **gap})
    log_evaluation(run, "after", 0, 0.9)
    path = plot_curves(run)
    assert path == run.path / "plots" / "curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert panel_titles(run) == ["SFT loss", "RL", "Evaluation", "Engine against learner"]


def test_a_run_with_some_of_it_has_only_those_panels(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log_metrics("rl", 1, {"reward/mean": math.nan, "loss": 0.0, "logprob_gap/max": 0.0})
    assert panel_titles(run) == ["RL", "Engine against learner"]
    assert plot_curves(run).stat().st_size > 5000


def test_evaluations_show_their_values_and_intervals(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = RunDirectory(tmp_path)
    log_evaluation(run, "before", 0, 0.3)
    log_evaluation(run, "rl", 10, 0.6)
    log_evaluation(run, "rl", 20, 0.9)
    (draw,) = _panels(read_metrics(tmp_path / "metrics.jsonl"))
    axes = Figure().add_subplot()
    draw(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "rl\n10", "rl\n20"]
    assert [text.get_text() for text in axes.texts] == ["0.30", "0.60", "0.90"]
    (container,) = axes.containers
    assert list(container.lines[0].get_ydata()) == [0.3, 0.6, 0.9]


def test_a_run_without_metrics_is_the_users_error_or_an_empty_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        plot_curves(RunDirectory(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_curves(RunDirectory(tmp_path)).exists()
