"""MLflow, through its client: the package mlflow-skinny is enough for a server or a directory."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.tracking.trackers.base import COLUMNS, Kept, RolloutRow, RunInfo, Status, flat

_STATUSES: dict[Status, str] = {
    "completed": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_PARAM_CHARS = 6000


class MLflowTracker:
    """Metrics over the global step, rollouts as JSON tables, the config as parameters, files as
    artifacts.

    A resumed run goes on with the same MLflow run: the steps that it makes again are there twice,
    the later ones with later times. Characters that MLflow refuses in a name become underscores;
    in a directory, where a metric is a file, slashes of its name become dots.
    """

    def __init__(
        self, *, experiment: str, tracking_uri: str | None = None, name: str | None = None
    ) -> None:
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._name = name
        self._client: Any = None
        self._run_id = ""
        self._slash = "/"

    def start(self, run: RunInfo) -> str:
        # MLflow takes these from the environment only.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow.tracking import MlflowClient

        uri = self._tracking_uri or (run.directory.parent / "mlruns").resolve().as_uri()
        self._client = MlflowClient(uri)
        if "://" not in uri or uri.startswith("file:"):
            self._slash = "."
        kept = Kept(run.directory, "mlflow")
        known = kept.read()
        if known.get("tracking_uri") == uri:
            self._run_id = known["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(self._experiment)
            number = (
                self._client.create_experiment(self._experiment)
                if experiment is None
                else experiment.experiment_id
            )
            made = self._client.create_run(number, run_name=self._name or run.name)
            self._run_id = made.info.run_id
            kept.write(tracking_uri=uri, run_id=self._run_id)
            self._log_config(run.config)
        return f"run {self._run_id} of {self._experiment} at {uri}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        names = {name: _name_of(name).replace("/", self._slash) for name in metrics}
        rows = [Metric(names[name], value, now, step) for name, value in metrics.items()]
        for start in range(0, len(rows), _METRICS_AT_ONCE):
            part = rows[start : start + _METRICS_AT_ONCE]
            self._client.log_batch(self._run_id, metrics=part, synchronous=True)

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        table = {"columns": list(COLUMNS), "data": [row.cells() for row in rows]}
        place = f"rollouts/{_name_of(name)}-{step:06d}.json"
        self._client.log_text(self._run_id, json.dumps(table), place)

    def log_artifact(self, name: str, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), name)
        else:
            self._client.log_artifact(self._run_id, str(path))

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, _STATUSES[status])

    def _log_config(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(_name_of(key), value[:_PARAM_CHARS]) for key, value in flat(config)]
        for start in range(0, len(rows), _PARAMS_AT_ONCE):
            part = rows[start : start + _PARAMS_AT_ONCE]
            self._client.log_batch(self._run_id, params=part, synchronous=True)


def _name_of(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)
