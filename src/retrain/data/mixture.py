"""Several sources as one, interleaved by weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from retrain.data.cursor import Position
from retrain.data.order import Succeeded, TaskCursor, TaskSource
from retrain.types import Rollout, Task


class Turns:
    """Whose turn it is, so that each has had close to its share at any time.

    Smooth weighted round robin: each gains its weight, the one that has most goes and pays what
    all have gained. With weights 3 and 1 the order is a a b a, again and again.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.credit = dict.fromkeys(names, 0.0)

    def next(self, weights: Mapping[str, float]) -> str:
        """Who goes next; nothing changes. Of equals it is the first."""
        return max(self.credit, key=lambda name: self.credit[name] + weights[name])

    def take(self, name: str, weights: Mapping[str, float]) -> None:
        """It was the turn of `name`."""
        for other in self.credit:
            self.credit[other] += weights[other]
        self.credit[name] -= sum(weights.values())


@dataclass(frozen=True)
class Part:
    source: TaskSource
    weight: float


class MixtureSource:
    """Parts by name. The ids of their tasks open with it, and it is their metadata `source`."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)

    def epoch(self, n: int) -> Iterator[Task]:
        """Each task of epoch n of each part, part after part."""
        return chain.from_iterable(part.source.epoch(n) for part in self._parts.values())

    def __len__(self) -> int:
        return sum(len(part.source) for part in self._parts.values())

    def known(self) -> Iterator[Task]:
        return chain.from_iterable(part.source.known() for part in self._parts.values())

    def cursor(self, place: str) -> MixtureCursor:
        return MixtureCursor(
            {n: part.source.cursor(f"{place}: source {n}") for n, part in self._parts.items()},
            {name: part.weight for name, part in self._parts.items()},
        )

    def summary(self) -> str:
        total = sum(part.weight for part in self._parts.values())
        lines = [f"a mixture of {len(self._parts)} sources"]
        for name, part in self._parts.items():
            first, *rest = part.source.summary().splitlines()
            lines += [f"{name}, {part.weight / total:.0%} of the tasks drawn: {first}"]
            lines += [f"  {line}" for line in rest]
        return "\n".join(lines)


class MixtureCursor:
    """Draws from the cursors of the parts. Epochs are those of the parts: a part that is at its end
    begins again, and the others do not wait for it."""

    def __init__(self, parts: Mapping[str, TaskCursor], weights: Mapping[str, float]) -> None:
        self._parts = dict(parts)
        self._weights = dict(weights)
        self._turns = Turns(parts)
        self._rewards: dict[str, list[float]] = {}
        """Of the last step that was observed, by part."""

    def __iter__(self) -> MixtureCursor:
        return self

    def __next__(self) -> tuple[int, Task]:
        """
        Raises:
            UserError: what the part raises whose turn it is; another call tries it again.
        """
        name = self._turns.next(self._weights)
        drawn = next(self._parts[name])
        self._turns.take(name, self._weights)
        return drawn

    def position(self) -> dict[str, Any]:
        return self.rewound(self.mark())

    def mark(self) -> dict[str, Any]:
        sources = {name: part.mark() for name, part in self._parts.items()}
        return {"credit": dict(self._turns.credit), "sources": sources}

    def rewound(self, mark: Mapping[str, Any]) -> dict[str, Any]:
        earlier = mark["sources"]
        sources = {name: part.rewound(earlier[name]) for name, part in self._parts.items()}
        return {"credit": dict(mark["credit"]), "sources": sources}

    def restore(self, position: Position) -> None:
        for name, part in self._parts.items():
            part.restore(position["sources"][name])
        self._turns.credit = {name: position["credit"][name] for name in self._parts}

    def observe(self, rollouts: Sequence[Rollout], succeeded: Succeeded) -> None:
        self._rewards = {}
        for name, part in self._parts.items():
            own = [r for r in rollouts if r.task and r.task.id.startswith(f"{name}:")]
            part.observe(own, succeeded)
            self._rewards[name] = [r.reward for r in own if r.error is None and r.trainable]

    def metrics(self, source: str = "") -> dict[str, float]:
        """Of each part its share of the last step's rollouts that were scored, their mean reward
        where it has any, and what its own order depends on."""
        metrics: dict[str, float] = {}
        total = sum(map(len, self._rewards.values()))
        for name, part in self._parts.items():
            rewards = self._rewards.get(name, [])
            if total:
                metrics[f"mixture/{name}/share"] = len(rewards) / total
            if rewards:
                metrics[f"mixture/{name}/reward"] = sum(rewards) / len(rewards)
            metrics |= part.metrics(name)
        return metrics
