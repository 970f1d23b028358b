"""trackio: a local database, or a Hugging Face Space."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.tracking.trackers.base import Kept, RolloutRow, RunInfo, Status


class TrackioTracker:
    """Metrics over the global step, rollouts as traces, files as artifacts.

    A resumed run goes on with the same trackio run: the steps that it makes again are there twice,
    the later ones last. trackio has no status of a run.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str | None = None,
        directory: str | None = None,
        space_id: str | None = None,
    ) -> None:
        self._project = project
        self._name = name
        self._directory = directory
        self._space_id = space_id
        self._run: Any = None

    def start(self, run: RunInfo) -> str:
        if self._directory is not None:  # trackio reads it when it is imported
            os.environ["TRACKIO_DIR"] = str(Path(self._directory).resolve())
        import trackio

        kept = Kept(run.directory, "trackio")
        known = kept.read().get("name")
        name = known or self._name or f"{run.name}-{secrets.token_hex(2)}"
        self._run = trackio.init(
            project=self._project,
            name=name,
            space_id=self._space_id,
            config=run.config,
            resume="allow" if known else "never",
            embed=False,
        )
        kept.write(name=self._run.name)
        return f"trackio show --project {self._project}, run {self._run.name}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        import trackio

        traces = [trackio.Trace(list(row.messages), metadata=_metadata(row)) for row in rows]
        self._run.log({f"traces/{name}": traces}, step=step)

    def log_artifact(self, name: str, path: Path) -> None:
        self._run.log_artifact(path, name=f"{self._run.name}-{name}", type=name)

    def finish(self, status: Status) -> None:
        self._run.finish()


def _metadata(row: RolloutRow) -> dict[str, Any]:
    return {
        "rollout": row.id,
        "group": row.group,
        "task": row.task,
        "reward": row.reward,
        "advantage": row.advantage,
        "reward_parts": row.reward_parts,
        "stop_reason": row.stop_reason,
    }
