"""What was kept of a log, and what was not, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

from retrain.data.imports.base import FaultKind
from retrain.types import UserError

Reason = (
    FaultKind
    | Literal[
        "truncated",
        "unknown_tool",
        "min_reward",
        "duplicate",
        "no_task",
        "unscored",
        "verifier",
        "threshold",
        "unwritable",
        "too_long",
        "per_prompt",
    ]
)

MEANINGS: dict[Reason, str] = {
    "malformed": "cannot be read",
    "broken_call": "a tool call without a name or without a JSON object of arguments",
    "no_model_message": "nothing that a model said",
    "truncated": "a reply was cut by its token budget",
    "unknown_tool": "calls a tool that the student does not have",
    "min_reward": "the log's reward is below min_reward, or missing",
    "duplicate": "says the same as one before",
    "no_task": "none of `tasks` asks what it was asked",
    "unscored": "a reward or verifier failed on it",
    "verifier": "a verifier of reward_setup failed",
    "threshold": "the reward is below threshold",
    "unwritable": "the student's chat template or tool format cannot write it",
    "too_long": "does not fit the context",
    "per_prompt": "its prompt has per_prompt better ones",
}


MOST_PLACES = 9
"""Of each reason, besides the first."""


@dataclass
class Dropped:
    count: int
    place: str
    """Of the first."""
    detail: str
    """About the first."""
    more: list[str] = field(default_factory=list)
    """Places of the next few, each with what is to be said of it."""


@dataclass
class Report:
    sources: list[str]
    read: int = 0
    """Conversations, and records that could not be read."""
    calls: int = 0
    """Recorded calls that the conversations were put together from."""
    kept: int = 0
    targets: int = 0
    """Messages that train."""
    dropped: dict[Reason, Dropped] = field(default_factory=dict)

    def drop(self, reason: Reason, place: str, detail: str = "") -> None:
        found = self.dropped.get(reason)
        if found is None:
            self.dropped[reason] = Dropped(1, place, detail)
            return
        found.count += 1
        if len(found.more) < MOST_PLACES:
            found.more.append(f"{place}: {detail}" if detail else place)

    def to_json(self) -> str:
        """`distill_report.json`: reasons in the order of the filters."""
        record = asdict(self)
        record["dropped"] = {reason: asdict(found) for reason, found in self._in_order()}
        return json.dumps(record, indent=1) + "\n"

    def lines(self) -> Iterator[str]:
        """A short table."""
        yield (
            f"kept {self.kept:,} of {self.read:,} conversations ({self.calls:,} calls), "
            f"{self.targets:,} messages to train"
        )
        for reason, found in self._in_order():
            first = f"{found.place}: {found.detail}" if found.detail else found.place
            yield f"{found.count:>9,}  {reason:<16}  {MEANINGS[reason]}; first {first}"

    def require_some(self) -> None:
        """
        Raises:
            UserError: nothing was kept; it says what was dropped, and why.
        """
        if self.kept:
            return
        where = ", ".join(self.sources)
        if not self.read:
            raise UserError(f"{where}: no conversation in it", "Name a log that has some.")
        raise UserError(
            f"{where}: none of {self.read:,} conversations is left to train on\n"
            + "\n".join(list(self.lines())[1:]),
            "Loosen the filter that dropped the most, or log more.",
        )

    def _in_order(self) -> Iterator[tuple[Reason, Dropped]]:
        for reason in MEANINGS:
            if reason in self.dropped:
                yield reason, self.dropped[reason]
