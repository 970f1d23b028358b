"""All trackers of a run: one axis, names that do not clash, and what each of them gets."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from retrain.config.tracking import (
    PythonTrackerConfig,
    TrackerConfig,
    TrackingConfig,
    active_trackers,
)
from retrain.importing import import_object
from retrain.tracking.trackers.base import GRACE_S, METHODS, RolloutRow, RunInfo, Status
from retrain.tracking.trackers.guard import GuardedTracker
from retrain.types import Rollout, UserError

_HERE = "retrain.tracking.trackers"

BUILT_IN = {
    "wandb": f"{_HERE}.wandb:WandbTracker",
    "tensorboard": f"{_HERE}.tensorboard:TensorboardTracker",
    "trackio": f"{_HERE}.trackio:TrackioTracker",
    "mlflow": f"{_HERE}.mlflow:MLflowTracker",
}
"""By type, which is also the name of the package and of the extra that brings it."""


class Trackers:
    """Tells every tracker the same.

    The global step counts the training steps of all stages; an evaluation is at that of the last
    one before it. A metric keeps its name in metrics.jsonl; `prefixed` are the stages whose
    metrics have the stage's name before it. `rollouts` of them, spread evenly, are logged of each
    evaluation, and of each step that `rollouts_every` divides.
    """

    def __init__(
        self,
        trackers: Sequence[GuardedTracker] = (),
        *,
        prefixed: Collection[str] = (),
        rollouts: int = 0,
        rollouts_every: int = 1,
        finish_timeout_s: float = 0.0,
    ) -> None:
        self._trackers = trackers
        self._prefixed = frozenset(prefixed)
        self._rollouts = rollouts
        self._rollouts_every = rollouts_every
        self._finish_timeout_s = finish_timeout_s
        self._before = 0

    def start(self, run: RunInfo, announce: Callable[[str], None]) -> None:
        """Begin; what is slow about it is not waited for."""
        for tracker in self._trackers:
            tracker.start(run, announce)

    def begin_stage(self, steps_before: int) -> None:
        """A stage begins, after so many training steps of other stages."""
        self._before = steps_before

    def log_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """The row of a stage's step; what is not finite is left out."""
        prefix = f"{stage}/" if stage in self._prefixed else ""
        finite = {f"{prefix}{n}": float(v) for n, v in metrics.items() if math.isfinite(v)}
        self._call("log_metrics", self._before + step, finite)

    def log_rollouts(
        self,
        name: str,
        step: int,
        rollouts: Sequence[Rollout],
        advantages: Mapping[str, float] | None = None,
        *,
        training: bool = False,
    ) -> None:
        """Some rollouts of a stage's step; `advantages` go by rollout id."""
        due = not training or step % self._rollouts_every == 0
        count = min(self._rollouts, len(rollouts))
        if not self._trackers or not due or count == 0:
            return
        given = advantages or {}
        chosen = [rollouts[i * len(rollouts) // count] for i in range(count)]
        rows = [RolloutRow.of(rollout, given.get(rollout.id)) for rollout in chosen]
        self._call("log_rollouts", name, self._before + step, rows)

    def log_artifact(self, name: str, path: Path) -> None:
        """A file or directory, where it is there."""
        if path.exists():
            self._call("log_artifact", name, path)

    def finish(self, status: Status) -> None:
        """End all of them, together within the time that they have for it, and GRACE_S more."""
        deadline = time.monotonic() + self._finish_timeout_s
        for tracker in self._trackers:
            tracker.finish(status)
        for tracker in self._trackers:
            tracker.join(max(deadline - time.monotonic(), 0.0))
        deadline = time.monotonic() + GRACE_S
        for tracker in self._trackers:
            tracker.end(max(deadline - time.monotonic(), 0.0))

    def _call(self, method: str, *arguments: object) -> None:
        for tracker in self._trackers:
            tracker.call(method, *arguments)


def build_trackers(section: TrackingConfig, *, prefixed: Collection[str] = ()) -> Trackers:
    """The trackers of a config, none of them started.

    Raises:
        UserError: a package is missing, or there is no such class.
    """
    listed = active_trackers(section)
    for config in listed:
        check_tracker(config)
    return Trackers(
        [
            GuardedTracker(
                config.type, *_made_of(config), finish_timeout_s=section.finish_timeout_s
            )
            for config in listed
        ],
        prefixed=prefixed,
        rollouts=section.rollouts_logged,
        rollouts_every=section.rollouts_logged_every,
        finish_timeout_s=section.finish_timeout_s,
    )


def check_tracker(config: TrackerConfig) -> None:
    """
    Raises:
        UserError: its package is missing, or it is no tracker.
    """
    if isinstance(config, PythonTrackerConfig):
        found = import_object(config.path, "tracker")
        lacking = [name for name in METHODS if not callable(getattr(found, name, None))]
        if lacking:
            raise UserError(
                f"tracking.trackers: {config.path} has no {', '.join(lacking)}",
                "A tracker has the methods of retrain.tracking.trackers.Tracker.",
            )
        return
    spec = importlib.util.find_spec(config.type)
    if spec is None or spec.origin is None:  # a directory of that name is no package
        raise UserError(
            f"tracking.trackers: {config.type} needs the package {config.type}",
            f"Run: pip install 'retrain[{config.type}]'",
        )


def _made_of(config: TrackerConfig) -> tuple[str, dict[str, object]]:
    """The class, and the arguments of its constructor."""
    if isinstance(config, PythonTrackerConfig):
        return config.path, config.params
    return BUILT_IN[config.type], config.model_dump(exclude={"type"})


def sharing(stages: Sequence[tuple[str, str, bool]]) -> set[str]:
    """Names under which metrics of one kind, of training or of evaluation, are logged, where there
    are several such.

    Args:
        stages: name, kind, and whether evaluations are made during it, of each.
    """
    training = {name for name, kind, _ in stages if kind != "eval"}
    evaluations = {name for name, kind, _ in stages if kind == "eval"}
    evaluations |= {f"{name}-eval" for name, kind, during in stages if kind != "eval" and during}
    validations = {f"{name}-validation" for name, kind, _ in stages if kind in ("sft", "distill")}
    shared = (training, evaluations, validations)
    return {name for names in shared if len(names) > 1 for name in names}
