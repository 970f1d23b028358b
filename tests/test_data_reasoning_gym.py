"""Tasks of reasoning-gym, scored by its own verifier."""

from __future__ import annotations

from typing import Any

import pytest

from retrain.config.data import ReasoningGymSourceConfig
from retrain.data.reasoning_gym import score
from retrain.data.sources import load_tasks
from retrain.types import Message, MessageType, Rollout, Task, UserError

pytest.importorskip("reasoning_gym")


def tasks(seed: int = 0, **keys: Any) -> list[Task]:
    keys = {"dataset": "chain_sum", "size": 5, "shuffle": False, **keys}
    config = ReasoningGymSourceConfig.model_validate({"type": "reasoning_gym", **keys})
    return list(load_tasks(config, seed=seed).epoch(0))


def attempt(task: Task | None, *said: str) -> Rollout:
    rollout = Rollout(task=task)
    rollout.add_messages(*(Message(text, MessageType.MODEL) for text in said))
    return rollout


def test_the_verifier_scores_the_last_message() -> None:
    for task in tasks():
        assert score(attempt(task, "hm", f" {task.answer}\n")) == 1.0
        assert score(attempt(task, str(task.answer), "I do not know")) < 0.5
        assert score(attempt(task)) == 0.0


def test_a_pattern_picks_the_last_answer() -> None:
    (task, *_) = tasks()
    pattern = r"<answer>(.*?)</answer>"
    right = f"<answer>1e9</answer> no: <answer>\n{task.answer}</answer>"
    assert score(attempt(task, right), pattern=pattern) == 1.0
    assert score(attempt(task, str(task.answer)), pattern=pattern) == 0.0
    with pytest.raises(UserError, match="has no group"):
        score(attempt(task, right), pattern="answer")


def test_seed_size_and_params_act() -> None:
    same = [task.prompt for task in tasks(seed=3)]
    assert same == [task.prompt for task in tasks(seed=0, params={"seed": 3})]
    assert same != [task.prompt for task in tasks(seed=50)]
    (task,) = tasks(size=1, params={"min_terms": 7, "max_terms": 7})
    assert task.prompt[0].content.count(" + ") + task.prompt[0].content.count(" - ") == 6


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"dataset": "chain_sums"}, "no dataset 'chain_sums'"),
        ({"params": {"terms": 3}}, "refuses params .*terms"),
        ({"params": {"min_terms": -1}}, "refuses params .*min_terms"),
    ],
)
def test_what_the_package_lacks_is_named(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        tasks(**keys)


def test_a_task_from_elsewhere_cannot_be_scored() -> None:
    for task in (None, Task("t", ()), Task("t", (), metadata={"entry": 3})):
        with pytest.raises(UserError, match="no reasoning-gym entry"):
            score(attempt(task, "5"))
