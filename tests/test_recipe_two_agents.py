"""The recipe of two agents: its protocol, its rewards, and what it gains over its control."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from recipe_pages import check_gain, run_command
from retrain.config import load_config
from retrain.recipes.two_agents.sorting import (
    SOLVED,
    VALID,
    ProposeAndSolve,
    frontier,
    in_order,
    is_list,
    lists,
    solved,
    traces,
)
from retrain.types import Message, MessageType, Rollout
from scripted import plain_renderer
from test_agents import END, played, role


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("7 2", True),
        ("2 7", False),  # in order already
        ("7 2 5 1 0 9 9 3", True),
        ("7 2 5 1 0 9 9 3 3", False),  # too long
        ("7 3", False),  # lacks the 2
        ("72", False),
        ("7  2", False),
        ("7 2 x", False),
        ("7 2 ٣", False),  # a digit of another script
        ("", False),
    ],
)
def test_what_a_list_is(text: str, good: bool) -> None:
    assert is_list(text, ["7", "2"]) is good


def test_a_proposal_is_worth_most_where_half_of_the_attempts_solve_it() -> None:
    renderer = plain_renderer("chatml")
    roles = (role("proposer", renderer), role("solver", renderer, sees_task=False))
    asked = (Message("7 2", MessageType.MESSAGE),)
    answers = ["2 5 7", "7 5 2", " 2 5 7 ", "2 5"]
    rollouts, _ = played(
        renderer, [f"5 7 2{END}", *(f"{a}{END}" for a in answers)], *roles,
        world=ProposeAndSolve, prompt=asked,
    )  # fmt: skip
    proposer, *solvers = rollouts
    assert (proposer.metrics[VALID], proposer.metrics[SOLVED]) == (1.0, 0.5)
    assert frontier(proposer) == 1.0
    assert [solved(rollout) for rollout in solvers] == [1.0, 0.0, 1.0, 0.0]
    (alone,), _ = played(renderer, [f"2 7{END}"], *roles, world=ProposeAndSolve, prompt=asked)
    assert (alone.agent, alone.metrics[VALID], frontier(alone)) == ("proposer", 0.0, 0.0)
    for share, worth in ((0.0, 0.2), (0.25, 0.8), (1.0, 0.2)):
        assert frontier(Rollout(metrics={VALID: 1.0, SOLVED: share})) == pytest.approx(worth)


def test_the_solver_is_evaluated_on_lists_that_nobody_proposed() -> None:
    renderer = plain_renderer("chatml")
    roles = (role("proposer", renderer), role("solver", renderer, sees_task=False))
    (solver,), engine = played(
        renderer, [f"1 3{END}"], *roles, world=ProposeAndSolve, metadata={"given": "3 1"}
    )
    assert solver.agent == "solver" and solved(solver) == 1.0
    assert "3 1" in renderer.codec.decode(engine.requests[0].prompt_ids)
    for row in lists(200):
        assert row["given"] != in_order(row["given"]) and 3 <= row["length"] <= 5


def test_the_teacher_is_as_careless_as_the_page_says() -> None:
    right = {"propose": 0, "solve": 0}
    seen = {"propose": 0, "solve": 0}
    for row in islice(traces(4000), 4000):
        system, asked, answer = (message["content"] for message in row["messages"])
        seen[system] += 1
        wanted = set(asked.split())
        good = wanted <= set(answer.split()) if system == "propose" else answer == in_order(asked)
        right[system] += good
    assert seen == {"propose": 1000, "solve": 3000}
    assert 0.55 < right["propose"] / seen["propose"] < 0.7
    assert 0.38 < right["solve"] / seen["solve"] < 0.5, "a list of equal digits is right both ways"


def test_the_recipe_gains_more_than_its_control(tmp_path: Path) -> None:
    load_config("recipe:two_agents")
    recipe = run_command("two_agents", "recipe", tmp_path)
    control = run_command("two_agents", "control", tmp_path)
    check_gain("two_agents", recipe, control)
    for agent in ("proposer", "solver"):
        rewards = recipe.curve(f"agent/{agent}/reward")
        assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.1, "both train"
