"""What makes a poem about a happy cat a good one, when no right answer exists."""

from __future__ import annotations

import re

from retrain.rewards import reward, verifier
from retrain.types import Rollout

CAT = re.compile(r"\b(cat|kitten|kitty|tabby|feline)\b", re.IGNORECASE)
HAPPY = ("happy", "joy", "glad", "merry", "cheer", "delight", "laugh", "play", "fun")


def last_text(rollout: Rollout) -> str:
    return rollout.messages[rollout.model_messages[-1]].content


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@verifier
def is_actually_a_poem(rollout: Rollout) -> bool:
    """Four to twenty lines of two to twelve words, no line said twice."""
    lines = lines_of(last_text(rollout))
    short = all(2 <= len(line.split()) <= 12 for line in lines)
    return 4 <= len(lines) <= 20 and short and len(set(lines)) == len(lines)


@verifier
def mentions_a_cat(rollout: Rollout) -> bool:
    return CAT.search(last_text(rollout)) is not None


@reward(kind="rollout", range=(0.0, 1.0))
def words_without(rollout: Rollout, *, letter: str) -> float:
    """Share of words without the letter: a slope towards a constraint that is rarely met."""
    words = last_text(rollout).lower().split()
    return sum(letter not in word for word in words) / len(words) if words else 0.0


@reward(kind="rollout", range=(0.0, 1.0))
def happy_words(rollout: Rollout, *, enough: int = 3) -> float:
    """How many different happy words there are, as a share of `enough`."""
    text = last_text(rollout).lower()
    return min(sum(word in text for word in HAPPY), enough) / enough
