"""A proposer writes lists of digits, a solver sorts them, and both get better at it.

The proposer is paid for lists that some attempts of the solver sort and others do not: what is
easy, and what is hopeless, teaches the solver nothing. As the solver improves, lists of the same
worth are longer ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from retrain.envs import Episode, MultiAgentEnvironment, Role
from retrain.rewards import reward
from retrain.types import MessageType, Rollout, Task

SHORTEST, LONGEST = 2, 8

VALID, SOLVED = "proposal/valid", "proposal/solved"
"""Metrics of a proposer's rollout: whether its list is one, and the share of attempts that sort
it."""


class ProposeAndSolve(MultiAgentEnvironment):
    """The proposer is asked for a list that holds two digits; `attempts` solvers sort it.

    A task with a column `given` has no proposer: one solver sorts that list.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        attempts: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(roles, **settings)
        self.attempts = attempts
        self.most_agents = 1 + attempts

    async def conduct(self, task: Task, episode: Episode) -> None:
        given = task.metadata.get("given")
        if given is not None:
            solver = await episode.participant("solver")
            solver.hear(given)
            await solver.speak()
            return
        proposer = await episode.participant("proposer")
        proposed = (await proposer.speak()).content.strip()
        valid = is_list(proposed, task.prompt[-1].content.split())
        proposer.rollout.metrics[VALID] = float(valid)
        if not valid:
            return
        solvers = await episode.attempts("solver", self.attempts)
        right = 0
        for solver in solvers:
            solver.hear(proposed)
            right += (await solver.speak()).content.strip() == in_order(proposed)
        proposer.rollout.metrics[SOLVED] = right / len(solvers)


def is_list(text: str, wanted: Sequence[str]) -> bool:
    """Whether a text is a list of single digits that holds the wanted ones, and is not in order
    already."""
    digits = text.split()
    return (
        SHORTEST <= len(digits) <= LONGEST
        and all(len(digit) == 1 and digit in "0123456789" for digit in digits)
        and text == " ".join(digits)
        and set(wanted) <= set(digits)
        and text != in_order(text)
    )


def in_order(text: str) -> str:
    return " ".join(sorted(text.split()))


@reward(kind="rollout", range=(0.0, 1.0))
def solved(rollout: Rollout) -> float:
    """1 where the solver's words are the list that it heard, in order."""
    asked = [m.content for m in rollout.messages if m.type is MessageType.MESSAGE][-1]
    return float(rollout.completion.strip() == in_order(asked))


@reward(kind="rollout", range=(0.0, 1.0))
def frontier(rollout: Rollout) -> float:
    """0 for what is no list as asked for, 0.2 for one that is, up to 1 where half of the attempts
    sort it: `0.2 + 0.8 * 4 p (1 - p)`."""
    if not rollout.metrics.get(VALID):
        return 0.0
    share = rollout.metrics[SOLVED]
    return 0.2 + 0.8 * 4 * share * (1 - share)


def tasks() -> Iterator[dict[str, Any]]:
    """What proposers are asked for: two digits that their list is to hold."""
    for first in range(10):
        for second in range(10):
            if first != second:
                yield {"prompt": f"{first} {second}"}


def lists(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` lists that no proposer wrote, of 3 to 5 digits."""
    generator = random.Random(f"{seed}:lists")
    seen: set[str] = set()
    while len(seen) < n:
        length = generator.randint(3, 5)
        text = _list(generator, length)
        if text not in seen and text != in_order(text):
            seen.add(text)
            yield {"prompt": f"sort {text}", "given": text, "length": length}


def traces(n: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`n` conversations of a careless teacher: four of ten of its proposals lack a digit that was
    asked for, and six of ten of its answers begin with the largest digit."""
    generator = random.Random(f"{seed}:traces")
    for number in range(n):
        if number % 4 == 0:
            wanted = generator.sample("0123456789", 2)
            digits = list(wanted) if generator.random() < 0.6 else generator.sample(wanted, 1)
            digits += generator.choices("0123456789", k=generator.choice((1, 1, 2)))
            generator.shuffle(digits)
            yield _trace("propose", " ".join(wanted), " ".join(digits))
        else:
            text = _list(generator, generator.choice((2, 3, 3, 4, 4, 5)))
            answer = sorted(text.split(), reverse=generator.random() < 0.6)
            yield _trace("solve", text, " ".join(answer))


def corpus(n: int = 200) -> Iterator[str]:
    """Texts for the tokenizer."""
    for row in traces(n):
        yield "\n\n".join(f"{m['role'].title()}:\n{m['content']}" for m in row["messages"])


def _list(generator: random.Random, length: int) -> str:
    return " ".join(generator.choices("0123456789", k=length))


def _trace(system: str, asked: str, answer: str) -> dict[str, Any]:
    roles = {"system": system, "user": asked, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}
