"""Writes problems.jsonl: arithmetic word problems with integer answers.

Three forms over a (three digits), b and c (two digits): a*b+c, (a-b)*c and a*b-c. The numbers
appear in the order a, b, c; only the wording says which form it is.

    python examples/word_problems/make_problems.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

SEED = 0
PER_FORM = 100

ITEMS = [
    "nails",
    "pens",
    "apples",
    "coins",
    "beans",
    "shells",
    "cards",
    "stamps",
    "bolts",
    "eggs",
    "pins",
    "keys",
    "tiles",
    "beads",
    "plums",
    "nuts",
]
HOLDERS = {
    "crate": "crates",
    "box": "boxes",
    "bag": "bags",
    "tin": "tins",
    "jar": "jars",
    "chest": "chests",
    "basket": "baskets",
    "cart": "carts",
}
NAMES = [
    "Ana",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Noa",
    "Otto",
    "Pia",
]

TEMPLATES = {
    "a*b+c": (
        "A {holder} holds {a} {items}. How many {items} are in {b} {holders} plus {c} loose "
        "{items}?",
        "{name} has {a} {items} in each of {b} {holders} and {c} more in hand. How many {items} "
        "in all?",
        "Each {holder} has {a} {items}. {name} buys {b} {holders} and finds {c} {items}. How many "
        "{items} now?",
        "{name} sells {a} {items} a day for {b} days, then {c} more. How many {items} were sold?",
    ),
    "(a-b)*c": (
        "A {holder} had {a} {items} and lost {b}. How many {items} are in {c} such {holders}?",
        "{name} fills a {holder} with {a} {items} and takes {b} out. How many {items} do {c} such "
        "{holders} hold?",
        "Of {a} {items} in each {holder}, {b} are bad. How many good {items} are in {c} {holders}?",
        "{name} gets {a} {items} a day and gives {b} away. How many {items} are kept in {c} days?",
    ),
    "a*b-c": (
        "A {holder} holds {a} {items}. {name} has {b} {holders} and loses {c} {items}. How many "
        "{items} are left?",
        "{name} packs {a} {items} in each of {b} {holders}. Then {c} {items} break. How many are "
        "whole?",
        "There are {a} {items} in every {holder}. From {b} {holders}, {name} takes {c}. How many "
        "{items} remain?",
        "{name} makes {a} {items} a day for {b} days and sells {c}. How many {items} are unsold?",
    ),
}
ANSWERS: dict[str, Callable[[int, int, int], int]] = {
    "a*b+c": lambda a, b, c: a * b + c,
    "(a-b)*c": lambda a, b, c: (a - b) * c,
    "a*b-c": lambda a, b, c: a * b - c,
}


def make_problems(seed: int = SEED, per_form: int = PER_FORM) -> list[dict[str, object]]:
    """Problems with different prompts, the forms and their templates in turn."""
    generator = random.Random(seed)
    problems: list[dict[str, object]] = []
    prompts: set[str] = set()
    forms = list(TEMPLATES)
    while len(problems) < per_form * len(forms):
        turn, which = divmod(len(problems), len(forms))
        form = forms[which]
        template = TEMPLATES[form][turn % len(TEMPLATES[form])]
        a = generator.randint(100, 999)
        b, c = generator.randint(10, 99), generator.randint(10, 99)
        holder, holders = generator.choice(list(HOLDERS.items()))
        prompt = template.format(
            a=a,
            b=b,
            c=c,
            name=generator.choice(NAMES),
            items=generator.choice(ITEMS),
            holder=holder,
            holders=holders,
        )
        if prompt in prompts:
            continue
        prompts.add(prompt)
        number = len(problems) + 1
        answer = ANSWERS[form](a, b, c)
        problems.append({"id": f"wp-{number:03}", "prompt": prompt, "answer": answer, "form": form})
    return problems


def main() -> None:
    lines = [json.dumps(problem) + "\n" for problem in make_problems()]
    Path(__file__).with_name("problems.jsonl").write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main()
