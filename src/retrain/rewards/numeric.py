"""Built-in rewards that compare numbers and boxed answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.extract import (
    Scope,
    accepted_answers,
    extract,
    judged_text,
    last_boxed,
    last_number,
    whole_number,
)
from retrain.rewards.text import check_pattern, check_scope
from retrain.types import Rollout

_LATEX_NOISE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!;: ]|\\?\$|~")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LATEX_FRAC = re.compile(r"\\[dt]frac(?![A-Za-z])")


def _check_numeric(params: Mapping[str, Any]) -> None:
    check_pattern(params)
    for key in ("rel_tol", "abs_tol"):
        if not 0 <= params[key] < float("inf"):
            raise ValueError(f"{key} is {params[key]!r}, expected a number of at least 0")


@reward(kind="rollout", range=(0.0, 1.0), check=_check_numeric)
def numeric_match(
    rollout: Rollout,
    *,
    tag: str | None = None,
    pattern: str | None = None,
    boxed: bool = False,
    rel_tol: float = 0.0,
    abs_tol: float = 1e-9,
    scope: Scope = "last",
) -> float:
    r"""1 when the last number in the text equals one of the task's answers, else 0. Range [0, 1].

    The text is first narrowed like in `exact_match`. Reads `1,234`, `-3`, `.5`, `2e3`, `3/4`,
    `\frac{3}{4}`; a percent sign is ignored, so `50%` is 50. Equal means within
    max(abs_tol, rel_tol * |answer|), computed exactly. 0 when there is no number. Raises
    ValueError when the task has no answer or the answer holds no number.

    Example: `numeric_match: {params: {tag: answer, rel_tol: 0.01}}`
    """
    wanted = [_as_number(answer) for answer in accepted_answers(rollout)]
    found = extract(judged_text(rollout, scope), tag, pattern, boxed)
    number = None if found is None else last_number(found)
    if number is None:
        return 0.0
    absolute, relative = Fraction(abs_tol), Fraction(rel_tol)
    return float(any(abs(number - w) <= max(absolute, relative * abs(w)) for w in wanted))


def _as_number(answer: Any) -> Fraction:
    """The number that an answer is, or that its text ends with (`#### 42`)."""
    number = None if isinstance(answer, bool) else last_number(str(answer))
    if number is None:
        raise ValueError(f"the task's answer {answer!r} holds no number")
    return number


@reward(kind="rollout", range=(0.0, 1.0), check=check_scope)
def boxed_answer(rollout: Rollout, *, scope: Scope = "last") -> float:
    r"""1 when the last complete `\boxed{...}` equals one of the task's answers, else 0.

    Range [0, 1]. Both sides lose spacing commands, `$`, `\left`, `\right`, `\text{}` and white
    space; `\dfrac` is `\frac`; two plain numbers are compared by value, so `1,000.0` equals
    `1000`. An answer that itself holds a box is judged by what is in it. 0 without a box. Raises
    ValueError when the task has no answer. For equal expressions that are written differently
    use `math_equivalence`.

    Example: `boxed_answer: {weight: 2.0}`
    """
    answers = accepted_answers(rollout)
    found = last_boxed(judged_text(rollout, scope))
    return float(found is not None and any(same_latex(found, str(a)) for a in answers))


def same_latex(first: str, second: str) -> bool:
    """Whether two answers are the same text, or the same plain number, up to notation."""
    left, right = _normal_latex(first), _normal_latex(second)
    if left == right:
        return left != ""
    number = whole_number(left)
    return number is not None and number == whole_number(right)


def _normal_latex(text: str) -> str:
    boxed = last_boxed(text)
    text = _LATEX_NOISE.sub("", (text if boxed is None else boxed).replace("{,}", ","))
    text = _LATEX_FRAC.sub(r"\\frac", _LATEX_TEXT.sub(r"\1", text))
    return "".join(text.split()).rstrip(".")
