"""Finding what to judge in a text: tags, boxes, numbers, normal forms. Pure functions.

The text is untrusted: every function is linear or nearly so in its length, and none raises on it.
"""

from __future__ import annotations

import re
import string
from collections import Counter, deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

from retrain.types import Rollout

Scope = Literal["last", "all"]

_BRACES = re.compile(r"(?P<box>\\{1,2}boxed\s*\{)|\\.|[{}]", re.DOTALL)
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_])(?<!\d\.)(?P<top>(?:{_UNSIGNED})(?:[eE][-+]?\d+)?)"
    rf"(?:\s*/\s*(?P<bottom>\d+(?:\.\d+)?))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))")
_SIGNS = {"-": -1, "−": -1, "–": -1, "+": 1}
_MAX_DIGITS = 400
_MAX_EXPONENT = 400
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def judged_text(rollout: Rollout, scope: Scope = "last") -> str:
    """The last MODEL message's content, or with `all` everything the model said."""
    if scope == "all":
        return rollout.completion
    turns = rollout.model_messages
    return rollout.messages[turns[-1]].content if turns else ""


def accepted_answers(rollout: Rollout) -> list[Any]:
    """The task's acceptable answers; `task.answer` may be one value or a list of them.

    Raises:
        ValueError: the task has no answer, so nothing can be compared.
    """
    answer = None if rollout.task is None else rollout.task.answer
    answers = list(answer) if isinstance(answer, list | tuple) else [answer]
    if not answers or any(item is None for item in answers):
        raise ValueError("the task has no answer to compare with (task.answer is empty)")
    return answers


def last_between_tags(text: str, tag: str) -> str | None:
    """What the last complete `<tag>...</tag>` holds."""
    end = text.rfind(f"</{tag}>")
    if end < 0:
        return None
    start = text.rfind(f"<{tag}>", 0, end)
    return None if start < 0 else text[start + len(tag) + 2 : end]


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, braces balanced, `\{` and `\}` not counted."""
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match["box"] is not None:
            open_braces.append((match.end(), True))
        elif match[0] == "{":
            open_braces.append((match.end(), False))
        elif match[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[best[0] : best[1]]


def last_fenced(text: str, language: str | None = None) -> str | None:
    """What the last complete fenced block holds; `language` None accepts any."""
    inside: list[str] | None = None
    wanted = False
    last: str | None = None
    for line in text.split("\n"):
        fence = line.strip()
        if inside is None:
            if fence.startswith("```") and "`" not in fence[3:]:
                label = fence[3:].strip().lower()
                wanted = language is None or label in ("", language)
                inside = []
        elif fence == "```":
            last = "\n".join(inside) if wanted else last
            inside = None
        else:
            inside.append(line)
    return last


def extract(text: str, tag: str | None, pattern: str | None, boxed: bool) -> str | None:
    r"""Narrow a text down: first to the last `<tag>`, then to the last match of `pattern` (its
    first group when it has one), then to the last `\boxed{}`. None when a step finds nothing.
    """
    found: str | None = text
    if tag is not None:
        found = last_between_tags(text, tag)
    if found is not None and pattern is not None:
        match = _last(re.finditer(pattern, found, re.DOTALL))
        found = None if match is None else (match[1] if match.re.groups else match[0])
    if found is not None and boxed:
        found = last_boxed(found)
    return found


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    tail = deque(matches, maxlen=1)
    return tail[0] if tail else None


def last_number(text: str) -> Fraction | None:
    r"""The last number written in a text, exactly.

    Reads `1,234`, `-3`, `.5`, `2.5e-3`, `3/4`, `\frac{3}{4}`; `50%` is 50. A minus after a digit,
    letter or closing bracket is an operator (`5-3` ends in 3), and digits glued to a letter
    (`x2`) are not a number. None for no number, a zero denominator, or one beyond 400 digits.
    """
    text = _plain(text)
    match = _last(_NUMBER.finditer(text))
    if match is None:
        return None
    return _value(match, _sign_before(text, match.start()))


def whole_number(text: str) -> Fraction | None:
    """The number that a text is, when it is nothing else."""
    text = _plain(text).strip()
    sign = _SIGNS.get(text[:1])
    match = _NUMBER.fullmatch(text if sign is None else text[1:].lstrip())
    return None if match is None else _value(match, sign or 1)


def _plain(text: str) -> str:
    def as_slash(match: re.Match[str]) -> str:
        top, bottom = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
        return f" {top}/{bottom}" if not _is_sign(text, match.start()) else f"{top}/{bottom}"

    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    return _LATEX_FRACTION.sub(as_slash, text)


def _is_sign(text: str, position: int) -> bool:
    return position > 0 and text[position - 1] in _SIGNS


def _sign_before(text: str, start: int) -> int:
    """The sign that belongs to a number at `start`: +1 when what stands there is an operator."""
    if not _is_sign(text, start):
        return 1
    before = text[start - 2] if start >= 2 else " "
    return 1 if before.isalnum() or before in ")]}_" else _SIGNS[text[start - 1]]


def _value(match: re.Match[str], sign: int) -> Fraction | None:
    top, bottom = match["top"].replace(",", ""), match["bottom"] or "1"
    mantissa, _, exponent = top.lower().partition("e")
    if len(mantissa) > _MAX_DIGITS or len(bottom) > _MAX_DIGITS or len(exponent) > 8:
        return None
    if abs(int(exponent or 0)) > _MAX_EXPONENT or Fraction(bottom) == 0:
        return None
    return sign * Fraction(top) / Fraction(bottom)


def squad_normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (the SQuAD evaluation script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad_em_score(prediction: str, answers: list[Any]) -> float:
    """1.0 when the prediction equals an answer after SQuAD normalisation."""
    normal = squad_normalize(prediction)
    return float(any(normal == squad_normalize(str(answer)) for answer in answers))


def squad_f1_score(prediction: str, answers: list[Any]) -> float:
    """Token F1 after SQuAD normalisation, best over the answers, in [0, 1].

    0 when only one side is yes, no or noanswer; 1 when both sides normalise to nothing.
    """
    return max(_token_f1(squad_normalize(prediction), squad_normalize(str(a))) for a in answers)


def _token_f1(prediction: str, answer: str) -> float:
    if prediction == answer:
        return 1.0
    if prediction in _CLOSED_ANSWERS or answer in _CLOSED_ANSWERS:
        return 0.0
    predicted, wanted = prediction.split(), answer.split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0
