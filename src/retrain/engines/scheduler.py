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
from retrain.engines.prefix import Families, find_families
from retrain.engines.runners import Runner, make_runner
from retrain.engines.sampling import UNIFORM_BLOCK, Uniforms, sample_tokens, truncate
from retrain.engines.slots import SlotTable
from retrain.engines.stops import StopRule
from retrain.types import FinishReason, UserError

FEED_LIMIT = 32
"""Longest context that is fed through decode steps, a token a step, rather than prefilled."""

FEED_CROWD = 1
"""Rows decoding per row fed above which feeding is cheaper than a prefill call of its own."""

ADMIT_TOGETHER = 8
"""New requests that wait for each other's slots to come free, while others decode."""

PATIENCE = 64
"""Steps after which a session that waits for its tool may lose its slot to a new request."""

FOREVER = 1 << 62

MIN_COPY = 64
"""Shortest prefix worth copying from another slot."""

MIN_SAVED = 256
"""Fewest tokens saved that make a prefill of a common prefix worth a call of its own."""


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
    """All state of generation. `advance` makes one step and returns what ended in it."""

    def __init__(self, model: nn.Module, max_slots: int, context_limit: int, version: int) -> None:
        self._model = model
        self._context_limit = context_limit
        self._version = version
        self._table = SlotTable(max_slots)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[Job] = []
        self._rules: list[StopRule] = []
        self._flags = np.zeros((0, 0), dtype=np.bool_)
        self._runner: Runner | None = None
        self._families: Families | None = None
        self._device = next(model.parameters()).device
        self.prefilled_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._waiting)

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
        self._version = version
        self._families = None
        self._table.forget()
        self._fill(list(self._jobs))

    def abort(self) -> list[Job]:
        """Give up every request and every cache; the jobs that were under way."""
        jobs = [*self._jobs.values(), *self._waiting]
        self._waiting.clear()
        for job in list(self._jobs.values()):
            self._vacate(job)
        self._families = None
        self._table.forget()
        return jobs

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
            slot = self._seat(job, self._table.steps - PATIENCE if self._jobs else FOREVER)
            if slot is None:
                break
            seated.append(slot)
        if seated:
            self._waiting = [job for job in self._waiting if job.slot is None]
            self._fill([slot for slot in seated if slot is not None])

    def _welcome(self, fresh: int) -> int:
        """How many new requests may look for a slot now. Where nothing runs, a few may take those
        of waiting sessions; else they wait until several can be seated, or a session has waited
        too long."""
        room = self._table.free
        if not self._jobs:
            return max(room, ADMIT_TOGETHER)
        return fresh if room == 0 or room >= min(fresh, ADMIT_TOGETHER) else 0

    def _seat(self, job: Job, idle_before: int) -> int | None:
        slot = self._table.take(job.request.session, idle_before=idle_before)
        if slot is not None:
            self._place(job, slot)
        return slot

    def _has_cache(self, job: Job) -> bool:
        session = job.request.session
        return session is not None and session in self._table.by_session

    def _place(self, job: Job, slot: int) -> None:
        table, request = self._table, job.request
        prompt = np.asarray(request.prompt_ids, dtype=np.int32)
        self._reserve(slot + 1, len(prompt) + 2)
        table.length[slot] = min(table.shared_prefix(slot, prompt), len(prompt) - 1)
        if table.length[slot] < table.shared[slot] or table.length[slot] == 0:
            table.relate([slot], 0)
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
        if self._runner is None:
            self._runner = make_runner(self._model, self._context_limit)
        self._table.reserve(slots, columns)
        self._runner.reserve(*self._table.shape)

    def _fill(self, slots: list[int]) -> None:
        """Bring rows to their last known token, running every shared token once."""
        assert self._runner is not None or not slots
        table, runner = self._table, self._runner
        if runner is None:
            return
        if not runner.incremental:
            table.length[slots] = table.known[slots] - 1
            return
        groups: dict[bytes, list[int]] = {}
        for slot in sorted(slots, key=lambda s: -int(table.length[s])):
            groups.setdefault(table.ids[slot, : table.known[slot]].tobytes(), []).append(slot)
        leaders = [group[0] for group in groups.values()]
        self._copy_from_donors(leaders)
        self._run_common_prefixes(leaders)
        decoding = len(self._jobs) - len(slots)
        singles = [group[0] for group in groups.values() if len(group) == 1]
        crowded = decoding >= FEED_CROWD * len(singles)
        self._prefill(
            [
                group[0]
                for group in groups.values()
                if len(group) > 1 or not crowded or self._missing(group[0]) > FEED_LIMIT
            ]
        )
        for group in groups.values():
            behind = [slot for slot in group[1:] if self._missing(slot) > 0]
            self._copy(group[0], behind, int(table.length[group[0]]))
            if len(group) > 1:
                table.relate(group, int(table.length[group].min()))

    def _missing(self, slot: int) -> int:
        """Tokens to run before the last known one, which the next step runs."""
        return int(self._table.known[slot] - 1 - self._table.length[slot])

    def _copy_from_donors(self, leaders: list[int]) -> None:
        table = self._table
        for slot in leaders:
            if self._missing(slot) < MIN_COPY:
                continue
            donor, shared = table.best_donor(table.ids[slot, : table.known[slot] - 1])
            if shared >= table.length[slot] + MIN_COPY:
                self._copy(donor, [slot], shared)

    def _run_common_prefixes(self, leaders: list[int]) -> None:
        """Prompts that begin alike (a system prompt, tool schemas): their prefix is run once."""
        table = self._table
        families: dict[bytes, list[int]] = {}
        for slot in leaders:
            if table.length[slot] == 0 and table.known[slot] > MIN_COPY:
                families.setdefault(table.ids[slot, :MIN_COPY].tobytes(), []).append(slot)
        for family in families.values():
            shortest = int(table.known[family].min()) - 1
            rows = table.ids[family, :shortest]
            differs = (rows != rows[0]).any(0)
            shared = int(differs.argmax()) if differs.any() else shortest
            if (len(family) - 1) * shared >= MIN_SAVED:
                self._prefill(family[:1], np.array([shared]))
                self._copy(family[0], family[1:], shared)
                table.relate(family, shared)

    def _prefill(self, slots: list[int], end: np.ndarray | None = None) -> None:
        table = self._table
        stop = table.known[slots] - 1 if end is None else end
        todo = table.length[slots] < stop
        if not todo.any():
            return
        assert self._runner is not None
        rows = np.asarray(slots)[todo]
        self._runner.prefill(table.ids, rows.tolist(), table.length[rows], stop[todo])
        self.prefilled_tokens += int((stop[todo] - table.length[rows]).sum())
        table.length[rows] = stop[todo]

    def _copy(self, source: int, targets: list[int], width: int) -> None:
        if targets:
            assert self._runner is not None
            self._runner.copy([source] * len(targets), targets, width)
            self._table.length[targets] = width

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
        rows = table.extent
        active, lengths = table.active[:rows], table.length[:rows]
        width = int(lengths[active].max()) + 1
        self._reserve(rows, width + 2)
        assert self._runner is not None
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
        table.versions[sampled, column] = self._version
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
