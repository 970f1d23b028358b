"""Built-in rewards that a model gives: a score, and a rubric of criteria."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.judging import (
    REASONING,
    Judge,
    JudgeScope,
    block,
    check_scope,
    number,
    schema_of,
    shown,
    task_text,
)
from retrain.types import Rollout, UserError

_FIELD = re.compile(r"\{(\w+)\}")
_KEY = re.compile(r"[A-Za-z_]\w{0,63}")


@reward(kind="rollout")
class LLMJudge:
    """A model's score of a rollout, from 0 to 1, or with `raw` on its own scale.

    Range [0, 1]; with `raw` that of `scale`. The judge is shown the task, `criteria` and what the
    rollout said (`scope`: `last`, `all`, `conversation`), and with `reference` the task's answer.
    `prompt` replaces that text: it holds `{response}` and any of `{task}`, `{criteria}` and
    `{reference}`, each put in between marks that what it holds cannot forge.

    Who is asked, and how, is what the other params say: see `Judge`. What that costs is counted
    into the rollout's metrics. Where the endpoint does not answer, or gives no answer that can be
    read, the rollout is masked.

    Example: `llm_judge: {params: {url: "http://h:8000/v1", model: m, criteria: "Is it polite?"}}`

    Raises:
        UserError: parameters that cannot be, or a key that is not in its environment variable.
    """

    def __init__(
        self,
        *,
        criteria: str = "",
        prompt: str | None = None,
        scale: Sequence[float] = (0, 10),
        raw: bool = False,
        reference: bool = False,
        scope: JudgeScope = "last",
        **asked: Any,
    ) -> None:
        self._judge = Judge("llm_judge", asked)
        name = self._judge.where
        check_scope(name, scope)
        self._low, self._high = _checked_scale(name, scale)
        self._prompt = _checked_prompt(name, prompt, criteria, reference)
        self._criteria, self._scope, self._raw = criteria, scope, raw
        reward(kind="rollout", range=(self._low, self._high) if raw else (0.0, 1.0))(self)

    async def __call__(self, rollout: Rollout) -> float:
        low, high = self._low, self._high
        told = (
            "You judge what somebody did in a task. First reason briefly, then give a score from "
            f"{low:g}, the worst, to {high:g}, the best."
        )
        score = await self._judge.ask(
            told,
            self._question(rollout),
            schema_of({"score": {"type": "number"}}),
            lambda found: number(found.get("score"), "score", low, high),
            [rollout],
        )
        return score if self._raw else (score - low) / (high - low)

    async def close(self) -> None:
        await self._judge.close()

    def _question(self, rollout: Rollout) -> str:
        values = {
            "criteria": self._criteria,
            "task": block("TASK", task_text(rollout)),
            "response": block("RESPONSE", shown(rollout, self._scope)),
        }
        if "{reference}" in self._prompt:
            values["reference"] = block("REFERENCE", str(_answer(rollout)))
        return _FIELD.sub(lambda match: values[match[1]], self._prompt)


@reward(kind="rollout", range=(0.0, 1.0))
class Rubric:
    """A weighted mean of criteria that a model judges, all in one call.

    Range [0, 1]. Each of `criteria` has a `name`, a `text` and a `weight` (1; above zero). Each
    is judged true or false, or with `graded` from 0 to 1; the rollout's metrics have them as
    `rubric/<name of the criterion>`. `scope`, `reference`, the other params and failures are as
    with `llm_judge`.

    Example: `rubric: {params: {url: "http://h/v1", model: m, criteria: [{name: a, text: "..."}]}}`

    Raises:
        UserError: parameters that cannot be, or a key that is not in its environment variable.
    """

    def __init__(
        self,
        *,
        criteria: Sequence[Mapping[str, Any]],
        graded: bool = False,
        reference: bool = False,
        scope: JudgeScope = "last",
        **asked: Any,
    ) -> None:
        self._judge = Judge("rubric", asked)
        name = self._judge.where
        check_scope(name, scope)
        self._criteria = _checked_criteria(name, criteria)
        self._graded, self._reference, self._scope = graded, reference, scope
        kind = {"type": "number" if graded else "boolean"}
        self._schema = schema_of(dict.fromkeys(self._criteria, kind))

    async def __call__(self, rollout: Rollout) -> float:
        each = "a number from 0, not at all, to 1, fully" if self._graded else "true or false"
        listed = "\n".join(f"- {name}: {text}" for name, (text, _) in self._criteria.items())
        told = (
            "You judge what somebody did in a task, by criteria. First reason briefly, then say of "
            f"each criterion whether it is met: {each}.\n\nThe criteria:\n{listed}"
        )
        parts = [block("TASK", task_text(rollout))]
        if self._reference:
            parts.append(block("REFERENCE", str(_answer(rollout))))
        parts.append(block("RESPONSE", shown(rollout, self._scope)))
        met = await self._judge.ask(told, "\n\n".join(parts), self._schema, self._read, [rollout])
        rollout.metrics |= {f"rubric/{name}": value for name, value in met.items()}
        weights = {name: weight for name, (_, weight) in self._criteria.items()}
        return math.fsum(weights[n] * met[n] for n in met) / math.fsum(weights.values())

    async def close(self) -> None:
        await self._judge.close()

    def _read(self, found: Mapping[str, Any]) -> dict[str, float]:
        if self._graded:
            return {name: number(found.get(name), name, 0, 1) for name in self._criteria}
        for name in self._criteria:
            if not isinstance(found.get(name), bool):
                raise ValueError(f"{name} is {str(found.get(name))[:80]}, expected true or false")
        return {name: float(found[name]) for name in self._criteria}


def _answer(rollout: Rollout) -> Any:
    if rollout.task is None or rollout.task.answer is None:
        raise ValueError("the task has no answer to show as the reference (task.answer)")
    return rollout.task.answer


def _checked_scale(where: str, scale: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in scale)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UserError(f"{where}: scale is {scale!r}", "Give the lowest and the highest score.")
    return low, high


def _checked_prompt(where: str, prompt: Any, criteria: Any, reference: bool) -> str:
    """The question, with fields for what it is filled in with."""
    if not isinstance(criteria, str) or not isinstance(prompt, str | None):
        raise UserError(f"{where}: criteria and prompt are texts", "Write them as such.")
    if prompt is None:
        if not criteria:
            raise UserError(f"{where} has nothing to judge by", "Give criteria, or a prompt.")
        shown_answer = "\n\n{reference}" if reference else ""
        return f"What counts: {{criteria}}\n\n{{task}}{shown_answer}\n\n{{response}}"
    fields = set(_FIELD.findall(prompt))
    if reference:
        raise UserError(f"{where}: reference does nothing beside a prompt", "Write {reference}.")
    if criteria and "criteria" not in fields:
        raise UserError(f"{where}: the prompt does not show the criteria", "Write {criteria}.")
    if "response" not in fields or not fields <= {"task", "criteria", "response", "reference"}:
        raise UserError(
            f"{where}: the prompt has the fields {sorted(fields)}",
            "It needs {response}, and may have {task}, {criteria} and {reference}.",
        )
    return prompt


def _checked_criteria(where: str, criteria: Any) -> dict[str, tuple[str, float]]:
    """Text and weight by name."""
    listed = criteria if isinstance(criteria, list | tuple) else []
    if not listed:
        raise UserError(f"{where}: criteria lists none", "Give [{name: ..., text: ...}].")
    checked: dict[str, tuple[str, float]] = {}
    for item in listed:
        place = f"{where}: the criterion {str(item)[:80]}"
        known = isinstance(item, Mapping) and {"name", "text"} <= item.keys()
        if not known or not item.keys() <= {"name", "text", "weight"}:
            raise UserError(f"{place} cannot be one", "Its keys: name, text, and weight if not 1.")
        name, text, weight = item["name"], item["text"], item.get("weight", 1)
        if not isinstance(name, str) or not _KEY.fullmatch(name) or name == REASONING:
            raise UserError(f"{place}: its name cannot be one", "Use letters, digits and _.")
        if name in checked:
            raise UserError(f"{place}: another has its name", "Rename one.")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: its text is empty", "Say when it is met.")
        number_given = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number_given or not 0 < weight < math.inf:
            raise UserError(f"{place}: its weight is {weight!r}", "Give a number above zero.")
        checked[name] = (text, float(weight))
    return checked
