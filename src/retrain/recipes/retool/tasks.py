r"""Traces for a cold start: the demo's teacher, who answers as ReTool has it.

The tasks are the demo's own, `retrain.recipes.demo.tasks:tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from retrain.recipes.demo import tasks as demo


def traces(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    r"""`n` conversations as rows of messages; each ends with `<answer>\boxed{...}</answer>`."""
    for row in demo.traces(n, seed=seed):
        *before, last = row["messages"]
        answer = {"role": "assistant", "content": boxed(last["content"])}
        yield row | {"messages": [*before, answer]}


def boxed(answer: str) -> str:
    """An answer as the reward reads it."""
    return f"<answer>\\boxed{{{answer}}}</answer>"


def corpus(n: int = 500) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from."""
    generator = random.Random("corpus:retool")
    yield from demo.corpus(n)
    yield from (boxed(str(generator.randint(100, 99999))) for _ in range(n))
