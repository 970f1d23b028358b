"""What a step of reinforcement learning reports."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from retrain.config.stages import EvaluationConfig
from retrain.loops.evaluate import is_success
from retrain.types import Rollout


def rollout_metrics(
    groups: Sequence[Sequence[Rollout]],
    advantages: Mapping[str, float],
    evaluation: EvaluationConfig | None,
) -> dict[str, float]:
    """Means over the kept rollouts; counts of masked ones, forks and groups that teach nothing."""
    rollouts = [rollout for group in groups for rollout in group]
    kept = [rollout for rollout in rollouts if rollout.error is None]
    metrics = {
        "rollouts/masked": float(len(rollouts) - len(kept)),
        "groups/zero_variance": float(
            sum(all(advantages.get(r.id, 0.0) == 0.0 for r in group) for group in groups)
        ),
        "forks": float(sum(rollout.num_forks for rollout in rollouts)),
    }
    if not kept:
        return metrics
    rewards = [rollout.reward for rollout in kept]
    metrics["reward/mean"] = statistics.fmean(rewards)
    metrics["reward/std"] = statistics.pstdev(rewards)
    metrics["turns/mean"] = statistics.fmean(len(r.model_messages) for r in kept)
    if evaluation is not None:
        metrics["success"] = statistics.fmean(
            is_success(r, evaluation.success_reward, evaluation.success_threshold) for r in kept
        )
    metrics |= _by_name(kept)
    metrics |= _shares(kept)
    return metrics


def _by_name(kept: Sequence[Rollout]) -> dict[str, float]:
    """Mean value of each reward over rollouts, and mean of each metric that rollouts carry."""
    rewards: dict[str, float] = {}
    carried: dict[str, float] = {}
    for rollout in kept:
        for part in rollout.reward_parts:
            rewards[part.name] = rewards.get(part.name, 0.0) + part.value
        for name, value in rollout.metrics.items():
            carried[name] = carried.get(name, 0.0) + value
    means = {f"reward/{name}": total / len(kept) for name, total in rewards.items()}
    return means | {f"{name}/mean": total / len(kept) for name, total in carried.items()}


def _shares(kept: Sequence[Rollout]) -> dict[str, float]:
    reasons: dict[str, int] = {}
    for rollout in kept:
        reason = str(rollout.stop_reason)
        reasons[reason] = reasons.get(reason, 0) + 1
    return {f"stop/{reason}": count / len(kept) for reason, count in reasons.items()}


def learner_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """How far the learner's log-probabilities are from the engine's, before the first update."""
    return {
        "logprob_gap/max": totals["gap_max"],
        "logprob_gap/mean": totals["gap_mean"],
        "tokens/trained": totals["tokens"],
    }


def update_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Of one update: its loss, and over the trained tokens the mean ratio and the clipped share."""
    tokens = max(totals["tokens"], 1.0)
    return {
        "loss": totals["loss"],
        "ratio/mean": totals.get("ratio", 0.0) / tokens,
        "clip_fraction": totals.get("clipped", 0.0) / tokens,
    }
