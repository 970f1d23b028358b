"""Weights & Biases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from retrain.tracking.trackers.base import COLUMNS, Kept, RolloutRow, RunInfo, Status

AXIS = "global_step"
"""What every metric is drawn over. W&B's own step, which never goes back, counts the calls."""

_EXIT_CODES: dict[Status, int] = {"completed": 0, "failed": 1, "interrupted": 255}
"""As W&B reads them: finished, failed, killed."""


class WandbTracker:
    """Metrics as history over `global_step`, rollouts as a table, files as artifacts.

    A resumed run goes on with the same W&B run: the steps that it makes again are there twice.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        self._where: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
        }
        self._name = name
        self._mode = mode
        self._run: Any = None
        self._kept: Kept | None = None
        self._rows = 0

    def start(self, run: RunInfo) -> str:
        import wandb

        self._kept = Kept(run.directory, "wandb")
        kept = self._kept.read()
        self._rows = int(kept.get("rows", 0))
        self._run = wandb.init(
            **self._where,
            name=self._name or run.name,
            id=kept.get("id") or secrets.token_hex(4),
            resume="allow" if kept and self._mode == "online" else None,
            mode=self._mode,
            dir=str(run.directory),
            config=run.config,
            allow_val_change=True,
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, x_stats_pid=os.getppid()
            ),
        )
        self._keep()
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)
        if self._mode == "online":
            return str(self._run.url)
        return f"wandb sync {Path(self._run.dir).parent}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, metrics)

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        import wandb

        table = wandb.Table(
            columns=list(COLUMNS), data=[row.cells() for row in rows], allow_mixed_types=True
        )
        self._log(step, {f"traces/{name}": table})

    def log_artifact(self, name: str, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-{name}", type=name)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=_EXIT_CODES[status])

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._rows += 1
        self._keep()
        self._run.log({AXIS: step, **values}, step=self._rows - 1, commit=True)

    def _keep(self) -> None:
        assert self._kept is not None
        self._kept.write(id=self._run.id, rows=self._rows)
