"""The agent's questions: the demo's word problems, for training and held out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from retrain.recipes.demo.tasks import Part, tasks

SYSTEM = "Use the calculator. Answer with the number."
"""As agent.py has it, whose import takes seconds."""


def questions(part: Part, n: int) -> Iterator[dict[str, Any]]:
    """`n` distinct ones of one part: rows with prompt, answer and form."""
    worded = (row for row in tasks(part, 3 * n) if not row["prompt"].startswith("What"))
    yield from islice(worded, n)


def corpus(n: int = 500) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from."""
    for row in questions("train", n):
        yield f"System:\n{SYSTEM}\n\nUser:\n{row['prompt']}\n\nAssistant:\n"
    yield from ("+", "-", "*", "(", ")") * n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print questions with answers, a line each.")
    parser.add_argument("--part", choices=("train", "test"), default="train")
    parser.add_argument("-n", type=int, default=5000)
    given = parser.parse_args()
    for row in questions(given.part, given.n):
        print(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}))
