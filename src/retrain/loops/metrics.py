"""What a step of reinforcement learning reports."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from retrain.config.stages import EvaluationConfig
from retrain.loops.credit import has_variance, sampled_tokens, truncated
from retrain.loops.pipeline import SampledGroup, seconds_under_way
from retrain.loops.success import counts, is_success
from retrain.loops.survivors import Freshness, large_enough
from retrain.types import NO_VERSION, Rollout, Sample


def rollout_metrics(
    groups: Sequence[Sequence[Rollout]],
    evaluation: EvaluationConfig | None,
    *,
    version: int,
    freshness: Freshness,
    per_turn: bool = False,
    min_group_size: int = 1,
) -> dict[str, float]:
    """Means over the kept rollouts that train, stale ones included; counts of masked and stale
    ones, forks and groups that teach nothing; and, where several agents act, each one's reward.

    Args:
        version: of the policy that is about to learn from them.
        freshness: which of them are stale.
        min_group_size: fewest survivors of a group that teaches.
    """
    rollouts = [rollout for group in groups for rollout in group]
    fresh = freshness.of(groups)
    kept = [rollout for rollout in rollouts if rollout.error is None]
    metrics = {
        "rollouts": float(len(rollouts)),
        **failure_metrics(rollouts),
        "rollouts/stale": float(len(rollouts) - sum(map(len, fresh))),
        "groups": float(len(groups)),
        "groups/too_small": float(sum(not large_enough(group, min_group_size) for group in fresh)),
        "groups/zero_variance": float(
            sum(not has_variance(group, per_turn=per_turn) for group in fresh)
        ),
        "forks": float(sum(rollout.num_forks for rollout in rollouts)),
    }
    metrics |= _by_agent(kept)
    if evaluation is not None:
        metrics |= _success(kept, evaluation)
    kept = [rollout for rollout in kept if rollout.trainable]
    if not kept:
        return metrics
    rewards = [rollout.reward for rollout in kept]
    metrics["reward/mean"] = statistics.fmean(rewards)
    metrics["reward/std"] = statistics.pstdev(rewards)
    metrics["turns/mean"] = statistics.fmean(len(r.model_messages) for r in kept)
    lengths = [sampled_tokens(rollout) for rollout in kept]
    metrics["response_tokens/mean"] = statistics.fmean(lengths)
    metrics["response_tokens/max"] = float(max(lengths))
    metrics["truncated"] = statistics.fmean(truncated(rollout) for rollout in kept)
    metrics |= _staleness(kept, version) | _sampled_entropy(kept)
    metrics["staleness/steps_max"] = float(max(map(freshness.steps_behind, kept)))
    metrics |= means_by_name(kept)
    metrics |= _shares(kept)
    return metrics


def _success(kept: Sequence[Rollout], evaluation: EvaluationConfig) -> dict[str, float]:
    wanted = evaluation.success_reward, evaluation.success_threshold
    won = [is_success(rollout, *wanted) for rollout in kept if counts(rollout, evaluation)]
    return {"success": statistics.fmean(won)} if won else {}


def _by_agent(kept: Sequence[Rollout]) -> dict[str, float]:
    """Where several agents act: each one's reward, and the means of what its rollouts carry."""
    agents: dict[str, list[Rollout]] = {}
    for rollout in kept:
        if rollout.episode is not None:
            agents.setdefault(rollout.agent, []).append(rollout)
    metrics: dict[str, float] = {}
    for name, own in agents.items():
        metrics[f"agent/{name}/reward"] = statistics.fmean(rollout.reward for rollout in own)
        for carried in sorted({key for rollout in own for key in rollout.metrics}):
            values = [rollout.metrics.get(carried, 0.0) for rollout in own]
            metrics[f"agent/{name}/{carried}"] = statistics.fmean(values)
    return metrics


