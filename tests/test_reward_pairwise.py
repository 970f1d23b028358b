"""Win rates of a group: which pairs a judge compares, and what its preferences come to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

from engine_servers.chat import ChatServer
from retrain.rewards.pairwise import choose_pairs
from test_reward_judge import score, told


def prefer(better: Callable[[str, str], str]) -> Callable[[Any], str]:
    """A judge that reads its two blocks."""

    def say(messages: Any) -> str:
        lines = messages[1]["content"].splitlines()
        a, b = (
            lines[next(i for i, line in enumerate(lines) if line.startswith(f"<<< {label} ")) + 1]
            for label in "AB"
        )
        return json.dumps({"reasoning": "x", "winner": better(a, b)})

    return say


async def compare(texts: list[str], better: Callable[[str, str], str], **params: Any) -> Any:
    rollouts = [told(text, id=str(i)) for i, text in enumerate(texts)]
    with ChatServer(prefer(better)) as server:
        await score("pairwise_judge", server, *rollouts, criteria="Longer is better.", **params)
        return [r.reward_parts[0].raw for r in rollouts], len(server.bodies), rollouts


def longer(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


async def test_win_rates_of_a_group() -> None:
    rates, asked, rollouts = await compare(["a", "bbb", "cc", "dd"], longer)
    assert rates == [0.0, 1.0, 0.5, 0.5]
    assert asked == 12
    assert sum(r.metrics["judge/calls"] for r in rollouts) == 12
    assert rollouts[0].metrics["judge/calls"] == 3.0


async def test_a_liking_for_a_place_cancels_out() -> None:
    for place in "AB":
        rates, _, _ = await compare(["a", "bbb", "cc"], lambda a, b, p=place: p)
        assert rates == [0.5, 0.5, 0.5]


async def test_equal_answers_tie_unjudged_and_one_alone_is_in_the_middle() -> None:
    rates, asked, _ = await compare(["aa", "aa", "b"], longer)
    assert (rates, asked) == ([0.75, 0.75, 0.0], 4)
    rates, asked, _ = await compare(["a"], longer)
    assert (rates, asked) == ([0.5], 0)


async def test_fewer_pairs_are_chosen_by_the_groups_id() -> None:
    _, asked, _ = await compare(
        [letter * n for n, letter in enumerate("abcdefgh", 1)], longer, max_pairs=4
    )
    assert asked == 8
    assert choose_pairs(8, 4, "g") == choose_pairs(8, 4, "g") != choose_pairs(8, 4, "h")
    for size in range(2, 9):
        assert choose_pairs(size, None, "g") == list(combinations(range(size), 2))
        ends = Counter(i for pair in choose_pairs(size, size, "g") for i in pair)
        assert max(ends.values()) - min(ends.values(), default=0) <= 1
        covered = {i for pair in choose_pairs(size, (size + 1) // 2, "g") for i in pair}
        assert covered == set(range(size))


async def test_a_judge_that_fails_masks_the_group() -> None:
    rollouts = [told(text, id=text) for text in ("a", "bb")]
    with ChatServer(lambda _: '{"reasoning": "", "winner": "C"}') as server:
        await score("pairwise_judge", server, *rollouts, criteria="c", attempts=1)
    assert all("winner is C, expected A, B or tie" in str(r.error) for r in rollouts)
