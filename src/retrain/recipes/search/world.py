"""An invented world to search: who lives and works where, and what the towns have.

A question takes two hops: "What is the river of the town where mira lives?" needs the town first.
The people, towns and things of the training part and of the held-out part have no name in common;
the facts of both lie in one corpus.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["train", "test"]

VERBS = ("lives", "works")
THINGS = ("river", "dish", "mayor")
PEOPLE: dict[Part, int] = {"train": 1000, "test": 300}
TOWNS: dict[Part, int] = {"train": 400, "test": 100}
_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
"""A name is two of these."""

SHARES = {"right": 0.25, "other thing": 0.1, "stops early": 0.35, "guesses": 0.3}
"""What the teacher's traces do: search twice and answer; search for another thing of the town;
answer with the town; answer without a search."""


@dataclass(frozen=True)
class World:
    people: dict[Part, tuple[str, ...]]
    towns: dict[Part, tuple[str, ...]]
    place: dict[tuple[str, str], str]
    """The town where (person, verb)."""
    thing: dict[tuple[str, str], str]
    """Its name, of (town, thing)."""


@functools.cache
def world(seed: int = 0) -> World:
    """The same one for the same seed."""
    generator = random.Random(f"{seed}:world")
    names = [first + second for first in _SYLLABLES for second in _SYLLABLES]
    generator.shuffle(names)

    def take(count: int) -> tuple[str, ...]:
        return tuple(names.pop() for _ in range(count))

    people = {part: take(count) for part, count in PEOPLE.items()}
    towns = {part: take(count) for part, count in TOWNS.items()}
    place = {}
    for part, who in people.items():
        for person in who:
            pair = generator.sample(towns[part], len(VERBS))
            place.update({(person, verb): town for verb, town in zip(VERBS, pair, strict=True)})
    thing = {
        (town, kind): name
        for part in towns
        for town in towns[part]
        for kind, name in zip(THINGS, take(len(THINGS)), strict=True)
    }
    return World(people, towns, place, thing)


def passages(*, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows of the corpus: one fact each."""
    facts = world(seed)
    for (person, verb), town in facts.place.items():
        yield {"text": place_fact(person, verb, town)}
    for (town, kind), name in facts.thing.items():
        yield {"text": thing_fact(town, kind, name)}


def place_fact(person: str, verb: str, town: str) -> str:
    return f"{person} {verb} in {town}"


def thing_fact(town: str, kind: str, name: str) -> str:
    return f"the {kind} of {town} is {name}"


def tasks(part: Part, n: int, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """`n` distinct questions of one part, with answer, person, verb, town and kind."""
    facts = world(seed)
    asked = [(*key, kind) for key in facts.place for kind in THINGS if key[0] in facts.people[part]]
    for person, verb, kind in random.Random(f"{seed}:{part}:tasks").sample(asked, n):
        yield _task(facts, person, verb, kind)


def traces(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` conversations of a teacher who is mostly wrong, on training questions."""
    facts = world(seed)
    generator = random.Random(f"{seed}:traces")
    for _ in range(n):
        person = generator.choice(facts.people["train"])
        task = _task(facts, person, generator.choice(VERBS), generator.choice(THINGS))
        habit = generator.choices(list(SHARES), list(SHARES.values()))[0]
        yield {"messages": _trace(facts, task, habit, generator), "habit": habit}


def corpus(*, seed: int = 0) -> Iterator[str]:
    """Texts for the tokenizer to learn its merges from: a syllable becomes one token, at the
    beginning of a word or after a space."""
    for syllable in _SYLLABLES:
        yield f"{syllable}\n" * 5000 + f" {syllable}" * 5000
    for trace in traces(1500, seed=seed):
        for message in trace["messages"]:
            yield f"{message['role'].capitalize()}:\n{message['content']}\n\n"


class Lookup:
    """A tool that no stage trains with: the register of the world of seed 0, by name and word.

    Args:
        terse: answer `works: tolun`, not with the sentence of the corpus.
    """

    name = "lookup"

    def __init__(self, terse: bool = False) -> None:
        self.terse = terse

    def __call__(self, query: str) -> str:
        """Look a name up in the register.

        Args:
            query: a name, and what is asked of it
        """
        facts, words = world(), query.split()
        for asked in words:
            for name in words:
                if (name, asked) in facts.place:
                    town = facts.place[name, asked]
                    return f"{asked}: {town}" if self.terse else place_fact(name, asked, town)
                if (name, asked) in facts.thing:
                    thing = facts.thing[name, asked]
                    return f"{asked}: {thing}" if self.terse else thing_fact(name, asked, thing)
        return "no such entry"


def _task(facts: World, person: str, verb: str, kind: str) -> dict[str, str]:
    town = facts.place[person, verb]
    return {
        "prompt": f"What is the {kind} of the town where {person} {verb}?",
        "answer": facts.thing[town, kind],
        "person": person,
        "verb": verb,
        "town": town,
        "kind": kind,
    }


def _trace(
    facts: World, task: dict[str, str], habit: str, generator: random.Random
) -> list[dict[str, Any]]:
    person, verb, town, kind = task["person"], task["verb"], task["town"], task["kind"]
    messages: list[dict[str, Any]] = [{"role": "user", "content": task["prompt"]}]

    def search(query: str, found: str) -> None:
        call = {"role": "assistant", "content": f"<search>{query}</search>"}
        result = {"role": "tool", "name": "search", "tool_call_id": "0", "content": found}
        messages.extend((call, result))

    answer = town
    if habit == "guesses":
        answer = facts.thing[generator.choice(facts.towns["train"]), kind]
    if habit != "guesses":
        search(f"where {person} {verb}", f"Doc 1 {place_fact(person, verb, town)}")
    if habit in ("right", "other thing"):
        if habit == "other thing":
            kind = generator.choice([other for other in THINGS if other != kind])
        answer = facts.thing[town, kind]
        search(f"{kind} of {town}", f"Doc 1 {thing_fact(town, kind, answer)}")
    return [*messages, {"role": "assistant", "content": answer}]
