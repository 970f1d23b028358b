"""Tasks that reasoning-gym generates, and its own verifier as their reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from retrain.data.files import Row
from retrain.types import Rollout, UserError


def read_reasoning_gym(
    dataset: str, *, size: int, seed: int, params: Mapping[str, Any]
) -> Iterator[Row]:
    """Rows with the columns prompt, answer and entry (what the verifier needs).

    Raises:
        UserError: the package or the dataset is missing, or the dataset refuses `params`.
    """
    gym = _package()
    if dataset not in gym.factory.DATASETS:
        raise UserError(
            f"reasoning-gym has no dataset {dataset!r}",
            f"It has: {', '.join(sorted(gym.factory.DATASETS))}.",
        )
    try:
        made = gym.create_dataset(dataset, **{"seed": seed, **params, "size": size})
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"reasoning-gym's {dataset} refuses params {dict(params)}: {error}",
            "Correct prompt_source.params.",
        ) from error
    for index in range(size):
        entry = made[index]
        columns = {"prompt": entry["question"], "answer": entry["answer"], "entry": entry}
        yield Row(columns, f"{dataset}, item {index}")


def score(rollout: Rollout, *, pattern: str | None = None) -> float:
    """A reward: reasoning-gym's own score, in [0, 1], of the rollout's last MODEL message.

    The answer is the whole message without surrounding white space, or the first group of the
    last match of `pattern`, such as `<answer>(.*?)</answer>`; no match scores as no answer.

    Raises:
        UserError: the task did not come from a reasoning_gym source.
    """
    entry = rollout.task.metadata.get("entry") if rollout.task is not None else None
    if not isinstance(entry, Mapping) or "metadata" not in entry:
        raise UserError(
            "the task has no reasoning-gym entry to score against",
            "Use prompt_source.type reasoning_gym, with entry among metadata_columns.",
        )
    turns = rollout.model_messages
    text = rollout.messages[turns[-1]].content if turns else ""
    return float(_verifier(entry["metadata"]["source_dataset"])(_answer(text, pattern), entry))


def _answer(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.strip()
    compiled = re.compile(pattern, re.DOTALL)
    if compiled.groups < 1:
        raise UserError(f"pattern {pattern!r} has no group", "Put the answer in parentheses.")
    found = [match.group(1) for match in compiled.finditer(text)]
    return found[-1].strip() if found and found[-1] is not None else None


@lru_cache
def _verifier(dataset: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    verify: Callable[[str | None, Mapping[str, Any]], float]
    verify = _package().get_score_answer_fn(dataset)
    return verify


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise UserError(
            "prompt_source.type reasoning_gym needs the package reasoning-gym",
            "Run: pip install 'retrain[reasoning-gym]'",
        ) from error
    return reasoning_gym
