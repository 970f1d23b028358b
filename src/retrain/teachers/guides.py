"""Teachers fitted to a student: what its samples are given to learn from."""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from retrain.rendering import Renderer
from retrain.rendering.templates import ToolSchema
from retrain.teachers.base import Teacher, Top
from retrain.teachers.mixture import mixed, mixed_top
from retrain.teachers.retelling import Retelling
from retrain.types import InfrastructureError, Rollout, Sample, Task, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARN_ABOVE = 0.05
"""Share of the trained tokens without a teacher's word that is warned about."""

NAN = float("nan")


@dataclass(frozen=True)
class Guide:
    """One teacher, and what it is there for.

    `when` names the tasks that it speaks for by their metadata: each column must have the value, or
    one of a list of values. `renderer` writes conversations in the teacher's tokens; None says
    that its tokens are the student's.
    """

    name: str
    teacher: Teacher
    weight: float = 1.0
    when: Mapping[str, Any] = field(default_factory=dict)
    renderer: Renderer | None = None

    def speaks_for(self, task: Task | None) -> bool:
        known = {} if task is None else task.metadata
        for column, wanted in self.when.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if column not in known or known[column] not in values:
                return False
        return True


@dataclass
class _Told:
    """What one teacher says of a rollout's samples."""

    columns: list[array[float]]
    """One a sample [T]; NaN where it does not train, or nothing is said."""
    tokens: int = 0
    """Of the student, in spans."""
    spans: int = 0


