"""Continuous batching: who is admitted, what is prefilled, and one token per row and step.

Synchronous and single-threaded; `TorchEngine` drives it from its decode thread.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.exact import COLUMN_BLOCK, ROW_BLOCK, exact_runner
from retrain.engines.fill import BLOCK, ExactFill, FastFill, Fill, PlainFill
from retrain.engines.prefix import Families, find_families
from retrain.engines.runners import Runner, make_runner
from retrain.engines.sampling import UNIFORM_BLOCK, Uniforms, sample_tokens, truncate
from retrain.engines.slots import SlotTable
from retrain.engines.stops import StopRule
from retrain.types import FinishReason, UserError

ADMIT_TOGETHER = 8
"""New requests that wait for each other's slots to come free, while others decode."""

PATIENCE = 64
"""Steps after which a session that waits for its tool may lose its slot to a new request."""

FOREVER = 1 << 62

NEVER = -1


@dataclass(eq=False)
class Job:
    """One request on its way through the engine."""

    request: GenerateRequest
    rule: StopRule
    future: asyncio.Future[Completion]
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False
    slot: int | None = None
    uniforms: Uniforms = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = Uniforms(self.request.seed)


Outcome = tuple[Job, Completion | BaseException]


class Scheduler:
    """All state of generation. `advance` makes one step and returns what ended in it.

    Args:
        max_slots: most sequences at once; `exact` rounds it up to a multiple of ROW_BLOCK.
        exact: what a request gets depends on its own tokens alone, to the bit, whatever its company
            and whenever it arrives. Sessions then keep their slots until they end.
    """

    def __init__(
        self,
        model: nn.Module,
        max_slots: int,
        context_limit: int,
        version: int,
        *,
        exact: bool = False,
    ) -> None:
        self._model = model
        self._context_limit = context_limit
        self.version = version
        self.exact = exact
        self._table = SlotTable(_up(max_slots, ROW_BLOCK) if exact else max_slots)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[Job] = []
        self._rules: list[StopRule] = []
        self._flags = np.zeros((0, 0), dtype=np.bool_)
        self._runner: Runner | None = None
        self._fill: Fill = PlainFill(self._table)
        self._families: Families | None = None
        self._device = next(model.parameters()).device

    @property
    def max_slots(self) -> int:
        return self._table.max_slots

    @property
    def prefilled_tokens(self) -> int:
        return self._fill.prefilled_tokens

    @property
    def busy(self) -> bool:
        """Whether `advance` has anything to do."""
        if self._jobs or not self._waiting:
            return bool(self._jobs)
        return not self.exact or self._table.free > 0 or any(map(self._has_cache, self._waiting))

    def prepare(self) -> None:
        """Find out how the model is run; the first request does it otherwise.

        Raises:
            UserError: `exact`, and the model's bits depend on company.
        """
        if self._runner is not None:
            return
        if self.exact:
            runner: Runner = exact_runner(self._model, self._table.max_slots, self._context_limit)
            self._fill = ExactFill(self._table, runner)
        else:
            runner = make_runner(self._model, self._context_limit)
            if runner.incremental:
                self._fill = FastFill(self._table, runner)
        self._runner = runner

    def submit(self, jobs: Sequence[Job]) -> None:
        self._waiting += [job for job in jobs if not job.cancelled]

    def cancel(self, job: Job) -> None:
        """Forget a request whose caller has gone; nothing happens if it has ended."""
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
        elif job.slot is not None:
            self._vacate(job)

    def end_session(self, session: str) -> None:
        slot = self._table.by_session.get(session)
        if slot is None:
            return
        if self._table.active[slot]:
            self._table.disown(slot)
        else:
            self._table.release(slot)

    def set_version(self, version: int) -> None:
        """New weights: every cache is void, and requests in flight are run again from token 0."""
        self.version = version
        self._families = None
        self._table.forget()
        self._fill.fill(list(self._jobs), 0)

    def advance(self) -> list[Outcome]:
        """Admit what fits, then run one token of every active row."""
        if self._model.training:
            self._model.eval()
        self._admit()
        if not self._jobs:
            return []
        self._compact()
        return self._step()

    def _admit(self) -> None:
        """Seat returning sessions at once, and new requests together: a prefill call costs about
        as much for one row as for a few."""
        if not self._waiting:
            return
        seated = [self._seat(job, 0) for job in self._waiting if self._has_cache(job)]
        fresh = [job for job in self._waiting if job.slot is None]
        for job in fresh[: self._welcome(len(fresh))]:
            slot = self._seat(job, self._idle_before)
            if slot is None:
                break
            seated.append(slot)
        if seated:
            self._waiting = [job for job in self._waiting if job.slot is None]
            slots = [slot for slot in seated if slot is not None]
            self._fill.fill(slots, len(self._jobs) - len(slots))

    @property
    def _idle_before(self) -> int:
        """Sessions that wait since before this step may lose their slots."""
        if self.exact:
            return NEVER
        return self._table.steps - PATIENCE if self._jobs else FOREVER

    def _welcome(self, fresh: int) -> int:
        """How many new requests may look for a slot now. Where nothing runs, a few may take those
        of waiting sessions; else they wait until several can be seated, or a session has waited
        too long."""
        room = self._table.free
        if not self._jobs:
            return max(room, ADMIT_TOGETHER)
        return fresh if room == 0 or room >= min(fresh, ADMIT_TOGETHER) else 0

    def _seat(self, job: Job, idle_before: int) -> int | None:
        session = job.request.session
        own = None if session is None else self._table.by_session.get(session)
        slot = self._table.take(session, idle_before=idle_before)
        if slot is not None:
            self._place(job, slot, returns=slot == own)
        return slot

    def _has_cache(self, job: Job) -> bool:
        session = job.request.session
        return session is not None and session in self._table.by_session

    def _place(self, job: Job, slot: int, *, returns: bool) -> None:
        table, request = self._table, job.request
        prompt = np.asarray(request.prompt_ids, dtype=np.int32)
        self._reserve(slot + 1, len(prompt) + 2)
        self._fill.place(slot, prompt, returns=returns)
        table.ids[slot, : len(prompt)] = prompt
        table.known[slot] = len(prompt)
        limit = len(prompt) + request.params.max_new_tokens
        table.end[slot] = min(limit, self._context_limit)
        table.temperature[slot] = request.params.temperature
        table.truncated[slot] = request.params.top_k > 0 or request.params.top_p < 1
        table.rule[slot] = self._rule_index(job.rule)
        table.drawn[slot] = UNIFORM_BLOCK
        table.active[slot] = True
        job.slot = slot
        self._jobs[slot] = job

    def _rule_index(self, rule: StopRule) -> int:
        if rule not in self._rules:
            self._rules.append(rule)
            self._flags = np.stack([known.flags for known in self._rules])
        return self._rules.index(rule)

    def _reserve(self, slots: int, columns: int) -> None:
        self.prepare()
        assert self._runner is not None
        if self.exact:
            slots, columns = _up(slots, ROW_BLOCK), _up(columns, COLUMN_BLOCK) + BLOCK
        self._table.reserve(slots, columns)
        self._runner.reserve(*self._table.shape)

    def _compact(self) -> None:
        """Move active rows down: a step pays for every row up to the highest active one."""
        movers, holes = self._table.compaction()
        if not movers:
            return
        assert self._runner is not None
        width = int(self._table.length[movers + holes].max())
        self._runner.copy(movers + holes, holes + movers, width)
        self._table.swap(movers, holes)
        for mover, hole in zip(movers, holes, strict=True):
            job = self._jobs[hole] = self._jobs.pop(mover)
            job.slot = hole

    def _step(self) -> list[Outcome]:
        table = self._table
        rows = _up(table.extent, ROW_BLOCK) if self.exact else table.extent
        active, lengths = table.active[:rows], table.length[:rows]
        width = int(lengths[active].max()) + 1
        self._reserve(rows, width + 2)
        assert self._runner is not None
        if self.exact:
            width = _up(width, COLUMN_BLOCK)
        else:
            self._families = find_families(
                table.family[:rows],
                table.shared[:rows],
                active,
                width,
                self._device,
                before=self._families,
            )
        logits = self._runner.step(table.ids, lengths, width, self._families)
        lengths += active
        table.steps += 1
        sampled = np.flatnonzero(active & (lengths == table.known[:rows]))
        if not len(sampled):
            return []
        tokens, logprobs = self._sample(logits, sampled)
        column = table.known[sampled]
        table.ids[sampled, column] = tokens
        table.logprobs[sampled, column] = logprobs
        table.versions[sampled, column] = self.version
        table.known[sampled] += 1
        table.drawn[sampled] += 1
        full = table.known[sampled] >= table.end[sampled]
        flagged = self._flags[table.rule[sampled], tokens]
        outcomes = []
        for slot in sampled[full | flagged].tolist():
            reason = self._finish_reason(slot)
            if reason is not None:
                outcomes.append(self._finish(self._jobs[slot], reason))
        return outcomes

    def _sample(self, logits: Tensor, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities [S] of the rows `sampled` [S]."""
        table, rows = self._table, len(logits)
        for slot in sampled[table.drawn[sampled] == UNIFORM_BLOCK].tolist():
            table.uniforms[slot] = self._jobs[slot].uniforms.next_block()
            table.drawn[slot] = 0
        for slot in sampled[table.truncated[sampled]].tolist():
            params = self._jobs[slot].request.params
            logits[slot] = truncate(logits[slot], params.temperature, params.top_k, params.top_p)
        drawn = np.minimum(table.drawn[:rows], UNIFORM_BLOCK - 1)
        uniforms = torch.from_numpy(table.uniforms[np.arange(rows), drawn]).to(self._device)
        temperatures = table.temperature[sampled]
        if (temperatures == temperatures[0]).all():
            temperature: Tensor | float = float(temperatures[0])
        else:
            temperature = torch.from_numpy(table.temperature[:rows]).to(self._device)
        tokens, logprobs = sample_tokens(logits, uniforms, temperature)
        return tokens.cpu().numpy()[sampled], logprobs.cpu().numpy()[sampled]

    def _finish_reason(self, slot: int) -> FinishReason | None:
        table, job = self._table, self._jobs[slot]
        start, known = len(job.request.prompt_ids), int(table.known[slot])
        stopped = job.rule.reason(table.ids[slot, start:known].tolist())
        if stopped is not None or known < table.end[slot]:
            return stopped
        return "length" if known - start >= job.request.params.max_new_tokens else "context"

    def _finish(self, job: Job, reason: FinishReason) -> Outcome:
        assert job.slot is not None
        table, slot = self._table, job.slot
        own = slice(len(job.request.prompt_ids), int(table.known[slot]))
        logprobs = table.logprobs[slot, own]
        finite = bool(np.isfinite(logprobs).all())
        completion = Completion(
            array("i", table.ids[slot, own].tobytes()),
            array("f", logprobs.tobytes()),
            array("i", table.versions[slot, own].tobytes()),
            reason,
        )
        self._vacate(job)
        if not finite:
            return job, UserError(
                "the policy's logits are not finite: its weights have diverged",
                "Lower the learning rate, or start from an earlier checkpoint.",
            )
        return job, completion

    def _vacate(self, job: Job) -> None:
        assert job.slot is not None
        del self._jobs[job.slot]
        self._table.deactivate(job.slot)
        job.slot = None


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
