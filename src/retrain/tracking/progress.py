"""What a user sees while a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Mode = Literal["auto", "on", "off"]
StageKind = Literal["sft", "rl", "distill", "eval"]

_PLAIN_LINES = 8
"""Most lines of one stage outside a terminal, besides its first and its last."""


class Progress:
    """A live display on a terminal; elsewhere a few plain lines per stage.

    `auto` is live where standard output is a terminal, `on` always, `off` prints what `line` is
    given and nothing else. `console` is where it prints; by default, standard output.
    """

    def __init__(self, mode: Mode = "auto", *, console: Console | None = None) -> None:
        from rich.console import Console

        if console is None:
            console = Console(force_terminal=True if mode == "on" else None, highlight=False)
        self._console = console
        self._quiet = mode == "off"
        self._live = mode == "on" or (mode == "auto" and console.is_terminal)
        self._bars: Bars | None = None
        self._bar: TaskID | None = None
        self._stage: str | None = None
        self._total = self._step = self._begun = 0
        self._every = 1
        self._started = 0.0
        self._shown = ""

    def __enter__(self) -> Self:
        if self._live:
            self._bars = _bars(self._console)
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_stage(finished=kind is None)
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stage(self, name: str, *, total: int, kind: StageKind, done: int = 0) -> None:
        """Begin a stage of `total` steps, or go on with it after `done`; the one before it ends."""
        self._end_stage()
        self._stage, self._total, self._step, self._shown = name, total, done, ""
        self._begun = done
        self._every = max(1, math.ceil(total / _PLAIN_LINES))
        self._started = time.monotonic()
        title = name if name == kind else f"{name} ({kind})"
        if self._bars is not None:
            self._bar = self._bars.add_task(title, total=total, completed=done, shown="")
        elif not self._quiet:
            self._print(f"{title}: {total} steps" + (f", {done} of them done" if done else ""))

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps of the stage are done; `metrics` are those that metrics.jsonl gets.

        Raises:
            RuntimeError: no stage has begun.
        """
        if self._stage is None:
            raise RuntimeError("Progress.update needs a stage")
        self._step = step
        self._shown = summary(metrics) or self._shown
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=step, shown=self._shown)
        elif not self._quiet and step % self._every == 0 and step < self._total:
            made = max(step - self._begun, 1)
            left = (time.monotonic() - self._started) / made * (self._total - step)
            self._print(f"{self._stage}: {step}/{self._total}  {self._shown}  {left:.0f} s left")

    def line(self, text: str) -> None:
        """Print text above the display, in every mode."""
        self._print(text)

    def _end_stage(self, finished: bool = True) -> None:
        if self._stage is None:
            return
        seconds = time.monotonic() - self._started
        verb = "done" if finished else "stopped"
        if self._bars is None and not self._quiet:
            shown = f"  {self._shown}" if self._shown else ""
            made = self._step - self._begun
            self._print(f"{self._stage}: {verb}, {made} steps in {seconds:.1f} s{shown}")
        elif self._bars is not None and self._bar is not None:
            self._bars.stop_task(self._bar)
        self._stage = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def summary(metrics: Mapping[str, float]) -> str:
    """The few metrics worth a glance: `reward 0.62  success 0.58  39k tokens/s`."""
    parts: list[str] = []
    if "reward/mean" in metrics:
        parts.append(f"reward {metrics['reward/mean']:.2f}")
    elif "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if "success" in metrics:
        parts.append(f"success {metrics['success']:.2f}")
    for key, value in metrics.items():
        names = key.split("/")
        if len(names) == 3 and names[0] == "eval" and names[2] == "success":
            parts.append(f"{names[1]} {value:.2f}")
    speed = metrics.get("tokens_per_s/generate", metrics.get("tokens_per_s"))
    if speed is not None and math.isfinite(speed):
        parts.append(f"{_thousands(speed)} tokens/s")
    return "  ".join(parts)


def _thousands(value: float) -> str:
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 10_000 else f"{value / 1000:.0f}k"


def _bars(console: Console) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )
