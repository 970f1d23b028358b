"""Small tasks for a Python tool that one call does not solve, and a teacher that is often wrong.

`chain`: a product decides what is done with it, so the second call follows from the first one's
result. `guard`: a division that fails for some operands, which only the tool's error tells.

Operands decide the part: a pair (a, b) is held out for all its tasks together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

Part = Literal["train", "test"]
Form = Literal["chain", "guard"]
FORMS: tuple[Form, ...] = ("chain", "guard")

FAILED = "ZeroDivisionError"
"""The teacher's error; the sandbox's own wording differs and starts with the same word."""

_MIXER = 2654435761
"""Knuth's multiplicative hash: spreads the held-out fifth over all operands."""


def tasks(part: Part, n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` distinct tasks of one part, half of each form: rows with prompt, answer and form."""
    generator = random.Random(f"{seed}:{part}:toolgrpo")
    seen: set[str] = set()
    while len(seen) < n:
        row = _task(FORMS[len(seen) % len(FORMS)], part, generator)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def traces(n: int, *, seed: int = 0, share_right: float = 0.4) -> Iterator[dict[str, Any]]:
    """`n` conversations of the teacher on training tasks, as rows of messages.

    `share_right` of its calls are what the task asks for, each call for itself. What the teacher
    answers always follows from the last result, so that only calls are there to be learnt better.
    """
    generator = random.Random(f"{seed}:traces:toolgrpo")
    for number in range(n):
        row = _task(FORMS[number % len(FORMS)], "train", generator)
        teach = _chain if row["form"] == "chain" else _guard
        messages = [{"role": "user", "content": row["prompt"]}]
        for call, result in teach(row, generator, share_right):
            messages.append({"role": "assistant", "content": f"```python\n{call}\n```\n"})
            messages.append({"role": "tool", "name": "python", "content": result})
        answer = result if result.isdigit() else "0"
        messages.append({"role": "assistant", "content": f"\\boxed{{{answer}}}"})
        yield {"messages": messages, "form": row["form"], "answer": row["answer"]}


def corpus(n: int = 500) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from."""
    generator = random.Random("corpus:toolgrpo")
    for number in range(n):
        prompt = _task(FORMS[number % len(FORMS)], "train", generator)["prompt"]
        yield f"User:\n{prompt}\n\nAssistant:\n"
        yield f"```python\n7\n```\n{FAILED}: division by zero\n```\n\\boxed{{7}}"
    yield from ("+", "*", "//", "(", "%", ")", "\n") * n


def _task(form: Form, part: Part, generator: random.Random) -> dict[str, Any]:
    a, b = _operands(form, part, generator)
    c = generator.randint(100, 999)
    if form == "chain":
        prompt = f"Multiply {a} by {b}. Halve an even product, triple an odd one."
        product = a * b
        answer = product // 2 if product % 2 == 0 else product * 3
    else:
        prompt = f"Divide {c} by the remainder of {a} by {b}. Say 0 if it fails."
        answer = c // (a % b) if a % b else 0
    return {"prompt": prompt, "answer": str(answer), "form": form, "a": a, "b": b, "c": c}


def _operands(form: Form, part: Part, generator: random.Random) -> tuple[int, int]:
    """Two digits each for a product; for a remainder three and two, a third of them without one."""
    whole = generator.random() < 1 / 3
    while True:
        a, b = generator.randint(10, 99), generator.randint(10, 99)
        if form == "guard":
            a = b * generator.randint(2, 9) if whole else generator.randint(100, 999)
        if form == "guard" and not 100 <= a <= 999:
            continue
        held_out = (a * 100 + b) * _MIXER % 2**32 % 5 == 0
        if held_out == (part == "test"):
            return a, b


def _chain(
    row: dict[str, Any], generator: random.Random, share_right: float
) -> Iterator[tuple[str, str]]:
    """Multiply (or mistakenly add), then halve or triple what came of it, or the other one."""
    a, b = row["a"], row["b"]
    right = generator.random() < share_right
    first = a * b if right else a + b
    yield (f"{a}*{b}" if right else f"{a}+{b}"), str(first)
    halve = (first % 2 == 0) == (generator.random() < share_right)
    yield (f"{first}//2", str(first // 2)) if halve else (f"{first}*3", str(first * 3))


def _guard(
    row: dict[str, Any], generator: random.Random, share_right: float
) -> Iterator[tuple[str, str]]:
    """Divide by the remainder, or mistakenly without the brackets."""
    a, b, c = row["a"], row["b"], row["c"]
    if generator.random() >= share_right:
        yield f"{c}//{a}%{b}", str(c // a % b)
        return
    result = str(c // (a % b)) if a % b else f"{FAILED}: division by zero"
    yield f"{c}//({a}%{b})", result
