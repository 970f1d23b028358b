"""reasoning-gym's own data sets and verifiers, unmodified, for training steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

import reasoning_gym

from adapting import check_ledger, train, weights_changed
from runs import hyperparameters, model_section
from saying import said

DATASETS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "letter_counting": {"min_words": 3, "max_words": 4},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def traces(n: int = 100) -> Iterator[dict[str, Any]]:
    """Questions of all, with answers of their kind, so that some rollouts are right."""
    for dataset, params in DATASETS.items():
        for entry in reasoning_gym.create_dataset(dataset, seed=1000, size=n, **params):
            yield from said(entry["question"], [f"<a>{entry['answer']}</a>"], 1)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_training_step(dataset: str, tmp_path: Path) -> None:
    """Every reward is the package's own score of what the model said."""
    trained = train(
        tmp_path,
        sft="test_env_reasoning_gym:traces",
        environment={"type": "qa"},
        model=model_section(max_position_embeddings=768),
        prompt_source={"type": "reasoning_gym", "dataset": dataset, "params": DATASETS[dataset]},
        algorithm={"hyperparameters": hyperparameters(group_size=16, max_new_tokens=12)},
        reward_setup={
            "rollout_reward_configs": {
                "own": {
                    "function": "retrain.data.reasoning_gym:score",
                    "params": {"pattern": "<a>(.*?)</a>"},
                }
            }
        },
    )
    assert weights_changed(trained)
    own = reasoning_gym.get_score_answer_fn(dataset)
    for rollout in trained.rollouts:
        check_ledger(rollout, trained.engine)
        assert rollout.task is not None
        found = re.findall(r"<a>(.*?)</a>", rollout.messages[-1].content, re.DOTALL)
        answer = found[-1].strip() if found else None
        assert rollout.reward == own(answer, rollout.task.metadata["entry"])
        assert [(p.name, p.kind, p.value) for p in rollout.reward_parts] == [
            ("own", "rollout", rollout.reward)
        ]
