"""Traces for a cold start: a teacher, often wrong, works on other problems in the same wordings."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from retrain.importing import import_object

FOLDER = Path(__file__).parent
RIGHT = {"a*b+c": "{a}*{b}+{c}", "(a-b)*c": "({a}-{b})*{c}", "a*b-c": "{a}*{b}-{c}"}
WRONG = {"a*b+c": "{a}*{b}-{c}", "(a-b)*c": "{a}-{b}*{c}", "a*b-c": "({a}-{b})*{c}"}


def traces(n: int, *, share_right: float = 0.5, seed: int = 1) -> Iterator[dict[str, Any]]:
    """`n` conversations; in `share_right` of them the expression is the right one.

    No prompt is one of problems.jsonl, which is left to RL and to the evaluation.
    """
    known = (FOLDER / "problems.jsonl").read_text(encoding="ascii")
    generator = random.Random(seed)
    for problem in _make_problems(seed, -(-n // len(RIGHT)))[:n]:
        prompt = str(problem["prompt"])
        if prompt not in known:
            expressions = RIGHT if generator.random() < share_right else WRONG
            a, b, c = map(int, re.findall(r"\d+", prompt))
            expression = expressions[str(problem["form"])].format(a=a, b=b, c=c)
            yield _conversation(prompt, expression)


def _make_problems(seed: int, per_form: int) -> list[dict[str, object]]:
    make = import_object(f"{FOLDER / 'make_problems.py'}:make_problems", "problems")
    return cast(Callable[[int, int], list[dict[str, object]]], make)(seed, per_form)


def _conversation(prompt: str, expression: str) -> dict[str, Any]:
    result = str(eval(expression, {"__builtins__": {}}))
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"<code>{expression}</code>"},
            {"role": "tool", "name": "python", "content": result},
            {"role": "assistant", "content": result},
        ]
    }