def failure_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How many were masked, how many of these by each kind of failure, and how many took more than
    one attempt."""
    masked = [rollout for rollout in rollouts if rollout.error is not None]
    retried = sum(len(r.failures) > (r.error is not None) for r in rollouts)
    metrics = {"rollouts/masked": float(len(masked)), "rollouts/retried": float(retried)}
    kinds = Counter(rollout.failures[-1].kind for rollout in masked if rollout.failures)
    return metrics | {f"masked/{kind}": float(count) for kind, count in sorted(kinds.items())}


def means_by_name(kept: Sequence[Rollout]) -> dict[str, float]:
    """Mean value of each reward over the rollouts of the agents that get it, and mean of each
    metric that rollouts carry."""
    rewards: dict[str, float] = {}
    getting: dict[str, set[str]] = {}
    carried: dict[str, float] = {}
    for rollout in kept:
        for part in rollout.reward_parts:
            rewards[part.name] = rewards.get(part.name, 0.0) + part.value
            getting.setdefault(part.name, set()).add(rollout.agent)
        for name, value in rollout.metrics.items():
            carried[name] = carried.get(name, 0.0) + value
    sizes = Counter(rollout.agent for rollout in kept)
    means = {
        f"reward/{name}": total / sum(sizes[agent] for agent in getting[name])
        for name, total in rewards.items()
    }
    return means | {f"{name}/mean": total / len(kept) for name, total in carried.items()}


def _shares(kept: Sequence[Rollout]) -> dict[str, float]:
    reasons: dict[str, int] = {}
    for rollout in kept:
        reason = str(rollout.stop_reason)
        reasons[reason] = reasons.get(reason, 0) + 1
    return {f"stop/{reason}": count / len(kept) for reason, count in reasons.items()}


def _sampled_entropy(kept: Sequence[Rollout]) -> dict[str, float]:
    """Minus the mean log-probability of what was sampled: an unbiased estimate of the entropy, also
    of a step that teaches nothing."""
    total, tokens = 0.0, 0
    for rollout in kept:
        for segment in rollout.segments:
            for span in segment.turns:
                total -= sum(segment.logprobs[span.start : span.end])
                tokens += span.end - span.start
    return {"entropy/sampled": total / tokens} if tokens else {}


def _staleness(kept: Sequence[Rollout], version: int) -> dict[str, float]:
    """Updates between sampling a token and learning from it."""
    lags = [
        version - sampled
        for rollout in kept
        for segment in rollout.segments
        for sampled in set(segment.versions)
        if sampled != NO_VERSION
    ]
    if not lags:
        return {}
    return {"staleness/mean": statistics.fmean(lags), "staleness/max": float(max(lags))}


def learner_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Before the first update: how far the learner's log-probabilities are from the engine's, and
    what is told of the policy and the critic as they were."""
    tokens = max(totals["tokens"], 1.0)
    metrics = {
        "logprob_gap/max": totals["gap_max"],
        "logprob_gap/mean": totals["gap_mean"],
        "entropy": totals["entropy"] / tokens,
    }
    if "returns" in totals:
        variance = totals["returns_squared"] / tokens - (totals["returns"] / tokens) ** 2
        error = totals["value_error_squared"] / tokens
        if variance > 1e-9:
            metrics["explained_variance"] = 1.0 - error / variance
    if "teacher_tokens" in totals:
        metrics["distill/kl"] = totals["teacher_kl"] / max(totals["teacher_tokens"], 1.0)
    return metrics


def update_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Of one update: its loss, and means over the trained tokens."""
    tokens = max(totals["tokens"], 1.0)
    low, high = (totals.get(f"clipped_{side}", 0.0) / tokens for side in ("low", "high"))
    metrics = {
        "loss": totals["loss"],
        "ratio/mean": totals.get("ratio", 0.0) / tokens,
        "clip_fraction": low + high,
        "clip_fraction/low": low,
        "clip_fraction/high": high,
        "approx_kl": totals.get("approx_kl", 0.0) / tokens,
    }
    optional = {"kl": "kl", "correction": "correction/mean", "value_loss": "value_loss"}
    optional |= {"clipped_dual": "clip_fraction/dual", "value_clipped": "clip_fraction/value"}
    return metrics | {name: totals[key] / tokens for key, name in optional.items() if key in totals}


def speed_metrics(
    groups: Sequence[SampledGroup], samples: Sequence[Sample], waited: float, generated: float
) -> dict[str, float]:
    """Seconds: `wait` until the step had its groups, `generate` in which at least one of them was
    under way (since when they started, which may be in an earlier step), `train`."""
    training = time.perf_counter() - generated
    generating = seconds_under_way(groups)
    tokens = sum(sampled_tokens(rollout) for group in groups for rollout in group.rollouts)
    return {
        "seconds/wait": waited,
        "seconds/generate": generating,
        "seconds/train": training,
        "tokens_per_s/generate": tokens / max(generating, 1e-9),
        "tokens_per_s/train": sum(map(len, samples)) / max(training, 1e-9),
    }
