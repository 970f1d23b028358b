"""Questions and answers as objects: what to ask, and whether the answer was right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from retrain.rewards.extract import Scope
from retrain.rewards.numeric import boxed_answer
from retrain.types import Message, MessageType, Rollout, Task, UserError


class BoxedReward:
    r"""1 where the last complete `\boxed{...}` of a rollout equals its answer, else 0.

    Answers are compared as the reward `boxed_answer` does.

    Args:
        scope: `last`: only the last MODEL message is read; `all`: every one.
    """

    def __init__(self, scope: Scope = "last") -> None:
        self._scope = scope

    def __call__(
        self, rollouts: Sequence[Rollout], ground_truths: Sequence[Any] | None = None
    ) -> list[float]:
        """One reward for each rollout.

        Args:
            ground_truths: the answer of each rollout, or a list of acceptable ones; by default
                those of the rollouts' tasks.

        Raises:
            UserError: a rollout without an answer, or another number of answers than of rollouts.
        """
        if ground_truths is None:
            ground_truths = [None if r.task is None else r.task.answer for r in rollouts]
        if len(ground_truths) != len(rollouts):
            raise UserError(
                f"there are {len(ground_truths)} ground truths for {len(rollouts)} rollouts",
                "Give one for each rollout, in the same order.",
            )
        return [
            self._score(rollout, answer, index)
            for index, (rollout, answer) in enumerate(zip(rollouts, ground_truths, strict=True))
        ]

    def _score(self, rollout: Rollout, answer: Any, index: int) -> float:
        if answer is None or answer == []:
            raise UserError(
                f"rollouts[{index}] has no answer to compare with",
                "Pass ground_truths, or make the rollout with QASolverEnv.setup.",
            )
        task = Task(rollout.id, (), answer)
        return float(boxed_answer(replace(rollout, task=task), scope=self._scope))


class QASolverEnv:
    """Makes rollouts that ask one question each.

    Args:
        system_prompt: begins every conversation; None leaves it out.
    """

    def __init__(self, system_prompt: str | None = None) -> None:
        self._system = None if system_prompt is None else Message(system_prompt, MessageType.SYSTEM)

    def setup(self, question: str, answer: Any = None) -> Rollout:
        """A new rollout, ready for the policy's first words.

        Rollouts of one question and answer are one group: their `group_id` is the same.
        """
        asked = Message(question, MessageType.MESSAGE)
        prompt = (asked,) if self._system is None else (self._system, asked)
        digest = hashlib.blake2b(f"{question}\0{answer!r}".encode(), digest_size=6).hexdigest()
        rollout = Rollout(group_id=digest, task=Task(digest, prompt, answer))
        rollout.add_messages(*prompt)
        return rollout
