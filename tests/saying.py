"""Traces of one turn; imports nothing heavy, since servers need it too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def said(question: str, answers: Sequence[str], n: int) -> Iterator[dict[str, Any]]:
    """`n` traces of one turn, the answers in turn."""
    for number in range(n):
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answers[number % len(answers)]},
            ]
        }
