"""The reward calculator: verifiers gate, then step, rollout and group rewards add up.

The reward of a turn is the environment's intrinsic reward plus weighted step rewards plus its
share of the rollout and group rewards. Every number stays in `reward_parts` with where it came
from; `reward` is the sum of the parts' values and, when there are turns, of `step_rewards`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from retrain.rewards.base import check_verifier_shape
from retrain.rewards.failures import (
    BadGroupScore,
    RewardFailure,
    as_finite,
    as_group_scores,
    as_verdict,
    describe_exception,
)
from retrain.rewards.spec import (
    NamedVerifier,
    RewardSpec,
    at_turn,
    check_choice,
    check_number,
    spread,
)
from retrain.rewards.state import Stateful, plain_state
from retrain.rewards.warn import penalty_warnings
from retrain.types import FailureKind, InfrastructureError, RewardPart, Rollout, UserError

OnError = Literal["stop", "mask", "penalty"]
T = TypeVar("T")


class _Masked(Exception):
    """This rollout cannot be scored; the message says why."""

    def __init__(self, reason: str, kind: FailureKind = "reward") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class _Sheet:
    """One rollout while it is scored."""

    rollout: Rollout
    turns: int
    parts: list[RewardPart] = field(default_factory=list)
    verdicts: dict[int, bool | Exception] = field(default_factory=dict)
    """By identity of the verifier: what it returned or raised."""
    gated: bool = False
    """A verifier of the whole set-up failed: nothing else is computed."""
    masked: _Masked | None = None

    @property
    def open(self) -> bool:
        return not self.gated and self.masked is None

    def mask(self, reason: _Masked) -> None:
        self.masked = self.masked or reason

    def close(self) -> None:
        """Write the result into the rollout."""
        rollout = self.rollout
        if self.masked is not None:
            rollout.mask(self.masked.kind, str(self.masked))
            rollout.reward_parts, rollout.step_rewards, rollout.reward = [], [], 0.0
            return
        by_turn: list[list[float]] = [[] for _ in range(self.turns)]
        for part in self.parts:
            if part.turn is not None:
                by_turn[part.turn].append(part.value)
        rollout.reward_parts = self.parts
        rollout.step_rewards = [math.fsum(values) for values in by_turn]
        rollout.reward = math.fsum(part.value for part in self.parts)


class RewardCalculator:
    """Scores one group of rollouts at a time.

    `verifiers` gate the whole set-up: when one fails, the rollout's total becomes
    `verifier_penalty` (at the last turn) and nothing else is computed, the environment's reward
    included. Verifiers are asked in order, each once per rollout however often it is attached,
    and not past the first that fails.

    `on_error` says what happens when a reward or verifier raises or returns something unusable:
    `stop` raises `RewardFailure`; `mask` sets `rollout.error`; `penalty` makes that component
    (the total, for a verifier of the whole set-up) `error_penalty`, unweighted, spread like a
    verifier's penalty. A group reward that fails concerns every rollout of the group. An
    `InfrastructureError` always masks. Nothing is computed for rollouts that are masked already.

    Raises:
        UserError: two rewards with one name, or a key that could never act.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        verifiers: Sequence[NamedVerifier] = (),
        verifier_penalty: float = 0.0,
        on_error: OnError = "stop",
        error_penalty: float = 0.0,
    ) -> None:
        check_choice("reward set-up", "on_error", on_error, get_args(OnError))
        check_number("reward set-up", "verifier_penalty", verifier_penalty)
        check_number("reward set-up", "error_penalty", error_penalty)
        for name, function in verifiers:
            check_verifier_shape(name, function)
        _refuse_idle_keys(specs, verifiers, verifier_penalty, on_error, error_penalty)
        self.specs = tuple(specs)
        self.verifiers = tuple(verifiers)
        self.verifier_penalty = verifier_penalty
        self.on_error = on_error
        self.error_penalty = error_penalty

    def state(self) -> dict[str, Any]:
        """Of the rewards that have one, by name: what their `state_dict()` gives.

        Raises:
            UserError: JSON cannot hold it as it is.
        """
        kept = ((spec.name, spec.function) for spec in self.specs)
        return {n: plain_state(n, f.state_dict()) for n, f in kept if isinstance(f, Stateful)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        for spec in self.specs:
            if isinstance(spec.function, Stateful):
                spec.function.load_state_dict(state[spec.name])

    def end_step(self, rollouts: Sequence[Rollout]) -> None:
        """Tell the rewards that have a state what a step of training sampled, in the order of
        tasks and samples, whatever order it ended in."""
        for spec in self.specs:
            if isinstance(spec.function, Stateful):
                scored = [r for r in rollouts if r.error is None and spec.is_for(r.agent)]
                spec.function.end_step(scored)

    async def close(self) -> None:
        """Close the rewards that hold something for the whole stage: those that have an
        `async close()`."""
        for spec in self.specs:
            close = getattr(spec.function, "close", None)
            if inspect.iscoroutinefunction(close):
                await close()

    def warnings(self) -> list[str]:
        """One sentence for each verifier whose failure may pay better than passing it."""
        return penalty_warnings(self.specs, self.verifiers, self.verifier_penalty)

    async def score(self, rollouts: list[Rollout]) -> None:
        """Fill `reward_parts`, `step_rewards` [S] and `reward` of one group, in place.

        Async functions of the group run concurrently; sync ones run on the event loop.

        Raises:
            RewardFailure: with `on_error: stop`, once the group's running calls have ended; then
                no rollout of the group has been changed.
        """
        sheets = [_Sheet(r, len(r.model_messages)) for r in rollouts if r.error is None]
        await _in_order(self._score_alone(sheet) for sheet in sheets)
        for spec in self.specs:
            if spec.kind == "group":
                for own in _compared(sheets):
                    if spec.is_for(own[0].rollout.agent):
                        await self._score_group(spec, own)
        for sheet in sheets:
            sheet.close()

    async def _score_alone(self, sheet: _Sheet) -> None:
        """Everything that depends on one rollout only."""
        try:
            if await self._set_up_gate(sheet):
                return
            sheet.parts += self._intrinsic(sheet)
            passing = []
            for spec in self._alone(sheet.rollout.agent):
                if await self._passes(spec, sheet):
                    passing.append(spec)
            for parts in await _in_order(self._component(spec, sheet) for spec in passing):
                sheet.parts += parts
        except _Masked as reason:
            sheet.mask(reason)

    def _alone(self, agent: str) -> list[RewardSpec]:
        """What scores a rollout of this agent by itself."""
        return [spec for spec in self.specs if spec.kind != "group" and spec.is_for(agent)]

    async def _set_up_gate(self, sheet: _Sheet) -> bool:
        """Whether a verifier of the whole set-up failed; its penalty is then entered."""
        for name, function in self.verifiers:
            try:
                passed = await _verdict(function, sheet)
            except Exception as exception:
                entry = self._failed(f"verifier '{name}'", name, "verifier", sheet, exception)
                entry = _with_verifier(entry, name)
            else:
                if passed:
                    continue
                penalty = self.verifier_penalty
                entry = RewardPart(name, "verifier", None, penalty, 1.0, penalty, name)
            sheet.gated = True
            sheet.parts += spread(entry, sheet.turns, "last_step")
            return True
        return False

    def _intrinsic(self, sheet: _Sheet) -> list[RewardPart]:
        values = sheet.rollout.env_rewards
        if not any(values):
            return []
        try:
            if len(values) != sheet.turns:
                raise ValueError(f"gave {len(values)} rewards for {sheet.turns} turns")
            numbers = [as_finite(value) for value in values]
        except (ValueError, TypeError) as exception:
            place, kind = "environment reward", "environment"
            entry = self._failed(place, kind, "environment", sheet, exception)
            return spread(entry, sheet.turns, "last_step")
        return [
            RewardPart("environment", "environment", turn, value, 1.0, value)
            for turn, value in enumerate(numbers)
        ]

    async def _passes(self, spec: RewardSpec, sheet: _Sheet) -> bool:
        """Whether the reward's own verifiers pass; else its penalty is entered."""
        for name, function in spec.verifiers:
            try:
                passed = await _verdict(function, sheet)
            except Exception as exception:
                place = f"verifier '{name}' of reward '{spec.name}'"
                entry = self._failed(place, spec.name, spec.kind, sheet, exception)
                entry = _with_verifier(entry, name)
            else:
                if passed:
                    continue
                penalty = spec.verifier_penalty
                entry = RewardPart(spec.name, spec.kind, None, penalty, 1.0, penalty, name)
            sheet.parts += spread(entry, sheet.turns, spec.distribution_strategy)
            return False
        return True

    async def _component(self, spec: RewardSpec, sheet: _Sheet) -> list[RewardPart]:
        """The parts of one step or rollout reward."""
        rollout, params = sheet.rollout, spec.params
        try:
            if spec.kind == "rollout":
                entry = _entry(spec, await _call(spec.function, rollout, **params))
                return spread(entry, sheet.turns, spec.distribution_strategy)
            steps = range(sheet.turns)
            returned = await _in_order(_call(spec.function, rollout, s, **params) for s in steps)
            entries = [_entry(spec, value) for value in returned]
            return [at_turn(entry, turn, entry.value) for turn, entry in enumerate(entries)]
        except Exception as exception:
            entry = self._failed(f"reward '{spec.name}'", spec.name, spec.kind, sheet, exception)
            return spread(entry, sheet.turns, spec.distribution_strategy)

    async def _score_group(self, spec: RewardSpec, sheets: list[_Sheet]) -> None:
        members = []
        for sheet in sheets:
            try:
                if sheet.open and await self._passes(spec, sheet):
                    members.append(sheet)
            except _Masked as reason:
                sheet.mask(reason)
        if not members:
            return
        place = f"reward '{spec.name}'"
        try:
            rollouts = [sheet.rollout for sheet in members]
            returned = await _call(spec.function, rollouts, **spec.params)
            entries = [_entry(spec, s) for s in as_group_scores(returned, len(members))]
        except Exception as exception:
            blamed = members[exception.index if isinstance(exception, BadGroupScore) else 0]
            try:
                entry = self._failed(place, spec.name, "group", blamed, exception)
                entries = [entry] * len(members)
            except _Masked as reason:
                for sheet in sheets:
                    sheet.mask(reason)
                return
        for sheet, entry in zip(members, entries, strict=True):
            sheet.parts += spread(entry, sheet.turns, spec.distribution_strategy)

    def _failed(
        self,
        place: str,
        name: str,
        kind: Literal["environment", "step", "rollout", "group", "verifier"],
        sheet: _Sheet,
        exception: Exception,
    ) -> RewardPart:
        """The penalty entry for a failure, or the exception that `on_error` asks for."""
        if isinstance(exception, InfrastructureError):
            raise _Masked(f"{place}: {exception}", exception.kind or "reward") from exception
        if self.on_error == "stop":
            raise RewardFailure(place, sheet.rollout, exception) from exception
        what = describe_exception(exception)
        if self.on_error == "mask":
            raise _Masked(f"{place} failed: {what}") from exception
        return RewardPart(name, kind, None, self.error_penalty, 1.0, self.error_penalty, error=what)


def _compared(sheets: Sequence[_Sheet]) -> list[list[_Sheet]]:
    """Those that are compared with each other: of one agent, and of one group of an episode's."""
    groups: dict[tuple[str, str | None], list[_Sheet]] = {}
    for sheet in sheets:
        groups.setdefault((sheet.rollout.agent, sheet.rollout.group_id), []).append(sheet)
    return list(groups.values())


def _entry(spec: RewardSpec, returned: Any) -> RewardPart:
    """A whole-rollout entry for what the function returned, weighted."""
    raw = as_finite(returned)
    value = as_finite(spec.weight * raw)
    return RewardPart(spec.name, spec.kind, None, raw, spec.weight, value)


def _with_verifier(part: RewardPart, verifier: str) -> RewardPart:
    return RewardPart(
        part.name, part.kind, part.turn, part.raw, part.weight, part.value, verifier, part.error
    )


async def _verdict(function: Callable[..., Any], sheet: _Sheet) -> bool:
    """Ask a verifier, once per rollout; a failure is remembered and raised again."""
    key = id(function)
    if key not in sheet.verdicts:
        try:
            sheet.verdicts[key] = as_verdict(await _call(function, sheet.rollout))
        except Exception as exception:
            sheet.verdicts[key] = exception
    outcome = sheet.verdicts[key]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def _call(function: Callable[..., Any], *args: Any, **params: Any) -> Any:
    returned = function(*args, **params)
    return await returned if inspect.isawaitable(returned) else returned


async def _in_order(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run concurrently; wait for all; then raise the first failure in order, not in time."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    results: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def _refuse_idle_keys(
    specs: Sequence[RewardSpec],
    verifiers: Sequence[NamedVerifier],
    verifier_penalty: float,
    on_error: OnError,
    error_penalty: float,
) -> None:
    """Refuse names that clash and keys that could not change any number."""
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise UserError(f"{count} rewards are named '{name}'", "give each its own name")
    if verifier_penalty and not verifiers:
        raise UserError(
            "reward set-up: verifier_penalty is set, but no verifier is attached to the set-up",
            "add verifiers to the set-up, or remove verifier_penalty",
        )
    if error_penalty and on_error != "penalty":
        raise UserError(
            f"reward set-up: error_penalty is set, but on_error is {on_error}",
            "set on_error: penalty, or remove error_penalty",
        )
    for spec in specs:
        if spec.verifier_penalty and not spec.verifiers:
            raise UserError(
                f"reward '{spec.name}': verifier_penalty is set, but it has no verifiers",
                "add verifiers to this reward, or remove verifier_penalty",
            )
        unused = spec.kind == "step" and not spec.verifiers and on_error != "penalty"
        if unused and spec.distribution_strategy != "last_step":
            raise UserError(
                f"reward '{spec.name}': a step reward goes to its own step, so "
                "distribution_strategy has nothing to spread",
                "remove distribution_strategy, or make it a rollout reward",
            )
