"""Poems on cats from a small grammar, good and bad ones, for a model that knows no English yet."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

Part = Literal["train", "test"]

KINDS = ("a poem", "a rhyme", "a verse", "a ditty", "four lines", "a little song")
ABOUT = ("a happy cat", "a merry kitten", "a glad tabby", "an old cat", "my kitten", "a fat kitty")
WISHES = (
    "Never use the letter s.",
    "No word may have an s.",
    "Do without any s, please.",
    "The letter s is forbidden.",
    "Avoid the letter s.",
)

PLAIN = (
    ("the happy cat", "a merry kitten", "my glad tabby", "the old cat", "a fat kitty", "a kitten"),
    ("will play", "can jump", "may nap", "will purr", "can laugh", "will run"),
    ("by the fire", "in golden light", "near the door", "all day long", "with a ball", "at noon"),
)
"""Subjects, verbs and places without the letter."""
WITH_S = (
    ("this cat", "his kitten", "Whiskers the cat"),
    ("sits", "sleeps", "runs and plays"),
    ("in the sun", "on the grass", "under the stars"),
)
DOGS = ("the old dog", "a grey bird", "my brown pony", "the little mole")

SHARE_S = 0.2
"""Of a line's three parts, how many have the letter."""
SHARE_NO_POEM, SHARE_NO_CAT = 0.15, 0.15


def tasks(part: Part) -> Iterator[dict[str, Any]]:
    """Every prompt of one part; a fifth of all is held out."""
    for number, row in enumerate(_prompts()):
        if (number % 5 == 0) == (part == "test"):
            yield row


def traces(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` training prompts with an answer each: few are cat poems without the letter."""
    generator = random.Random(f"{seed}:traces:no_s_poem")
    prompts = [row["prompt"] for row in tasks("train")]
    for _ in range(n):
        question = {"role": "user", "content": generator.choice(prompts)}
        yield {"messages": [question, {"role": "assistant", "content": answer(generator)}]}


def corpus(n: int = 1000) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from."""
    generator = random.Random("corpus:no_s_poem")
    for row in _prompts():
        yield f"User:\n{row['prompt']}\n\nAssistant:\n"
    yield from (answer(generator) for _ in range(n))


def answer(generator: random.Random) -> str:
    """A poem of four lines; or one without a cat, or what is none: one line, or the same twice."""
    dice = generator.random()
    subjects = DOGS if dice < SHARE_NO_CAT else ()
    if dice > 1 - SHARE_NO_POEM:
        line = _line(generator, ())
        return generator.choice((line, f"{line}\n{line}\n{line}\n{line}"))
    lines: list[str] = []
    while len(lines) < 4:
        line = _line(generator, subjects)
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _line(generator: random.Random, subjects: tuple[str, ...]) -> str:
    parts = [
        generator.choice(with_s if generator.random() < SHARE_S else plain)
        for plain, with_s in zip(PLAIN, WITH_S, strict=True)
    ]
    if subjects:
        parts[0] = generator.choice(subjects)
    return " ".join(parts)


def _prompts() -> Iterator[dict[str, Any]]:
    combinations = [(kind, about, wish) for kind in KINDS for about in ABOUT for wish in WISHES]
    random.Random("prompts:no_s_poem").shuffle(combinations)
    for kind, about, wish in combinations:
        yield {"prompt": f"Write {kind} about {about}. {wish}"}
