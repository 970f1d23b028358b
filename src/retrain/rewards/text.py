"""Built-in rewards that look at what the text says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from retrain.rewards.base import reward
from retrain.rewards.extract import (
    Scope,
    accepted_answers,
    extract,
    judged_text,
    squad_em_score,
    squad_f1_score,
    squad_normalize,
)
from retrain.types import Rollout

Normalize = Literal["none", "strip", "lower", "squad"]

_NORMALIZERS: dict[Normalize, Callable[[str], str]] = {
    "none": str,
    "strip": lambda text: " ".join(text.split()),
    "lower": lambda text: " ".join(text.lower().split()),
    "squad": squad_normalize,
}


def check_scope(params: Mapping[str, Any]) -> None:
    """Refuse a `scope` other than last and all (a step reward has none)."""
    if params.get("scope", "last") not in ("last", "all"):
        raise ValueError(f"scope is {params['scope']!r}, expected last or all")


def check_pattern(params: Mapping[str, Any]) -> None:
    """Refuse a pattern that is not a regular expression."""
    check_scope(params)
    pattern = params["pattern"]
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def _check_text(params: Mapping[str, Any]) -> None:
    check_scope(params)
    text = params["text"]
    if text is None:
        return
    if not text or not all(isinstance(t, str) and t for t in _texts(text)):
        raise ValueError(f"text is {text!r}, expected a non-empty string or a list of them")


def _check_length(params: Mapping[str, Any]) -> None:
    check_scope(params)
    for unit in ("words", "chars"):
        low, high = params[f"min_{unit}"], params[f"max_{unit}"]
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_{unit} {low} is above max_{unit} {high}")
    bounds = ("min_words", "max_words", "min_chars", "max_chars")
    if all(params[bound] is None for bound in bounds):
        raise ValueError(f"no bound is set; set at least one of {', '.join(bounds)}")


def _check_exact(params: Mapping[str, Any]) -> None:
    check_pattern(params)
    if params["normalize"] not in _NORMALIZERS:
        choices = ", ".join(_NORMALIZERS)
        raise ValueError(f"normalize is {params['normalize']!r}, expected one of {choices}")


def _penalty_range(params: Mapping[str, Any]) -> tuple[float, float]:
    return min(params["penalty"], 0.0), max(params["penalty"], 0.0)


def _texts(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def _mentions(judged: str, texts: Sequence[str], case_sensitive: bool) -> bool:
    if case_sensitive:
        return any(text in judged for text in texts)
    folded = judged.casefold()
    return any(text.casefold() in folded for text in texts)


@reward(kind="rollout", range=(0.0, 1.0), check=_check_text)
def contains(
    rollout: Rollout,
    *,
    text: str | Sequence[str] | None = None,
    case_sensitive: bool = False,
    scope: Scope = "last",
) -> float:
    """1 when the text contains `text` (any of them, if a list), else 0. Range [0, 1].

    Without `text`, looks for the task's answer; raises ValueError when the task has none.

    Example: `contains: {params: {text: ["cat", "kitten"]}}`
    """
    texts = [str(a) for a in accepted_answers(rollout)] if text is None else _texts(text)
    return float(_mentions(judged_text(rollout, scope), texts, case_sensitive))


@reward(kind="rollout", range=_penalty_range, check=_check_text)
def penalize_text_containing(
    rollout: Rollout,
    *,
    text: str | Sequence[str],
    case_sensitive: bool = False,
    penalty: float = -100.0,
    scope: Scope = "last",
) -> float:
    """`penalty` when the text contains `text` (any of them, if a list), else 0.

    Range [penalty, 0]. A text that says nothing is not penalised: gate it with `is_not_empty`.

    Example: `penalize_text_containing: {params: {text: s, penalty: -100}}`
    """
    found = _mentions(judged_text(rollout, scope), _texts(text), case_sensitive)
    return penalty if found else 0.0


@reward(kind="rollout", range=(0.0, 1.0), check=check_pattern)
def regex(
    rollout: Rollout,
    *,
    pattern: str,
    full_match: bool = False,
    case_sensitive: bool = True,
    scope: Scope = "last",
) -> float:
    r"""1 when `pattern` is found (with `full_match`, is all of the text), else 0. Range [0, 1].

    Python syntax; `.` does not match a newline, `^` and `$` mean the ends of the text. A pattern
    that backtracks without end would block the run: avoid nested repetition.

    Example: `regex: {params: {pattern: "^Answer: \\d+$"}}`
    """
    flags = re.NOFLAG if case_sensitive else re.IGNORECASE
    judge = re.fullmatch if full_match else re.search
    return float(judge(pattern, judged_text(rollout, scope), flags) is not None)


@reward(kind="rollout", range=(0.0, 1.0), check=_check_length)
def length(
    rollout: Rollout,
    *,
    min_words: int | None = None,
    max_words: int | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    scope: Scope = "last",
) -> float:
    """1 when the length is within all bounds, ends included, else 0. Range [0, 1].

    Words are separated by white space; characters count after stripping.

    Example: `length: {params: {min_words: 20, max_words: 60}}`
    """
    text = judged_text(rollout, scope).strip()
    sizes = ((len(text.split()), min_words, max_words), (len(text), min_chars, max_chars))
    return float(
        all(
            (low is None or size >= low) and (high is None or size <= high)
            for size, low, high in sizes
        )
    )


@reward(kind="rollout", range=(0.0, 1.0), check=_check_exact)
def exact_match(
    rollout: Rollout,
    *,
    tag: str | None = None,
    pattern: str | None = None,
    boxed: bool = False,
    normalize: Normalize = "strip",
    scope: Scope = "last",
) -> float:
    r"""1 when the text equals one of the task's answers, else 0. Range [0, 1].

    The text is first narrowed to the last `<tag>`, the last match of `pattern` (its first group),
    the last `\boxed{}`, in that order, as far as they are set; 0 when one is not found.
    `normalize`, on both sides: `none`; `strip` (white space collapsed); `lower` (and lower case);
    `squad` (and no punctuation or articles). Raises ValueError when the task has no answer.

    Example: `exact_match: {params: {tag: answer, normalize: lower}}`
    """
    answers = accepted_answers(rollout)
    found = extract(judged_text(rollout, scope), tag, pattern, boxed)
    normal = _NORMALIZERS[normalize]
    return float(found is not None and any(normal(found) == normal(str(a)) for a in answers))


@reward(kind="rollout", range=(0.0, 1.0), check=check_pattern)
def f1(
    rollout: Rollout,
    *,
    tag: str | None = None,
    pattern: str | None = None,
    scope: Scope = "last",
) -> float:
    """Token F1 with the best of the task's answers, normalised as in SQuAD. Range [0, 1].

    Narrowed like `exact_match`; 0 when nothing is found, and when only one side is yes, no or
    noanswer. Raises ValueError when the task has no answer.

    Example: `f1: {params: {tag: answer}}`
    """
    answers = accepted_answers(rollout)
    found = extract(judged_text(rollout, scope), tag, pattern, boxed=False)
    return 0.0 if found is None else squad_f1_score(found, answers)


@reward(kind="rollout", range=(0.0, 1.0), check=check_pattern)
def squad_em(
    rollout: Rollout,
    *,
    tag: str | None = None,
    pattern: str | None = None,
    scope: Scope = "last",
) -> float:
    """1 when the text equals an answer, normalised as in SQuAD, else 0. Range [0, 1].

    Narrowed like `exact_match`. Raises ValueError when the task has no answer.

    Example: `squad_em: {params: {tag: answer}}`
    """
    answers = accepted_answers(rollout)
    found = extract(judged_text(rollout, scope), tag, pattern, boxed=False)
    return 0.0 if found is None else squad_em_score(found, answers)
