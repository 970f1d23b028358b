"""Trackers: where a run's metrics, rollouts and results are sent besides its directory."""

from retrain.config.tracking import active_trackers
from retrain.tracking.trackers.base import RolloutRow, RunInfo, Tracker
from retrain.tracking.trackers.group import (
    Trackers,
    build_trackers,
    check_tracker,
    sharing,
)

__all__ = [
    "RolloutRow",
    "RunInfo",
    "Tracker",
    "Trackers",
    "active_trackers",
    "build_trackers",
    "check_tracker",
    "sharing",
]
