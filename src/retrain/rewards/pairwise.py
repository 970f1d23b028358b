"""Built-in reward of a group: which of its answers a model prefers, two at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.judging import (
    Judge,
    JudgeScope,
    block,
    check_scope,
    schema_of,
    shown,
    task_text,
)
from retrain.types import Rollout, UserError

_POINTS = {"A": 1.0, "B": 0.0, "tie": 0.5}
"""Of the answer that was shown first."""


@reward(kind="group", range=(0.0, 1.0))
class PairwiseJudge:
    """The share of its comparisons that a rollout wins, a tie being half a win.

    Range [0, 1]; 0.5 for one that is compared with none. Each pair is judged twice, in both orders,
    so that a liking for the first or the second place cancels out. Two equal answers tie without
    being judged. At most `max_pairs` pairs of a group are compared, chosen by its id so that each
    rollout is in about as many. `criteria` says what is better; `scope` and the other params, what
    is counted and what failures come to (here the whole group is masked) are as with `llm_judge`.

    Example: `pairwise_judge: {params: {url: "http://h/v1", model: m, criteria: "Be concise."}}`

    Raises:
        UserError: parameters that cannot be, or a key that is not in its environment variable.
    """

    def __init__(
        self,
        *,
        criteria: str,
        max_pairs: int | None = None,
        scope: JudgeScope = "last",
        **asked: Any,
    ) -> None:
        self._judge = Judge("pairwise_judge", asked)
        where = self._judge.where
        check_scope(where, scope)
        if not isinstance(criteria, str) or not criteria.strip():
            raise UserError(f"{where}: criteria is {criteria!r}", "Say what is better.")
        if max_pairs is not None and (not isinstance(max_pairs, int) or max_pairs < 1):
            raise UserError(f"{where}: max_pairs is {max_pairs!r}", "Give at least 1.")
        self._told = (
            "Two answers to one task are compared, A and B. First reason briefly, then name the "
            f"winner: A, B or tie. The order means nothing.\n\nWhat counts: {criteria}"
        )
        self._schema = schema_of({"winner": {"type": "string", "enum": list(_POINTS)}})
        self._max_pairs, self._scope = max_pairs, scope

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        pairs = choose_pairs(len(rollouts), self._max_pairs, rollouts[0].group_id or "")
        texts = [shown(rollout, self._scope) for rollout in rollouts]
        compared = [(i, j) for a, b in pairs for i, j in ((a, b), (b, a)) if texts[a] != texts[b]]
        judging = (
            self._first_wins(rollouts[i], rollouts[j], texts[i], texts[j]) for i, j in compared
        )
        outcomes = await asyncio.gather(*judging, return_exceptions=True)
        points: list[list[float]] = [[] for _ in rollouts]
        for (i, j), outcome in zip(compared, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            points[i].append(outcome)
            points[j].append(1.0 - outcome)
        for a, b in pairs:
            if texts[a] == texts[b]:
                points[a] += [0.5, 0.5]
                points[b] += [0.5, 0.5]
        return [sum(own) / len(own) if own else 0.5 for own in points]

    async def close(self) -> None:
        await self._judge.close()

    async def _first_wins(self, one: Rollout, other: Rollout, first: str, second: str) -> float:
        parts = [block("TASK", task_text(one)), block("A", first), block("B", second)]
        pair = [one, other]
        return await self._judge.ask(self._told, "\n\n".join(parts), self._schema, _read, pair)


def choose_pairs(size: int, most: int | None, seed: str) -> list[tuple[int, int]]:
    """Which of `size` rollouts are compared: all pairs, or `most`, whose ends are spread evenly.

    The rollouts stand in a ring, in an order drawn by the seed: neighbours are compared first, then
    those two apart, and so on.
    """
    order = list(range(size))
    random.Random(seed).shuffle(order)
    chosen: dict[tuple[int, int], None] = {}
    for apart in range(1, size // 2 + 1):
        for start in [*range(0, size, 2), *range(1, size, 2)]:
            one, other = order[start], order[(start + apart) % size]
            chosen[min(one, other), max(one, other)] = None
    return sorted(list(chosen)[:most])


def _read(found: Mapping[str, Any]) -> float:
    winner = found.get("winner")
    if not isinstance(winner, str) or winner not in _POINTS:
        raise ValueError(f"winner is {str(winner)[:80]}, expected A, B or tie")
    return _POINTS[winner]
