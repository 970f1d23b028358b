"""A small world for Router-R1: questions, and experts that know different things at different
prices, behind a real OpenAI-compatible server on this machine.

| expert | price | knows |
|---|---|---|
| scout | 1 | sums, and every other town |
| clerk | 2 | codes |
| sage | 6 | sums, and all towns |

A number is held out for all kinds of questions together.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["train", "test"]

TOWNS = tuple(
    "Accra Bergen Cairo Delhi Essen Faro Genoa Hanoi Izmir Jaffa Kyoto Lima Minsk Nantes Oslo "
    "Porto Quito Riga Seoul Tunis Utrecht Vigo Warsaw York".split()
)
UNKNOWN = "unknown"
"""What an expert says of what it does not know."""

KINDS = ("sum", "town", "code", "both")


@dataclass(frozen=True)
class Expert:
    """A program that answers what it knows."""

    name: str
    price: float
    """Of a million output tokens; these experts write a token a character."""
    answers: Callable[[str], str | None]

    def reply(self, query: str) -> str:
        return self.answers(query) or UNKNOWN


def town_of(number: int) -> str:
    return TOWNS[_mixed(number, 1) % len(TOWNS)]


def code_of(number: int) -> int:
    return 100 + _mixed(number, 2) % 900


def scout_knows(number: int) -> bool:
    """Whether it knows the town of a number. Nothing in the question tells."""
    return _mixed(number, 3) % 2 == 0


def _mixed(number: int, salt: int) -> int:
    """Knuth's multiplicative hash, its upper half."""
    return (number * 31 + salt) * 2654435761 % 2**32 >> 16


def _sum(query: str) -> str | None:
    found = re.fullmatch(r"(\d+)\+(\d+)", query)
    return None if found is None else str(int(found[1]) + int(found[2]))


def _number_in(query: str, kind: str) -> int | None:
    found = re.fullmatch(rf"{kind} (\d{{3}})", query)
    return None if found is None else int(found[1])


def _scout(query: str) -> str | None:
    number = _number_in(query, "town")
    if number is not None:
        return town_of(number) if scout_knows(number) else None
    return _sum(query)


def _clerk(query: str) -> str | None:
    number = _number_in(query, "code")
    return None if number is None else str(code_of(number))


def _sage(query: str) -> str | None:
    number = _number_in(query, "town")
    return _sum(query) if number is None else town_of(number)


EXPERTS = (
    Expert("scout", 1.0, _scout),
    Expert("clerk", 2.0, _clerk),
    Expert("sage", 6.0, _sage),
)
NAMES = tuple(expert.name for expert in EXPERTS)
BY_NAME = {expert.name: expert for expert in EXPERTS}


def tasks(part: Part, n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` distinct questions of one part: rows with prompt, answer and kind, and what `routes`
    needs."""
    generator = random.Random(f"{seed}:{part}:router tasks")
    seen: set[str] = set()
    while len(seen) < n:
        row = _task(KINDS[len(seen) % len(KINDS)], part, generator)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def traces(n: int, *, seed: int = 0, share_sloppy: float = 0.1) -> Iterator[dict[str, Any]]:
    """`n` conversations of a teacher that knows the protocol but not the experts: it asks any of
    them, and now and then forgets to think."""
    generator = random.Random(f"{seed}:router traces")
    for _ in range(n):
        task = _task(generator.choice(KINDS), "train", generator)
        thinks = generator.random() >= share_sloppy
        messages = [{"role": "user", "content": task["prompt"]}]
        told = ""
        for turn, kind in enumerate(hops(task["kind"])):
            expert = BY_NAME[generator.choice(NAMES)]
            query = query_of(kind, task["subject"] if turn == 0 else told)
            messages += _consultation(expert, kind if thinks else None, query, turn)
            told = expert.reply(query)
            if told == UNKNOWN:
                break
        messages.append({"role": "assistant", "content": f"<answer>{told}</answer>"})
        yield {"messages": messages}


def corpus(n: int = 200) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from."""
    generator = random.Random("router corpus")
    for kind in KINDS * n:
        yield f"User:\n{_task(kind, 'train', generator)['prompt']}\n\nAssistant:\n"
    for name in NAMES:
        yield from (f"<search>{name}:town", f"<search>{name}:code", f"<search>{name}:") * n
    yield from (*TOWNS, UNKNOWN, "sum", "+") * n


def hops(kind: str) -> tuple[str, ...]:
    """What has to be asked, one after the other; a later question is about the earlier answer."""
    return ("code", "town") if kind == "both" else (kind,)


def query_of(kind: str, subject: str) -> str:
    return subject if kind == "sum" else f"{kind} {subject}"


_QUESTIONS = {
    "sum": "What is {}?",
    "town": "Which town is {}?",
    "code": "What is the code of {}?",
    "both": "Which town is the code of {}?",
}


def _task(kind: str, part: Part, generator: random.Random) -> dict[str, Any]:
    if kind == "sum":
        a, b = generator.randint(10, 99), _number(part, generator)
        subject, answer = f"{a}+{b}", str(a + b)
    else:
        number = _number(part, generator)
        subject = str(number)
        known = {"town": town_of(number), "code": str(code_of(number))}
        answer = town_of(code_of(number)) if kind == "both" else known[kind]
    prompt = _QUESTIONS[kind].format(subject)
    return {"prompt": prompt, "answer": answer, "kind": kind, "subject": subject}


def _number(part: Part, generator: random.Random) -> int:
    while True:
        number = generator.randint(100, 999)
        if (_mixed(number, 4) % 5 == 0) == (part == "test"):
            return number


def _consultation(
    expert: Expert, thought: str | None, query: str, turn: int
) -> list[dict[str, Any]]:
    thinking = "" if thought is None else f"<think>{thought}</think>"
    said = f"{thinking}<search>{expert.name}:{query}</search>"
    return [
        {"role": "assistant", "content": said},
        {
            "role": "tool",
            "name": "route",
            "tool_call_id": str(turn),
            "content": expert.reply(query),
        },
    ]
