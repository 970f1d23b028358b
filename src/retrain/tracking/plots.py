"""plots/curves.png: what a run's metrics.jsonl says, at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from retrain.tracking.run_dir import METRICS_FILE, RunDirectory, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float | str | None]

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#2563a8", "#d9730d", "#2e8b57", "#c0392b", "#7b4fa3"
_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _RED)
_INK, _FAINT = "#333333", "#dddddd"
_PANEL_INCHES = (5.2, 3.4)
_SMOOTHED_SHARE = 0.06
"""Width of the moving average, as a share of the curve."""


def plot_curves(run: RunDirectory) -> Path:
    """Draw the panels that the run has data for: SFT loss, RL reward and success, the gap between
    the engine's and the learner's log-probabilities, evaluations.

    Thin lines are the values of each step, thick ones their centred moving average.

    Raises:
        UserError: metrics.jsonl is missing or damaged, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(read_metrics(run.path / METRICS_FILE))
    columns = min(max(len(panels), 1), 2)
    lines = math.ceil(max(len(panels), 1) / columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + 0.4)
    figure = Figure(figsize=size, dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(run.path.name, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _style(axes)
        draw(axes)
    if not panels:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", color=_INK)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return run.write_bytes("plots/curves.png", picture.getvalue())


def _panels(rows: Sequence[Row]) -> list[Callable[[Axes], None]]:
    rl = [row for row in rows if "reward/mean" in row]
    sft = [row for row in rows if "loss" in row and "reward/mean" not in row]
    gaps = [row for row in rl if row.get("logprob_gap/max") is not None]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    panels: list[Callable[[Axes], None]] = []
    if sft:
        panels.append(lambda axes: _draw_sft(axes, sft))
    if rl:
        panels.append(lambda axes: _draw_rl(axes, rl))
    if evaluations:
        panels.append(lambda axes: _draw_evaluations(axes, evaluations))
    if gaps:
        panels.append(lambda axes: _draw_gap(axes, gaps))
    return panels


def _draw_sft(axes: Axes, rows: Sequence[Row]) -> None:
    _title(axes, "SFT loss", "step")
    for color, (stage, own) in zip(_COLORS, _by_stage(rows).items(), strict=False):
        _curve(axes, own, "loss", color, stage)
    _legend(axes)


def _draw_rl(axes: Axes, rows: Sequence[Row]) -> None:
    _title(axes, "RL: reward and success", "step")
    stages = _by_stage(rows)
    colors = iter(_COLORS * len(stages))
    for stage, own in stages.items():
        prefix = f"{stage}: " if len(stages) > 1 else ""
        _curve(axes, own, "reward/mean", next(colors), f"{prefix}reward")
        _curve(axes, own, "success", next(colors), f"{prefix}success")
    _legend(axes)


def _draw_gap(axes: Axes, rows: Sequence[Row]) -> None:
    _title(axes, "Engine against learner: |log-probability gap|", "step")
    for key, color, label in (
        ("logprob_gap/max", _RED, "largest"),
        ("logprob_gap/mean", _BLUE, "mean"),
    ):
        steps, values = _column(rows, key)
        if any(value > 0 for value in values):
            axes.set_yscale("log", nonpositive="mask")
        axes.plot(steps, values, color=color, linewidth=1.4, label=label)
    _legend(axes)


def _draw_evaluations(axes: Axes, rows: Sequence[Row]) -> None:
    _title(axes, "Evaluation: success, 95% interval", "")
    modes = dict.fromkeys(mode for row in rows for mode in _modes(row))
    spread = 0.12 if len(rows) <= 4 else 0.0
    for index, mode in enumerate(modes):
        color = _COLORS[index % len(_COLORS)]
        shift = (index - (len(modes) - 1) / 2) * spread
        points = [(at + shift, row) for at, row in enumerate(rows) if mode in _modes(row)]
        values = [_value(row, f"eval/{mode}/success") for _, row in points]
        low = [_value(row, f"eval/{mode}/success_low") for _, row in points]
        high = [_value(row, f"eval/{mode}/success_high") for _, row in points]
        below = [max(v - b, 0.0) for v, b in zip(values, low, strict=True)]
        above = [max(b - v, 0.0) for v, b in zip(values, high, strict=True)]
        places = [at for at, _ in points]
        axes.errorbar(
            places, values, yerr=[below, above], color=color, marker="o", markersize=5,
            linewidth=1.6, elinewidth=1.0, capsize=3, label=mode,
        )  # fmt: skip
        if spread:
            for place, value, top in zip(places, values, above, strict=True):
                _annotate(axes, place, value, value + top, color)
    axes.set_xticks(range(len(rows)), _evaluation_labels(rows))
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(-0.03, 1.1)
    _legend(axes)


def _annotate(axes: Axes, place: float, value: float, top: float, color: str) -> None:
    if math.isfinite(value):
        axes.annotate(
            f"{value:.2f}", (place, top), xytext=(0, 4), textcoords="offset points",
            ha="center", va="bottom", fontsize=8, color=color,
        )  # fmt: skip


def _curve(axes: Axes, rows: Sequence[Row], key: str, color: str, label: str) -> None:
    steps, values = _column(rows, key)
    if not steps:
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, _smooth(values), color=color, linewidth=2.0, label=label, marker=marker)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of a window centred on each value, cut off at the ends."""
    radius = math.ceil(len(values) * _SMOOTHED_SHARE / 2)
    windows = [values[max(at - radius, 0) : at + radius + 1] for at in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _by_stage(rows: Sequence[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(str(row["stage"]), []).append(row)
    return stages


def _column(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric."""
    present = [row for row in rows if row.get(key) is not None]
    return [_value(row, "step") for row in present], [_value(row, key) for row in present]


def _value(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else float(value)


def _modes(row: Row) -> list[str]:
    parts = [key.split("/") for key in row]
    return [p[1] for p in parts if len(p) == 3 and p[0] == "eval" and p[2] == "success"]


def _evaluation_labels(rows: Sequence[Row]) -> list[str]:
    stages = [str(row["stage"]) for row in rows]
    return [
        stage if stages.count(stage) == 1 else f"{stage}\n{row['step']}"
        for stage, row in zip(stages, rows, strict=True)
    ]


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.tick_params(labelsize=8, colors=_INK, length=3)


def _title(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel(x_label, fontsize=9, color=_INK)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
