"""The commands of a recipe's page, run as they stand there.

In docs/recipes/NAME.md `<!-- run: LABEL -->` stands before a block with one `retrain run` command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import retrain
from retrain.tracking.report import EvaluationResult
from retrain.tracking.run_dir import read_metrics
from retrain.types import Rollout, Source

ROOT = Path(__file__).parents[1]
_COMMAND = re.compile(r"^<!-- run: (?P<label>\w+) -->\n```bash\n(?P<text>.*?)^```$", re.M | re.S)
_MARGIN = re.compile(r"margin, fixed before the runs: \*\*(\d\.\d+)\*\*")


@dataclass(frozen=True)
class Ran:
    """What a run of a command left."""

    path: Path
    evaluations: dict[tuple[str, str], EvaluationResult]
    """By (stage, mode)."""

    @property
    def gain(self) -> float:
        """Success at T=1 on held-out tasks: after RL less before it."""
        after, before = self.evaluations["after", "T=1"], self.evaluations["before", "T=1"]
        return after.success - before.success

    def curve(self, metric: str) -> list[float]:
        """A metric over the steps of RL that have it."""
        rows = [row for row in read_metrics(self.path / "metrics.jsonl") if row["stage"] == "rl"]
        return [float(row[metric]) for row in rows if metric in row]


def page(name: str) -> str:
    return (ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")


def command(name: str, label: str) -> tuple[Path, list[str]]:
    """(config, overrides) of a page's command."""
    texts = {m["label"]: m["text"] for m in _COMMAND.finditer(page(name))}
    words = shlex.split(texts[label].replace("\\\n", " "))
    assert words[:2] == ["retrain", "run"] and set(words[3::2]) <= {"--set"}
    return ROOT / words[2], words[4::2]


def margin(name: str) -> float:
    """By how much the recipe's gain has to exceed its control's, as the page says."""
    found = _MARGIN.search(page(name))
    assert found is not None
    return float(found[1])


def run_command(name: str, label: str, directory: Path, *more: str) -> Ran:
    config, overrides = command(name, label)
    quiet = [f"output_dir={directory}", "tracking.progress=off", "tracking.plots=false"]
    result: Any = retrain.run_sync(config, overrides=[*overrides, *quiet, *more])
    return Ran(result.path, {(e.stage, e.mode): e for e in result.evaluations})


def check_gain(name: str, recipe: Ran, control: Ran) -> None:
    """What the recipe gains exceeds what its control gains by the page's margin; a control that
    gets worse counts as one that gains nothing."""
    assert control.evaluations["before", "T=1"] == recipe.evaluations["before", "T=1"]
    assert recipe.gain - max(control.gain, 0.0) >= margin(name)


def check_what_trains(rollouts: Iterable[Rollout]) -> None:
    """The policy's own turns are what was sampled; prompts and what tools say are in no turn."""
    for rollout in rollouts:
        for segment in rollout.segments:
            inside = {i for span in segment.turns for i in range(span.start, span.end)}
            assert inside == {i for i, s in enumerate(segment.source) if s == Source.SAMPLED}
            assert len(inside) < len(segment.source)
