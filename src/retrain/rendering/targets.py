"""The words of a MODEL message that no engine sampled, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

THINK = "<think>"


def thought(reasoning: str) -> str:
    """Reasoning as text, for templates that have no place for it."""
    return f"{THINK}\n{reasoning.strip()}\n</think>\n\n"


def share(said: str, pieces: Sequence[str], index: int) -> str:
    """What piece `index` contributes to a block that the template wrote as `said`.

    The first piece takes what the template puts before the words; white space that the template
    trims goes from the first and the last. A block that the template rewrote is left as it is.
    """
    if len(pieces) == 1:
        return said
    whole = "".join(pieces)
    words = whole.strip()
    lead = said.rfind(words)
    if lead < 0:
        return pieces[index]
    begins = len(whole) - len(whole.lstrip())
    start = max(begins, sum(map(len, pieces[:index])))
    stop = min(begins + len(words), sum(map(len, pieces[: index + 1])))
    text = whole[start : max(start, stop)]
    if index == 0:
        text = said[:lead] + text
    if index == len(pieces) - 1:
        text += said[lead + len(words) :]
    return text
