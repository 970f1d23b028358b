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


def counts(rollout: Rollout, evaluation: EvaluationConfig | None) -> bool:
    """Whether a rollout counts at all: not where it is masked, and of several agents only those
    that the evaluation names, by default those that train."""
    if rollout.error is not None or rollout.episode is None:
        return rollout.error is None
    agents = None if evaluation is None else evaluation.agents
    return rollout.trainable if agents is None else rollout.agent in agents


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


def check_curricula(
    source: PromptSourceConfig, evaluation: EvaluationConfig | None, rewards: Sequence[str]
) -> None:
    """
    Raises:
        UserError: the reward that decides success in a curriculum is none of the rewards.
    """
    for place, single in single_sources(source):
        curriculum = single.curriculum
        if curriculum is None:
            continue
        key, wanted = f"prompt_source.{place}curriculum.success_reward", curriculum.success_reward
        if wanted is None and curriculum.success_threshold is None and evaluation is not None:
            key = f"evaluation.success_reward, which prompt_source.{place}curriculum goes by"
            wanted = evaluation.success_reward
        if wanted is not None and wanted not in rewards:
            raise UserError(
                f"{key}: there is no reward {wanted!r}", suggest(wanted, rewards, "rewards")
            )
