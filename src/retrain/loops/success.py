"""What counts as a success, to an evaluation and to a curriculum."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.config.data import PromptSourceConfig, single_sources
from retrain.config.stages import EvaluationConfig
from retrain.data import Succeeded
from retrain.importing import suggest
from retrain.types import Rollout, UserError


def is_success(rollout: Rollout, reward: str | None, threshold: float) -> bool:
    """Whether a reward's raw value, or the total when no reward is named, reaches a threshold."""
    if reward is None:
        return rollout.reward >= threshold
    return any(part.name == reward and part.raw >= threshold for part in rollout.reward_parts)


def success_of(evaluation: EvaluationConfig | None) -> Succeeded:
    """By a curriculum's own keys; where it has neither, as the evaluation has it, or else a total
    reward of at least 1."""
    usual: tuple[str | None, float] = (None, 1.0)
    if evaluation is not None:
        usual = (evaluation.success_reward, evaluation.success_threshold)

    def succeeded(rollout: Rollout, reward: str | None, threshold: float | None) -> bool:
        if reward is None and threshold is None:
            return is_success(rollout, *usual)
        return is_success(rollout, reward, 1.0 if threshold is None else threshold)

    return succeeded


def check_curricula(source: PromptSourceConfig, rewards: Sequence[str]) -> None:
    """
    Raises:
        UserError: a curriculum's `success_reward` is none of the rewards.
    """
    for place, single in single_sources(source):
        wanted = None if single.curriculum is None else single.curriculum.success_reward
        if wanted is not None and wanted not in rewards:
            raise UserError(
                f"prompt_source.{place}curriculum.success_reward: there is no reward {wanted!r}",
                suggest(wanted, rewards, "rewards"),
            )
