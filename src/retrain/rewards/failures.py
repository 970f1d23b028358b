"""When a reward or a verifier is itself wrong: what is checked, and how it is shown."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from retrain.types import Rollout, UserError

_MESSAGE_CHARS = 200
_MESSAGES_EACH_END = 4


class RewardFailure(UserError):
    """A reward or verifier raised, or returned something that is not a usable number.

    `function` is its name in the set-up, `rollout` the one that triggered it, `exception` what
    was raised (a ValueError or TypeError of ours for a bad return value).
    """

    def __init__(self, function: str, rollout: Rollout, exception: Exception) -> None:
        super().__init__(
            f"{function} failed: {describe_exception(exception)}",
            "fix the function, or set on_error to mask or penalty; the rollout was:\n"
            + describe_rollout(rollout),
        )
        self.function = function
        self.rollout = rollout
        self.exception = exception


def describe_exception(exception: Exception) -> str:
    """`ValueError: message (file.py:12)`, the place being where it was raised."""
    text = f"{type(exception).__name__}: {exception}"
    trace = exception.__traceback__
    if trace is None:
        return text
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{text} ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"


def describe_rollout(rollout: Rollout) -> str:
    """Id, task and messages, each cut to 200 characters, the middle of a long one left out."""
    task = "none" if rollout.task is None else rollout.task.id
    lines = [f"  rollout {rollout.id}, task {task}"]
    shown = [f"  [{m.type.value}] {_shorten(m.content)}" for m in rollout.messages]
    hidden = len(shown) - 2 * _MESSAGES_EACH_END
    if hidden > 0:
        shown[_MESSAGES_EACH_END:-_MESSAGES_EACH_END] = [f"  ... {hidden} messages ..."]
    return "\n".join(lines + shown)


def _shorten(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]}..."


def _brief(value: Any) -> str:
    return repr(value)[:100]


def as_finite(value: Any) -> float:
    """A reward's return value as a float; True and False count as 1 and 0.

    Raises:
        TypeError: not a real number. ValueError: NaN or infinite.
    """
    if not isinstance(value, Real):
        raise TypeError(f"returned {_brief(value)}, expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, expected a finite number")
    return number


def as_verdict(value: Any) -> bool:
    """A verifier's return value, which must be a bool: 0.7 or a match object is a mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"returned {_brief(value)}, expected True or False")
    return value


class BadGroupScore(ValueError):
    """One number of a group reward is unusable; `index` is its rollout's place in the call."""

    def __init__(self, index: int, problem: Exception) -> None:
        super().__init__(f"{problem} for rollout {index}")
        self.index = index


def as_group_scores(values: Any, size: int) -> list[float]:
    """A group reward's return value: one finite number per rollout [size].

    Raises:
        TypeError, ValueError: not a list of that length. BadGroupScore: a number is unusable.
    """
    if not isinstance(values, list | tuple):
        raise TypeError(f"returned {_brief(values)}, expected a list of {size} numbers")
    if len(values) != size:
        raise ValueError(f"returned {len(values)} numbers for {size} rollouts")
    scores = []
    for index, value in enumerate(values):
        try:
            scores.append(as_finite(value))
        except (TypeError, ValueError) as problem:
            raise BadGroupScore(index, problem) from problem
    return scores
