"""The ledger's own bookkeeping."""

from __future__ import annotations

from retrain.types import Prompt, Rollout


def test_two_thousand_forks_are_read_back() -> None:
    rollout = Rollout()
    for number in range(2_000):
        parent = number - 1 if number else None
        rollout.enter_prompt(Prompt(parent, number, [number, -1], [0, 0]))
    assert list(rollout.full_token_ids()) == [*range(2_000), -1]