class Guides:
    """
    Where several teachers speak for a task, they are mixed; see `mixture.mixed`.

    A rollout of which a teacher fails to speak, its retries included, is masked and counted, and
    its samples carry NaN: the caller leaves them out.

    Args:
        student: renders what the student sees.
        tools: what a rollout's agent was told that it may call. It matters to teachers of another
            tokenizer, and to `native` tool formats, only.

    Raises:
        UserError: a tokenizer whose tokens' bytes are not known, where text is to be aligned.
    """

    def __init__(
        self,
        guides: Sequence[Guide],
        student: Renderer,
        *,
        tools: Callable[[Rollout], Sequence[ToolSchema]] = lambda rollout: (),
    ) -> None:
        self._guides = list(guides)
        self._tools = tools
        self._vocab = len(student.codec.tokenizer)
        self._retellings = {
            guide.name: Retelling(guide.teacher, guide.renderer, student, guide.name)
            for guide in guides
            if guide.renderer is not None
        }
        self._warned = False

    async def prepare(self, temperature: float = 1.0) -> None:
        """Ask servers whether they can do what will be asked of them.

        Raises:
            UserError: one cannot.
        """
        await together(guide.teacher.prepare(temperature) for guide in self._guides)

    def check_tasks(self, tasks: Iterable[Task]) -> None:
        """
        Raises:
            UserError: no teacher speaks for one of them.
        """
        for task in tasks:
            self._speaking(task)

    async def attach(
        self, rollouts: Sequence[Rollout], samples: Sequence[Sample], temperature: float = 1.0
    ) -> dict[str, float]:
        """Set `teacher_logprobs` of samples of these rollouts: the teachers' log-probabilities at
        `temperature`, NaN where a token does not train or no teacher speaks of it. Metrics.

        Raises:
            UserError: no teacher speaks for a task, or one cannot score at this temperature.
            InfrastructureError: the teachers failed for all rollouts.
        """
        await self.prepare(temperature)
        own = _by_rollout(samples)
        known = {rollout.id: rollout for rollout in rollouts}
        if strange := [rollout for rollout in own if rollout not in known]:
            raise ValueError(f"samples of rollouts that were not given: {strange[:3]}")
        found = await together(
            self._attach(known[rollout], part, temperature) for rollout, part in own.items()
        )
        failed = [error for error, _ in found if error is not None]
        if failed and len(failed) == len(found):
            raise failed[0]
        metrics = _metrics(samples, [told for _, told in found])
        self._warn(metrics["teacher/no_signal"])
        return metrics | {"teacher/failed": float(len(failed))}

    async def attach_top(
        self,
        samples: Sequence[Sample],
        k: int,
        temperature: float = 1.0,
        *,
        rollouts: Sequence[Rollout] = (),
    ) -> None:
        """Set `teacher_top_ids`, `teacher_top_logprobs` and `teacher_top_k` of the samples: the
        teachers' likeliest `k` tokens where a token trains, -1 and NaN elsewhere. Samples of which
        a teacher failed to speak have nothing but those.

        Args:
            rollouts: those of the samples: what teachers that speak for some tasks only go by, and
                what is masked where a teacher fails.

        Raises:
            UserError: as `attach`, and for a teacher of another tokenizer.
            InfrastructureError: the teachers failed for all samples.
        """
        if self._retellings:
            raise UserError(
                f"{', '.join(self._retellings)}: distributions over another tokenizer's tokens say "
                "nothing of the student's",
                "Take teachers with the student's tokenizer, or distillation.type: on_policy.",
            )
        await self.prepare(temperature)
        known = {rollout.id: rollout for rollout in rollouts}
        found = await together(
            self._attach_top(sample, known.get(sample.rollout_id), k, temperature)
            for sample in samples
        )
        failed = [error for error in found if error is not None]
        if failed:
            if len(failed) == len(found):
                raise failed[0]
            logger.warning("no teacher speaks of %d samples: %s", len(failed), failed[0])

    async def close(self) -> None:
        for guide in self._guides:
            await guide.teacher.close()

    def _speaking(self, task: Task | None) -> list[Guide]:
        found = [guide for guide in self._guides if guide.speaks_for(task)]
        if not found:
            known = {} if task is None else task.metadata
            columns = sorted({column for guide in self._guides for column in guide.when})
            has = ", ".join(f"{column}: {known.get(column)!r}" for column in columns)
            named = "a rollout without a task" if task is None else f"task {task.id}"
            raise UserError(
                f"no teacher speaks for {named} ({has})",
                "Add a teacher whose `when` matches it, or one without `when`.",
            )
        return found

    async def _attach(
        self, rollout: Rollout, samples: Sequence[Sample], temperature: float
    ) -> tuple[InfrastructureError | None, dict[str, _Told]]:
        guides = self._speaking(rollout.task)
        try:
            told = await together(
                self._ask(guide, rollout, samples, temperature) for guide in guides
            )
        except InfrastructureError as error:
            rollout.mask(error.kind or "engine", str(error))
            for sample in samples:
                sample.teacher_logprobs = array("d", [NAN]) * len(sample)
            return error, {}
        geometric = any(guide.renderer is not None for guide in guides)
        weights = [guide.weight for guide in guides]
        for place, sample in enumerate(samples):
            columns = [one.columns[place] for one in told]
            sample.teacher_logprobs = (
                columns[0] if len(guides) == 1 else mixed(columns, weights, geometric=geometric)
            )
        return None, {guide.name: one for guide, one in zip(guides, told, strict=True)}

    async def _ask(
        self, guide: Guide, rollout: Rollout, samples: Sequence[Sample], temperature: float
    ) -> _Told:
        if guide.name not in self._retellings:
            scored = await together(
                self._score(guide.teacher, sample, temperature) for sample in samples
            )
            return _Told(scored)
        messages = rollout.model_messages
        wanted = {messages[turn] for sample in samples for turn in _starts(sample)}
        heard = await self._retellings[guide.name].hear(
            rollout, wanted, self._tools(rollout), temperature
        )
        told = _Told([array("d", [NAN]) * len(sample) for sample in samples])
        for one in heard.values():
            told.spans += one.spans
            told.tokens += sum(not math.isnan(x) for x in one.logprobs)
        for sample, column in zip(samples, told.columns, strict=True):
            for turn, start in _starts(sample).items():
                message = messages[turn]
                if message not in heard:
                    continue
                for offset, logprob in enumerate(heard[message].logprobs[: len(sample) - start]):
                    if sample.loss_mask[start + offset]:
                        column[start + offset] = logprob
        return told

    async def _score(self, teacher: Teacher, sample: Sample, temperature: float) -> array[float]:
        ids, start = self._readable(teacher, sample)
        scored = await teacher.score(ids, temperature, start=start)
        found = array("d", [NAN]) * len(sample)
        for place in range(start, len(ids)):
            if sample.loss_mask[place]:
                found[place] = scored[place]
        return found

    def _readable(self, teacher: Teacher, sample: Sample) -> tuple[array[int], int]:
        """As many tokens as the teacher has context for and a vocabulary entry; the first of them
        that trains, and has tokens before it."""
        ids = sample.token_ids[: teacher.context_limit]
        strange = next((i for i, token in enumerate(ids) if token >= self._vocab), len(ids))
        first = next((i for i, trains in enumerate(sample.loss_mask) if trains), len(sample))
        return ids[:strange], max(first, 1)

    async def _attach_top(
        self, sample: Sample, rollout: Rollout | None, k: int, temperature: float
    ) -> InfrastructureError | None:
        guides = self._speaking(None if rollout is None else rollout.task)
        try:
            tops = await together(
                self._top(guide.teacher, sample, k, temperature) for guide in guides
            )
        except InfrastructureError as error:
            if rollout is not None and rollout.error is None:
                rollout.mask(error.kind or "engine", str(error))
            _put(sample, Top.empty(len(sample), k))
            return error
        _put(sample, mixed_top(tops, [guide.weight for guide in guides], k))
        return None

    async def _top(self, teacher: Teacher, sample: Sample, k: int, temperature: float) -> Top:
        ids, start = self._readable(teacher, sample)
        found = await teacher.top(ids, k, temperature, start=start)
        whole = Top.empty(len(sample), k)
        whole.ids[: len(ids)] = found.ids
        whole.logprobs[: len(ids)] = found.logprobs
        return whole

    def _warn(self, share: float) -> None:
        if share > WARN_ABOVE and not self._warned:
            self._warned = True
            logger.warning(
                "no teacher has a word on %.0f%% of the trained tokens: they are beyond a "
                "teacher's context, or their text cannot be aligned (metric teacher/no_signal)",
                100 * share,
            )


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of it gives, in order; the first error ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _starts(sample: Sample) -> dict[int, int]:
    """Where each turn begins of which some token trains."""
    if sample.turns is None:
        raise ValueError("a sample without turns cannot be aligned")
    starts: dict[int, int] = {}
    trains = set()
    for place, (turn, one) in enumerate(zip(sample.turns, sample.loss_mask, strict=True)):
        if turn >= 0:
            starts.setdefault(turn, place)
        if one:
            trains.add(turn)
    return {turn: place for turn, place in starts.items() if turn in trains}


