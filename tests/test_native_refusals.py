"""What GRPO refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from native import TOKENIZER, conversation
from retrain import GRPO, Rollout, UserError
from tiny import tiny_gpt2


@pytest.fixture
def model() -> Any:
    return tiny_gpt2()


def two() -> list[Rollout]:
    return [conversation("2 + 3?", "5"), conversation("2 + 3?", "six")]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (([1.0],), "there are 1 rewards for 2 rollouts"),
        (([1.0, float("nan")],), r"rewards\[1\] is nan, not a finite number"),
        (([1.0, "0"],), r"some rewards are numbers and some are lists"),
        (([[1.0], [1.0, 2.0]],), r"rewards\[1\] has 2 numbers; rollouts\[1\] has 1 MODEL"),
        (([1.0, 0.0], [0]), "there are 1 groups for 2 rollouts"),
    ],
)
def test_what_does_not_fit_is_refused(model: Any, arguments: Any, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        GRPO(model, TOKENIZER).calculate_loss(two(), *arguments)


def test_rollouts_that_cannot_train_are_refused(model: Any) -> None:
    grpo = GRPO(model, TOKENIZER)
    with pytest.raises(UserError, match="has no MODEL message"):
        grpo.calculate_loss([conversation("2 + 3?")], [1.0])
    with pytest.raises(UserError, match=r"the model takes 256"):
        grpo.calculate_loss([conversation("x" * 300, "5")], [1.0])
    with pytest.raises(UserError, match=r"rollouts\[1\] has no group_id"):
        grpo.calculate_loss([conversation("a", "b", group_id="g"), two()[0]], [1.0, 0.0])
    with pytest.raises(UserError, match="rloo takes one reward for each rollout"):
        GRPO(model, TOKENIZER, advantage="rloo").calculate_loss(two(), [[1.0], [0.0]])


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": 1.0}, "eps is 1.0"),
        ({"eps_high": -1.0}, "eps_high is -1.0"),
        ({"advantage": "gae"}, "advantage is 'gae'"),
        ({"normalize_advantages": "std"}, "normalize_advantages is 'std'"),
        ({"aggregation": "mean"}, "aggregation is 'mean'"),
        ({"aggregation": "constant"}, "aggregation_length is None"),
        ({"aggregation_length": 5}, "aggregation_length is 5"),
        ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient is -0.1"),
        ({"kl_estimator": "k1", "kl_coefficient": 1.0}, "kl_estimator is 'k1'"),
        ({"reference": torch.nn.Linear(1, 1)}, "does nothing while kl_coefficient is 0"),
        ({"correction_cap": 3.0}, "do nothing without a correction"),
        ({"correction": "is"}, "correction is 'is'"),
        ({"correction": "tis", "correction_cap": 1.0}, "correction_cap is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        GRPO(tiny_gpt2(), TOKENIZER, **settings)


def test_a_model_that_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match="no parameter that trains"):
        GRPO(tiny_gpt2().requires_grad_(False), TOKENIZER)
