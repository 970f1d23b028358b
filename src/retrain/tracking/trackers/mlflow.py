"""MLflow, through its client: the package mlflow-skinny is enough for a server or a directory."""

from __future__ import annotations

import hashlib
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
_NAME_CHARS = 250
_MOST_REFUSED = 5
"""Parameters; then the rest is not tried."""


class MLflowTracker:
    """Metrics over the global step, rollouts as JSON tables, the config as parameters, files as
    artifacts.

    A resumed run goes on with the same MLflow run: the steps that it makes again are there twice,
    the later ones with later times. Characters that MLflow refuses in a name become underscores;
    in a directory, where a metric is a file, slashes of its name become dots. A name that would
    then be one of another metric has a hash after it.
    """

    def __init__(
        self, *, experiment: str, tracking_uri: str | None = None, name: str | None = None
    ) -> None:
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._name = name
        self._client: Any = None
        self._run_id = ""
        self._where: dict[str, str] = {}
        self._kept: Kept | None = None
        self._names = _Names("/", {})

    def start(self, run: RunInfo) -> str:
        # MLflow takes these from the environment only.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow.tracking import MlflowClient

        uri = self._tracking_uri or (run.directory.parent / "mlruns").resolve().as_uri()
        self._client = MlflowClient(uri)
        slash = "." if "://" not in uri or uri.startswith("file:") else "/"
        self._kept = Kept(run.directory, "mlflow")
        known = self._kept.read()
        self._names = _Names(slash, {})
        if known.get("tracking_uri") == uri:
            self._names = _Names(slash, known.get("names", {}))
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
            self._log_config(run.config, slash)
        self._where = {"tracking_uri": uri, "run_id": self._run_id}
        self._kept.write(**self._where, names=self._names.given)
        return f"run {self._run_id} of {self._experiment} at {uri}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = len(self._names.given)
        rows = [Metric(self._names.of(name), value, now, step) for name, value in metrics.items()]
        if len(self._names.given) > known and self._kept is not None:
            self._kept.write(**self._where, names=self._names.given)
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

    def _log_config(self, config: Mapping[str, Any], slash: str) -> None:
        """What of it is refused is left out, and told of in the log."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        names = _Names(slash, {})
        rows = [Param(names.of(key), value[:_PARAM_CHARS]) for key, value in flat(config)]
        refused = 0
        for start in range(0, len(rows), _PARAMS_AT_ONCE):
            part = rows[start : start + _PARAMS_AT_ONCE]
            try:
                self._client.log_batch(self._run_id, params=part, synchronous=True)
                continue
            except MlflowException:
                pass
            for row in part:
                try:
                    self._client.log_batch(self._run_id, params=[row], synchronous=True)
                except MlflowException as error:
                    print(f"parameter {row.key}: {error}", flush=True)
                    refused += 1
                if refused == _MOST_REFUSED:
                    return


class _Names:
    """The name that MLflow has for each of ours; no two have the same.

    `given` are those of the run so far, by ours: which of two is changed depends on the order.
    """

    def __init__(self, slash: str, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self._slash = slash
        self._taken = set(self.given.values())

    def of(self, name: str) -> str:
        if name not in self.given:
            stored = _name_of(name).replace("/", self._slash)
            if stored in self._taken or len(stored) > _NAME_CHARS:
                digest = hashlib.sha256(name.encode()).hexdigest()[:8]
                stored = f"{stored[: _NAME_CHARS - 9]}_{digest}"
            self.given[name] = stored
            self._taken.add(stored)
        return self.given[name]


def _name_of(name: str) -> str:
    """Of characters that MLflow takes, and a path that it takes."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)
