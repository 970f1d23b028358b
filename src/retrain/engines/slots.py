"""Who sits in which slot, and every per-token column of it.

A slot's sequence has `known` tokens, of which the model has run the first `length`. One rule
covers prompts, tool results and sampling alike: a step runs token `length`, and if that was the
last known one, the token sampled after it becomes known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrain.engines.sampling import UNIFORM_BLOCK

COLUMN_BLOCK = 64
SLOT_BLOCK = 16
MOVING_COST = 8
"""What moving a row costs, in rows run for a step. Rows that wait for a tool soon come back, so
their places are not filled at once."""


@dataclass
class Owner:
    """Whose cache a slot keeps between requests."""

    session: str | None
    idle_since: int = 0
    """Step at which its last request ended."""


class SlotTable:
    """Columns of all slots, as arrays indexed by slot.

    `ids`, `logprobs`, `versions` are [slots, columns], `uniforms` [slots, UNIFORM_BLOCK], the
    others [slots]: a request ends when `known` reaches `end`, `drawn` uniform numbers are used
    up, `rule` is the index of its stop rule, `truncated` says that top-k or top-p applies. Slots
    of one `family` have equal tokens in their first `shared` columns. A freed slot keeps its
    tokens until it is taken again, so that others can copy a prefix.
    """

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self.ids = np.zeros((0, 0), dtype=np.int32)
        self.logprobs = np.zeros((0, 0), dtype=np.float32)
        self.versions = np.zeros((0, 0), dtype=np.int32)
        self.length = np.zeros(max_slots, dtype=np.int64)
        self.known = np.zeros(max_slots, dtype=np.int64)
        self.end = np.zeros(max_slots, dtype=np.int64)
        self.active = np.zeros(max_slots, dtype=np.bool_)
        self.temperature = np.ones(max_slots, dtype=np.float32)
        self.truncated = np.zeros(max_slots, dtype=np.bool_)
        self.rule = np.zeros(max_slots, dtype=np.int64)
        self.uniforms = np.zeros((max_slots, UNIFORM_BLOCK), dtype=np.float32)
        self.drawn = np.zeros(max_slots, dtype=np.int64)
        self.family = np.zeros(max_slots, dtype=np.int64)
        self.shared = np.zeros(max_slots, dtype=np.int64)
        self.settled = np.zeros(max_slots, dtype=np.int64)
        self._families = 0
        self.owners: list[Owner | None] = [None] * max_slots
        self.by_session: dict[str, int] = {}
        self._wasted = 0
        self.steps = 0
        """Decode steps so far: the clock by which waiting sessions age."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def extent(self) -> int:
        """One more than the highest active slot."""
        active = np.flatnonzero(self.active)
        return int(active[-1]) + 1 if len(active) else 0

    def reserve(self, slots: int, columns: int) -> None:
        """Grow by whole blocks to at least `slots` rows and `columns` columns."""
        rows, width = self.shape
        if slots <= rows and columns <= width:
            return
        if slots > rows:
            rows = min(self.max_slots, max(_blocks(slots, SLOT_BLOCK), 2 * rows))
        if columns > width:
            width = max(_blocks(columns, COLUMN_BLOCK), _blocks(5 * width // 4, COLUMN_BLOCK))
        for name in ("ids", "logprobs", "versions"):
            old = getattr(self, name)
            new = np.zeros((rows, width), dtype=old.dtype)
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return sum(owner is None for owner in self.owners)

    def take(self, session: str | None, *, idle_before: int) -> int | None:
        """A slot for a request of `session`: its own, else the lowest free one, else that of the
        session that has waited longest, if it does so since before step `idle_before`."""
        own = self.by_session.get(session) if session is not None else None
        if own is not None and not self.active[own]:
            return own
        free = next((s for s, owner in enumerate(self.owners) if owner is None), None)
        slot = self._longest_waiting(idle_before) if free is None else free
        if slot is None:
            return None
        self.release(slot)
        # A session's second request at the same time gets a slot that nobody returns to.
        keep = session if own is None else None
        self.owners[slot] = Owner(keep)
        if keep is not None:
            self.by_session[keep] = slot
        return slot

    def _longest_waiting(self, idle_before: int) -> int | None:
        waiting = (s for s in range(self.max_slots) if not self.active[s])
        slot = min(waiting, key=lambda s: self._owner(s).idle_since, default=None)
        return None if slot is None or self._owner(slot).idle_since >= idle_before else slot

    def _owner(self, slot: int) -> Owner:
        owner = self.owners[slot]
        assert owner is not None
        return owner

    def deactivate(self, slot: int) -> None:
        """End a request; the cache stays if a session may come back for it."""
        self.active[slot] = False
        self._owner(slot).idle_since = self.steps
        if self._owner(slot).session is None:
            self.release(slot)

    def disown(self, slot: int) -> None:
        """Nobody will come back for this slot: it is free as soon as its request ends."""
        owner = self._owner(slot)
        if owner.session is not None:
            del self.by_session[owner.session]
            owner.session = None

    def release(self, slot: int) -> None:
        owner = self.owners[slot]
        self.active[slot] = False
        if owner is not None and owner.session is not None:
            del self.by_session[owner.session]
        self.owners[slot] = None

    def shared_prefix(self, slot: int, prompt: np.ndarray) -> int:
        """How many first tokens of `prompt` the slot has run."""
        count = min(int(self.length[slot]), len(prompt))
        differs = np.flatnonzero(self.ids[slot, :count] != prompt[:count])
        return int(differs[0]) if len(differs) else count

    def best_donor(self, prompt: np.ndarray, run: np.ndarray) -> tuple[int, int]:
        """The slot that has the longest prefix of `prompt` in its first `run` [slots] columns, and
        its length."""
        count = min(len(prompt), self.shape[1])
        differs = self.ids[:, :count] != prompt[:count]
        shared = np.where(differs.any(1), differs.argmax(1), count)
        shared = np.minimum(shared, run[: len(shared)])
        donor = int(shared.argmax())
        return donor, int(shared[donor])

    def relate(self, slots: list[int], shared: int) -> None:
        """Say that these slots, and no others, have their first `shared` tokens in common."""
        self._families += 1
        self.family[slots] = self._families
        self.shared[slots] = shared

    def forget(self) -> None:
        """The weights changed: nothing that was run counts any more."""
        self.length[:] = self.settled[:] = 0
        for slot in range(self.max_slots):
            if not self.active[slot]:
                self.release(slot)

    def compaction(self) -> tuple[list[int], list[int]]:
        """Active slots to move and the lower ones to swap them with; empty while the rows that
        idle in the view have not yet cost more than moving would."""
        count, extent = int(self.active.sum()), self.extent
        self._wasted += extent - count
        movers = np.flatnonzero(self.active[count:extent]) + count
        if not len(movers) or self._wasted < MOVING_COST * len(movers):
            return [], []
        self._wasted = 0
        holes = np.flatnonzero(~self.active[:count])
        return movers.tolist(), holes.tolist()

    def swap(self, first: list[int], second: list[int]) -> None:
        """Exchange slots pairwise, everything included."""
        source, target = first + second, second + first
        state = (self.ids, self.logprobs, self.versions, self.length, self.known, self.end)
        sampling = (self.temperature, self.truncated, self.rule, self.uniforms, self.drawn)
        for column in (*state, self.active, *sampling, self.family, self.shared, self.settled):
            column[target] = column[source]
        for a, b in zip(first, second, strict=True):
            self.owners[a], self.owners[b] = self.owners[b], self.owners[a]
        for slot in source:
            owner = self.owners[slot]
            if owner is not None and owner.session is not None:
                self.by_session[owner.session] = slot


def _blocks(count: int, block: int) -> int:
    return -(-count // block) * block
