"""Watch a stage's metrics for the known ways in which training goes wrong.

A monitor measures one number of the steps so far and has one threshold, its key in the section
`monitors`. Under the same name docs/when_training_goes_wrong.md says what to look at, why it
happens, and what cures it.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from retrain.tools.base import CallStatus

logger = logging.getLogger(__name__)

PAGE = "docs/when_training_goes_wrong.md"
WINDOW = 5
"""Steps whose mean stands for the start, the best and the present."""
REPEAT_STEPS = 20
"""A monitor that stays crossed warns again after so many steps."""

Metrics = Mapping[str, float]
History = Sequence[Metrics]
"""One stage's metrics, step after step; the last are the present ones."""


@dataclass(frozen=True)
class Alert:
    """A monitor that is crossed."""

    name: str
    value: float
    threshold: float
    message: str
    """What is wrong, by how much, the one most likely cure, and where to read on."""


@dataclass(frozen=True)
class Monitor:
    """What is measured, and what to tell of it once it is crossed.

    `measure` returns None where the metrics it needs are not there: it is then not checked.
    """

    measure: Callable[[History], float | None]
    symptom: str
    cure: str
    below: bool = False
    """Crossed below the threshold, not above it."""

    def crosses(self, value: float, threshold: float) -> bool:
        """NaN crosses every threshold."""
        return not (value >= threshold if self.below else value <= threshold)


class Monitors:
    """One stage's monitors, and which of them have been told of.

    Args:
        thresholds: by monitor; None switches it off, and so does leaving it out.
        stage: whose metrics they are, for the warnings.
    """

    def __init__(self, thresholds: Mapping[str, float | None], *, stage: str) -> None:
        unknown = thresholds.keys() - MONITORS.keys()
        if unknown:
            raise ValueError(f"there is no monitor {', '.join(sorted(unknown))}")
        self.thresholds = dict(thresholds)
        self.stage = stage
        self._history: list[Metrics] = []
        self._told: dict[str, int] = {}

    def observe(self, step: int, metrics: Metrics) -> list[Alert]:
        """Every monitor that is crossed in this step.

        A warning is logged when one becomes crossed, and every `REPEAT_STEPS` while it stays so; a
        step in which it cannot be checked changes nothing.
        """
        self._history.append(dict(metrics))
        alerts = check(self._history, self.thresholds)
        crossed = {alert.name for alert in alerts}
        for name in [name for name in self._told if name not in crossed]:
            if MONITORS[name].measure(self._history) is not None:
                del self._told[name]
        for alert in alerts:
            told = self._told.get(alert.name)
            if told is None or step - told >= REPEAT_STEPS:
                logger.warning("%s step %d: %s", self.stage, step, alert.message)
                self._told[alert.name] = step
        return alerts

    def replay(self, steps: Sequence[Metrics]) -> None:
        """Take up what the stage observed before; what is crossed is told of again."""
        self._history += steps


def check(history: History, thresholds: Mapping[str, float | None]) -> list[Alert]:
    """The monitors that the last step of `history` crosses, in the order of `MONITORS`."""
    alerts = []
    for name, monitor in MONITORS.items():
        threshold = thresholds.get(name)
        value = None if threshold is None else monitor.measure(history)
        if threshold is not None and value is not None and monitor.crosses(value, threshold):
            side = "below" if monitor.below else "above"
            message = (
                f"{monitor.symptom}: {name} is {value:.3g}, {side} {threshold:.3g}. "
                f"Most likely cure: {monitor.cure}. See {PAGE}#{name}"
            )
            alerts.append(Alert(name, value, threshold, message))
    return alerts


def _now(name: str) -> Callable[[History], float | None]:
    return lambda history: history[-1].get(name)


def _share(part: str, whole: str) -> Callable[[History], float | None]:
    def measure(history: History) -> float | None:
        now = history[-1]
        return now[part] / now[whole] if part in now and now.get(whole) else None

    return measure


def _growth(name: str) -> Callable[[History], float | None]:
    """The present mean as a multiple of that at the start, once there is more than the start."""

    def measure(history: History) -> float | None:
        values = _all(history, name)
        if name not in history[-1] or len(values) <= WINDOW:
            return None
        start = statistics.fmean(values[:WINDOW])
        return statistics.fmean(values[-WINDOW:]) / start if start > 0 else None

    return measure


def _ratio_from_one(history: History) -> float | None:
    ratio = history[-1].get("ratio/mean")
    return None if ratio is None else abs(ratio - 1.0)


def _grad_norm_spike(history: History) -> float | None:
    before = _all(history[:-1], "grad_norm")
    if "grad_norm" not in history[-1] or len(before) < WINDOW:
        return None
    usual = statistics.median(before)
    return history[-1]["grad_norm"] / usual if usual > 0 else None


def _zero_variance(history: History) -> float | None:
    """The share over the last steps. Groups of one are not compared, so they are not counted."""
    if not _compares_groups(history[-1]):
        return None
    recent = [metrics for metrics in history[-WINDOW:] if _compares_groups(metrics)]
    groups = sum(metrics["groups"] for metrics in recent)
    return sum(metrics["groups/zero_variance"] for metrics in recent) / groups


def _compares_groups(metrics: Metrics) -> bool:
    present = "groups/zero_variance" in metrics
    return present and 0 < metrics.get("groups", 0.0) < metrics.get("rollouts", 0.0)


