"""A tracker that writes down what it is told, and gives the trouble that it is asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.tracking.trackers.base import RolloutRow, RunInfo, Status


class Recorder:
    """Writes every call into `path`; `trouble` is what happens in `at`."""

    def __init__(self, path: str, trouble: str = "", at: str = "") -> None:
        self._path = Path(path)
        self._trouble, self._at = trouble, at

    def start(self, run: RunInfo) -> str:
        self._note("start", run.name, run.rewound_to)
        return "here"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("log_metrics", step, dict(metrics))

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        self._note("log_rollouts", name, step, [row.id for row in rows])

    def log_artifact(self, name: str, path: Path) -> None:
        self._note("log_artifact", name, str(path))

    def finish(self, status: Status) -> None:
        self._note("finish", status)

    def _note(self, *call: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(call) + "\n")
        print("a banner")
        if call[0] != self._at:
            return
        if self._trouble == "raises":
            raise ConnectionError("no\nnetwork")
        if self._trouble == "hangs":
            time.sleep(3600)
        if self._trouble == "dies":
            os._exit(7)
