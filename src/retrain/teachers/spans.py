"""Log-probabilities of one text under two tokenizers, compared span by span.

Both token sequences of a text are cut wherever both have a token's end at the same byte. Between
two cuts lies a span: n tokens of the student, m of the teacher, the same text. A span's difference
L_T - L_S of summed log-probabilities is shared equally by its n tokens, so that sums over spans,
and over the message, are exact; within a span, which is the shortest piece of text that both can
tell apart, nothing is known of the tokens' shares.

What the sums speak of is one tokenization of the text. Let P(t) be the probability that the teacher
gives to the text t, over all its tokenizations, and P(c) that of the canonical one c, which is
scored. Then P(c) <= P(t), and

    -log P(c) = -log P(t) - log r,    r = P(c) / P(t), the canonical share,

so the teacher's surprise -log P(t) is overestimated by exactly -log r >= 0. The same holds of the
student with the tokens that it sampled. The difference of two marginal log-probabilities,
log P_T(t) - log P_S(t), is therefore off by log r_T - log r_S, which lies between log r_T and
-log r_S. For models whose text was tokenized canonically in training, r is close to 1 (Cao &
Rimell, 2021, "You should evaluate your language model on marginal likelihood over tokenisations").
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """A piece of text: tokens [start, end) of the student, [teacher_start, teacher_end) of the
    teacher."""

    start: int
    end: int
    teacher_start: int
    teacher_end: int


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Cut]:
    """The spans of two token sequences, each token given by its bytes, as far as the two texts are
    the same; the tokens from the first difference on are in none.

    Tokens without bytes belong to the span before them, at the start to the first.
    """
    limit = _common(b"".join(student), b"".join(teacher))
    ends, others = _ends(student, limit), _ends(teacher, limit)
    cuts: list[Cut] = []
    start = teacher_start = 0
    for place, end in ends.items():
        if place > 0 and place in others:
            cuts.append(Cut(start, end, teacher_start, others[place]))
            start, teacher_start = end, others[place]
    return cuts


def shared_out(
    cuts: Sequence[Cut], student: Sequence[float], teacher: Sequence[float]
) -> array[float]:
    """One log-probability a token of the student [T]; NaN where no span is.

    In each span, what the numbers have more than `student` is the same for all tokens, and adds up
    to the span's difference.

    Args:
        student: log-probabilities of its tokens [T].
        teacher: of its own tokens [M].
    """
    found = array("d", [float("nan")]) * len(student)
    for cut in cuts:
        own = sum(student[cut.start : cut.end])
        other = sum(teacher[cut.teacher_start : cut.teacher_end])
        more = (other - own) / (cut.end - cut.start)
        for place in range(cut.start, cut.end):
            found[place] = student[place] + more
    return found


def _common(a: bytes, b: bytes) -> int:
    """How many bytes two texts share at their start."""
    if a == b:
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _ends(pieces: Sequence[bytes], limit: int) -> dict[int, int]:
    """From each place in the text up to `limit` where a token ends, to how many tokens end by
    then."""
    ends: dict[int, int] = {}
    place = 0
    for count, piece in enumerate(pieces, 1):
        place += len(piece)
        if place > limit:
            break
        ends[place] = count
    return ends