def _tool_calls(history: History) -> float | None:
    recent = _all(history[-WINDOW:], "tool_calls/mean")
    return statistics.fmean(recent) if len(recent) == WINDOW else None


def _calls_that_ended(*statuses: CallStatus) -> Callable[[History], float | None]:
    def measure(history: History) -> float | None:
        now = history[-1]
        counts = {s: now.get(f"tool_calls/{s}/mean", 0.0) for s in get_args(CallStatus)}
        total = sum(counts.values())
        return sum(counts[status] for status in statuses) / total if total else None

    return measure


def _flat_reward_steps(history: History) -> float | None:
    """Steps since the start if none of them had any variance to learn from, else 0."""
    if "reward/mean" not in history[-1]:
        return None
    scored = [metrics for metrics in history if "reward/mean" in metrics]
    flat = all(m.get("reward/std") == 0 or _zero_variance([m]) == 1 for m in scored)
    return float(len(scored)) if flat else 0.0


def _reward_drop(history: History) -> float | None:
    """The lost share of the gain: (best - now) / (best - start).

    0 unless the loss also exceeds three times the median change from one step to the next, so that
    a reward that only wavers about its mean is no collapse.
    """
    rewards = _all(history, "reward/mean")
    if "reward/mean" not in history[-1] or len(rewards) < 2 * WINDOW:
        return None
    means = [statistics.fmean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
    start, best, now = means[0], max(means), means[-1]
    usual_change = statistics.median(abs(b - a) for a, b in pairwise(rewards))
    if best <= start or best - now <= 3 * usual_change:
        return 0.0
    return (best - now) / (best - start)


def _all(history: History, name: str) -> list[float]:
    """A metric's values, the steps without it left out."""
    return [metrics[name] for metrics in history if name in metrics]


_HYPER = "algorithm.hyperparameters"

MONITORS: dict[str, Monitor] = {
    "logprob_gap": Monitor(
        _now("logprob_gap/mean"),
        "the engine samples from another distribution than the learner trains",
        f"{_HYPER}.correction: {{kind: tis}}",
    ),
    "ratio": Monitor(
        _ratio_from_one,
        "the policy left the one it was sampled from within a step",
        f"a lower {_HYPER}.epochs",
    ),
    "clip_fraction": Monitor(
        _now("clip_fraction"),
        "much of the batch is clipped and teaches nothing",
        f"half the {_HYPER}.learning_rate",
    ),
    "approx_kl": Monitor(
        _now("approx_kl"),
        "one step moves the policy far",
        f"half the {_HYPER}.learning_rate",
    ),
    "kl": Monitor(
        _now("kl"),
        "the policy is far from its reference",
        f"a higher {_HYPER}.kl.coefficient",
    ),
    "entropy_low": Monitor(
        lambda history: history[-1].get("entropy", history[-1].get("entropy/sampled")),
        "the policy hardly explores any more",
        f"a small {_HYPER}.entropy_coefficient, such as 0.001",
        below=True,
    ),
    "entropy_growth": Monitor(
        _growth("entropy"),
        "the policy becomes random",
        f"half the {_HYPER}.learning_rate",
    ),
    "grad_norm_spike": Monitor(
        _grad_norm_spike,
        "the gradient is far larger than it was",
        f"{_HYPER}.max_grad_norm: 1 and a lower {_HYPER}.learning_rate",
    ),
    "zero_variance": Monitor(
        _zero_variance,
        "most groups have equal rewards and teach nothing",
        f"{_HYPER}.dynamic_sampling_rounds: 3, and tasks of other difficulty",
    ),
    "truncated": Monitor(
        _now("truncated"),
        "many rollouts are cut before their end",
        f"a higher {_HYPER}.max_new_tokens",
    ),
    "masked": Monitor(
        _share("rollouts/masked", "rollouts"),
        "many rollouts are lost to failing infrastructure",
        "repair what the warning about masked rollouts names; a lower sandbox.max_concurrency "
        "where the sandbox is overloaded",
    ),
    "tool_calls": Monitor(
        _tool_calls,
        "the policy does not call its tools",
        "environment.describe_tools: true, or traces with calls in a stage of sft before rl",
        below=True,
    ),
    "tool_failures": Monitor(
        _calls_that_ended("tool_error", "timeout"),
        "tools fail, through no fault of the policy",
        "repair the tool; a higher environment.tool_timeout_s where calls end in time-outs",
    ),
    "invalid_calls": Monitor(
        _calls_that_ended("model_error"),
        "the policy's tool calls are wrong",
        "environment.describe_tools: true, or traces with calls in a stage of sft before rl",
    ),
    "length_growth": Monitor(
        _growth("response_tokens/mean"),
        "responses grow long",
        f"{_HYPER}.overlong_punishment: {{}}",
    ),
    "staleness": Monitor(
        _now("staleness/mean"),
        "the policy learns from rollouts of one long gone",
        f"{_HYPER}.correction: {{kind: tis}}",
    ),
    "flat_reward_steps": Monitor(
        _flat_reward_steps,
        "no group had any variance since the start, so nothing is learned",
        "a stage of sft before rl, or easier tasks in prompt_source",
    ),
    "reward_drop": Monitor(
        _reward_drop,
        "the reward rose and collapses",
        f"go back to a checkpoint before it and halve {_HYPER}.learning_rate",
    ),
}
"""By name: the threshold's key in the section `monitors` and the heading in `PAGE`."""
