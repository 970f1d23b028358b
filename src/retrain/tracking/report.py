"""What an evaluation found, as a table; what a rollout said, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrain.types import Message, MessageType, RewardPart, Rollout

_Z95 = 1.959963984540054
_NOTHING = "–"


@dataclass(frozen=True)
class EvaluationResult:
    """One mode of one evaluation stage."""

    stage: str
    mode: str
    n: int
    """Rollouts that count: the masked ones and those of excluded groups are left out."""
    successes: int
    reward_mean: float
    by_group: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Value of `group_by` → (n, successes), excluded groups included."""
    excluded: tuple[str, ...] = ()
    """Groups that are reported on their own but left out of the total."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        by_group = {value: (n, good) for value, (n, good) in record["by_group"].items()}
        return cls(**{**record, "by_group": by_group, "excluded": tuple(record["excluded"])})

    @property
    def success(self) -> float:
        """Share of rollouts that succeeded; NaN where there was none."""
        return self.successes / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.n)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson, 1927); (0, 1) when nothing was counted."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def results_table(results: Sequence[EvaluationResult]) -> str:
    """Success by mode and group, a column per evaluation stage, as Markdown.

    A cell is `0.31 [0.27, 0.35]`: the share and its 95% Wilson interval. Mean rewards get a row
    where they differ from the share of successes.
    """
    header, rows = _rows(results)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_escape(cell) for cell in line)} |\n" for line in lines)


def print_results(results: Sequence[EvaluationResult]) -> None:
    """The same table for the terminal, on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, rows = _rows(results)
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def transcript(rollout: Rollout) -> str:
    """A rollout as text: who said what, which tools were called, where the reward came from."""
    lines = [f"rollout {rollout.id}"]
    if rollout.task is not None:
        lines[0] += f", task {rollout.task.id}"
        if rollout.task.answer is not None:
            lines.append(f"expected answer: {rollout.task.answer}")
    turn = 0
    for message in rollout.messages:
        title = _speaker(message)
        if message.type is MessageType.MODEL:
            title += f", turn {turn}"
            turn += 1
        lines += ["", f"── {title}"]
        if message.reasoning is not None:
            lines.append(f"(reasoning) {message.reasoning}")
        if message.content:
            lines.append(message.content)
        for call in message.tool_calls:
            arguments = ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
            problem = "" if call.error is None else f"   ! {call.error}"
            lines.append(f"→ {call.name}({arguments}){problem}")
    lines += ["", f"stopped: {rollout.stop_reason or 'not yet'}"]
    if rollout.error is not None:
        lines.append(f"masked, not scored: {rollout.error}")
    lines.append(f"reward: {rollout.reward:g}")
    lines += [f"  {_part_line(part)}" for part in rollout.reward_parts]
    return "\n".join(lines) + "\n"


def _speaker(message: Message) -> str:
    names = [message.type.value]
    names += [n for n in (message.role, message.name) if n is not None and n not in names]
    return ", ".join(names)


def _part_line(part: RewardPart) -> str:
    line = f"{part.value:+g}  {part.name} ({part.kind}"
    if part.turn is not None:
        line += f", turn {part.turn}"
    line += f"): raw {part.raw:g}, weight {part.weight:g}"
    if part.verifier is not None:
        line += f"; verifier {part.verifier} failed"
    if part.error is not None:
        line += f"; {part.error}"
    return line


def _rows(results: Sequence[EvaluationResult]) -> tuple[list[str], list[list[str]]]:
    stages = list(dict.fromkeys(result.stage for result in results))
    rows: list[list[str]] = []
    for mode in dict.fromkeys(result.mode for result in results):
        by_stage = {result.stage: result for result in results if result.mode == mode}
        shares = {s: (_share(r.successes, r.n), r.n) for s, r in by_stage.items()}
        rows.append(_row(mode, stages, shares))
        if any(abs(r.reward_mean - r.success) > 0.005 for r in by_stage.values()):
            means = {s: (f"{r.reward_mean:.3g}", r.n) for s, r in by_stage.items()}
            rows.append(_row(f"{mode}, mean reward", stages, means))
        excluded = {group for result in by_stage.values() for group in result.excluded}
        for group in dict.fromkeys(g for result in by_stage.values() for g in result.by_group):
            counts = {s: r.by_group[group] for s, r in by_stage.items() if group in r.by_group}
            shares = {s: (_share(successes, n), n) for s, (n, successes) in counts.items()}
            note = " (not in the total)" if group in excluded else ""
            rows.append(_row(f"{mode}, {group}{note}", stages, shares))
    return ["success", *stages, "n"], rows


def _row(label: str, stages: Sequence[str], cells: Mapping[str, tuple[str, int]]) -> list[str]:
    """Label, one text per stage, and the number of rollouts, once where all stages agree."""
    texts = [cells[stage][0] if stage in cells else _NOTHING for stage in stages]
    counts = dict.fromkeys(str(n) for _, n in cells.values())
    return [label, *texts, " / ".join(counts)]


def _share(successes: int, n: int) -> str:
    if n == 0:
        return _NOTHING
    low, high = wilson(successes, n)
    return f"{successes / n:.2f} [{low:.2f}, {high:.2f}]"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
