"""`SFTTrainer`: SFT from Python, as `retrain sft` does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrain.config.root import TrainingConfig
from retrain.loops.run import RunResult, run_sync


class SFTTrainer:
    """Fine-tune on a dataset of traces, as `retrain sft` does.

    `SFTTrainer(config).train("traces.jsonl")` returns the run's result; `config` is a dict or a
    `TrainingConfig` whose `sft` section may leave out `dataset`.
    """

    def __init__(self, config: Mapping[str, Any] | TrainingConfig) -> None:
        self._config = config

    def train(self, dataset: str | Path | None = None) -> RunResult:
        """Train on `dataset`, or on the config's own.

        Raises:
            UserError: a config or data that does not check.
        """
        data = (
            self._config.model_dump(mode="json")
            if isinstance(self._config, TrainingConfig)
            else dict(self._config)
        )
        if dataset is not None:
            data["sft"] = {**(data.get("sft") or {}), "dataset": str(dataset)}
        return run_sync(data, only="sft")