def _by_rollout(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.rollout_id, []).append(sample)
    return found


def _metrics(samples: Sequence[Sample], told: Sequence[Mapping[str, _Told]]) -> dict[str, float]:
    """Over the tokens that train: the mean log-probability, the share that no teacher speaks of,
    and, where text was aligned, the mean tokens of a span."""
    trained = sum(sum(sample.loss_mask) for sample in samples)
    heard = [x for sample in samples for x in sample.teacher_logprobs or () if not math.isnan(x)]
    metrics = {"teacher/no_signal": 1 - len(heard) / trained if trained else 0.0}
    if heard:
        metrics["teacher/logprob"] = math.fsum(heard) / len(heard)
    spans = sum(one.spans for part in told for one in part.values())
    if spans:
        tokens = sum(one.tokens for part in told for one in part.values())
        metrics["teacher/span_tokens"] = tokens / spans
    return metrics


def _put(sample: Sample, top: Top) -> None:
    """Into the sample's columns, where it trains."""
    trains = np.frombuffer(sample.loss_mask, dtype=np.uint8).astype(np.bool_)[:, None]
    says = trains & np.isfinite(top.logprobs)
    ids = np.where(says, top.ids, -1).astype(np.int32)
    logprobs = np.where(says, top.logprobs, NAN).astype(np.float32)
    sample.teacher_top_ids = array("i", ids.tobytes())
    sample.teacher_top_logprobs = array("f", logprobs.tobytes())
    sample.teacher_top_k = top.ids.shape[1]
