"""The demo's arithmetic: forms of expressions, their tasks, and a teacher that is often wrong.

Operands decide the part: a triple (a, b, c) is held out for all forms and phrasings together, so
that no held-out prompt, nor another phrasing of it, is ever trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["train", "test"]

_MIXER = 2654435761
"""Knuth's multiplicative hash: spreads the held-out fifth over all operands."""

THINGS = ("pens", "nails", "eggs", "cards", "coins", "books", "seeds", "bolts")


@dataclass(frozen=True)
class Form:
    """A kind of task. The texts are format strings over a, b, c."""

    name: str
    expression: str
    words: str = ""
    """The word problem that half of its tasks are; empty for none."""
    question: str = "What is {expression}?"
    wrong: str = ""
    """The expression of a mistaken trace."""
    share_right: float = 0.75
    """Of the traces that use the tool, how many use it rightly."""
    share_direct: float = 0.4
    """Of all traces, how many give the answer without the tool."""


FORMS = {
    form.name: form
    for form in (
        Form(
            "a*b+c",
            "{a}*{b}+{c}",
            "{b} boxes of {a} {thing} and {c} loose {thing}. How many {thing}?",
            wrong="{a}+{b}*{c}",
        ),
        Form(
            "(a-b)*c",
            "({a}-{b})*{c}",
            "Of {a} {thing} {b} are lost. The rest sell for {c} each. How much?",
            wrong="({a}+{b})*{c}",
        ),
        Form(
            "a*b-c",
            "{a}*{b}-{c}",
            "{b} boxes of {a} {thing}, but {c} {thing} break. How many {thing}?",
            wrong="{a}-{b}*{c}",
            share_right=0.1,
            share_direct=0.0,
        ),
        Form("a**3", "{a}{b}**3", question="What is the cube of {a}{b}?"),
    )
}
"""The teacher of `a*b-c` is wrong nine times in ten; `a**3` has no teacher."""

TAUGHT = ("a*b+c", "(a-b)*c", "a*b-c")


def tasks(
    part: Part,
    n: int,
    *,
    seed: int = 0,
    forms: dict[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """`n` distinct tasks of one part: rows with prompt, answer and form.

    `forms` are the forms' shares; by default each taught form has the same.
    """
    shares = forms or dict.fromkeys(TAUGHT, 1.0)
    generator = random.Random(f"{seed}:{part}:tasks")
    seen: set[str] = set()
    while len(seen) < n:
        form = FORMS[generator.choices(list(shares), list(shares.values()))[0]]
        row = _task(form, part, generator)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def traces(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` conversations of the teacher on training tasks, as rows of messages."""
    generator = random.Random(f"{seed}:traces")
    for _ in range(n):
        form = FORMS[generator.choice(TAUGHT)]
        task = _task(form, "train", generator)
        messages = _trace(task, form, generator)
        yield {"messages": messages, "form": form.name, "answer": task["answer"]}


def corpus(n: int = 500) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from, one a phrasing."""
    generator = random.Random("corpus")
    for _ in range(n):
        for form in FORMS.values():
            prompt = _task(form, "train", generator)["prompt"]
            yield f"User:\n{prompt}\n\nAssistant:\n"
    yield from ("+", "-", "*", "(", ")") * n


def _task(form: Form, part: Part, generator: random.Random) -> dict[str, Any]:
    a, b, c = _operands(part, generator, fixed_c=not form.words)
    values = {"a": a, "b": b, "c": c, "thing": generator.choice(THINGS)}
    worded = bool(form.words) and generator.random() < 0.5
    question = form.words if worded else form.question
    return {
        "prompt": question.format(**values, expression=form.expression.format(**values)),
        "answer": str(_evaluate(form.expression.format(**values))),
        "form": form.name,
        "a": a,
        "b": b,
        "c": c,
    }


def _operands(part: Part, generator: random.Random, *, fixed_c: bool) -> tuple[int, int, int]:
    """Three digits, two and two; `fixed_c` for a form that does not show c, where another c would
    put the same prompt into both parts."""
    while True:
        a, b = generator.randint(100, 999), generator.randint(10, 99)
        c = 10 if fixed_c else generator.randint(10, 99)
        held_out = ((a * 100 + b) * 100 + c) * _MIXER % 2**32 % 5 == 0
        if held_out == (part == "test"):
            return a, b, c


def _trace(task: dict[str, Any], form: Form, generator: random.Random) -> list[dict[str, Any]]:
    question = {"role": "user", "content": task["prompt"]}
    if generator.random() < form.share_direct:
        return [question, {"role": "assistant", "content": task["answer"]}]
    right = generator.random() < form.share_right
    expression = (form.expression if right else form.wrong).format(**task)
    result = str(_evaluate(expression))
    return [
        question,
        {"role": "assistant", "content": f"<code>{expression}</code>"},
        {"role": "tool", "name": "python", "tool_call_id": "0", "content": result},
        {"role": "assistant", "content": result},
    ]


def _evaluate(expression: str) -> int:
    """The value of an expression that this module wrote."""
    value = eval(expression, {"__builtins__": {}})
    assert isinstance(value, int)
    return value
