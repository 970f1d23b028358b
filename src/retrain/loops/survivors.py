"""Rollouts that infrastructure lost, or that came too late: counted, and made up for by nobody.

A step goes on with what survives. It ends the run only when infrastructure has left nothing for
several steps.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence

from retrain.config.algorithm import TOKEN_ADVANTAGES
from retrain.config.root import TrainingConfig
from retrain.engines import PolicyEngine
from retrain.loops.credit import by_agent
from retrain.tracking.run_dir import RunDirectory
from retrain.types import NO_VERSION, Rollout, UserError

logger = logging.getLogger(__name__)


def smallest_group(config: TrainingConfig) -> int:
    """Fewest survivors of a group that teaches."""
    given = config.rollout.min_group_size
    if given is not None:
        return given
    return 1 if config.algorithm.hyperparameters.advantage in TOKEN_ADVANTAGES else 2


def large_enough(group: Sequence[Rollout], least: int) -> list[Rollout]:
    """Those survivors of a group that are compared with enough others, themselves counted, and
    train."""
    of_agents = (own for own in by_agent([group]) if own[0].trainable and len(own) >= least)
    return [rollout for own in of_agents for rollout in own]


class Freshness:
    """How old the weights are that sampled a rollout, counted in steps.

    Args:
        max_staleness: what is older does not train.
    """

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._published: list[int] = []

    def publish(self, version: int) -> None:
        """The engine samples from `version` now, the policy that the coming step learns with."""
        if not self._published or version > self._published[-1]:
            self._published.append(version)

    def steps_behind(self, rollout: Rollout) -> int:
        """How often weights were published since those that sampled its oldest token; weights from
        before the stage began count as older than allowed."""
        versions = {version for segment in rollout.segments for version in set(segment.versions)}
        oldest = min(versions - {NO_VERSION}, default=self._published[-1])
        newer = len(self._published) - bisect_right(self._published, oldest)
        known = oldest >= self._published[0]
        return newer if known else max(newer, self._max_staleness + 1)

    def is_stale(self, rollout: Rollout) -> bool:
        """Whether it has a token that is too old to train; one that is masked, or would not train
        anyway, has other reasons."""
        trains = rollout.error is None and rollout.trainable
        return trains and self.steps_behind(rollout) > self._max_staleness

    def of(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
        """The groups without what is stale."""
        return [[rollout for rollout in group if not self.is_stale(rollout)] for group in groups]

    def warn(self, place: str, rollouts: Sequence[Rollout]) -> None:
        """Say it where some are stale: the loop starts none too early, so an engine is behind."""
        stale = [rollout for rollout in rollouts if self.is_stale(rollout)]
        if stale:
            logger.warning(
                "%s: %d of %d rollouts do not train, for they have tokens older than max_staleness "
                "allows; the first, %s, is %d steps behind",
                *(place, len(stale), len(rollouts), stale[0].id, self.steps_behind(stale[0])),
            )


def write_failures(
    run: RunDirectory, stage: str, step: int, rollouts: Sequence[Rollout], place: str = ""
) -> None:
    """Add the failed attempts to failures.jsonl, and warn of what is masked."""
    run.log_failures(stage, step, rollouts)
    errors = [rollout.error for rollout in rollouts if rollout.error is not None]
    if errors:
        logger.warning(
            "%s: %d of %d rollouts are masked; the first: %s",
            *(place or f"{stage} step {step}", len(errors), len(rollouts), errors[0]),
        )


class Losses:
    """What the steps of one stage lost.

    Args:
        max_lost_steps: so many steps in a row without a survivor end the run.
    """

    def __init__(
        self, stage: str, run: RunDirectory, engine: PolicyEngine, *, max_lost_steps: int
    ) -> None:
        self._stage = stage
        self._run = run
        self._engine = engine
        self._max_lost_steps = max_lost_steps
        self._restarts = engine.restarts
        self._lost_steps = 0
        self._first_cause = ""

    def observe(self, step: int, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Write a step's failures down; what is to be reported of the engine."""
        rollouts = [rollout for group in groups for rollout in group]
        write_failures(self._run, self._stage, step, rollouts)
        if any(rollout.error is None for rollout in rollouts):
            self._lost_steps, self._first_cause = 0, ""
        else:
            self._lost_steps += 1
            self._first_cause = self._first_cause or str(rollouts[0].error)
        restarts, self._restarts = self._engine.restarts - self._restarts, self._engine.restarts
        found = {f"engine/{name}": value for name, value in self._engine.measured.items()}
        return found | ({"engine/restarts": float(restarts)} if restarts else {})

    @property
    def streak(self) -> int:
        """Steps since the last one with a survivor."""
        return self._lost_steps

    def check(self, step: int) -> None:
        """
        Raises:
            UserError: this was one lost step too many.
        """
        if self._lost_steps < self._max_lost_steps:
            return
        steps = "this step" if self._lost_steps == 1 else f"the last {self._lost_steps} steps"
        raise UserError(
            f"{self._stage} step {step}: every rollout of {steps} was lost; "
            f"the first cause: {self._first_cause}",
            f"{self._run.path / 'failures.jsonl'} lists them. Repair what failed, then continue "
            "with --resume; rollout.max_lost_steps sets how many such steps end the run.",
        )
