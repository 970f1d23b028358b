"""What tests of resuming share: a server of runs to kill, and what has to be equal afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file

from retrain.tracking.rollouts import read_records
from retrain.tracking.run_dir import read_metrics

HERE = Path(__file__).parent
TIMES = ("seconds", "tokens_per_s")
"""Parts of the names of metrics that measure time, the only ones that may differ."""


class KillServer:
    """`tests/kill_server.py` as an object; one job at a time."""

    def __init__(self, directory: Path, *, hash_seed: int) -> None:
        """`hash_seed` decides the order of sets, which nothing may depend on."""
        self._log = directory / "log.txt"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
                "PYTHONHASHSEED": str(hash_seed),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def run(self, config: dict[str, Any], resume: str | None = None, **how: Any) -> int:
        """The exit code of a run; -9 when it was killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"config": config, "resume": resume, "log": str(self._log), **how}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def said(self) -> str:
        """What all runs so far have printed."""
        return self._log.read_text() if self._log.exists() else ""


def left_behind(run: Path) -> dict[str, Any]:
    """All that a run leaves that does not measure time: equal for equal runs."""
    return {
        "metrics": [_timeless(row) for row in read_metrics(run / "metrics.jsonl")],
        "rollouts": {path.name: _rollouts(path) for path in (run / "rollouts").glob("*.gz")},
        "tensors": {
            f"{path.parent.name}/{path.name}": _digest(path)
            for path in (run / "checkpoints").rglob("*.safetensors")
        },
        "results": _text(run / "results.md"),
    }


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in values.items() if not any(part in name for part in TIMES)}


def _rollouts(path: Path) -> list[dict[str, Any]]:
    return [{**r, "metrics": _timeless(r["metrics"])} for r in read_records(path)]


def _digest(path: Path) -> str:
    tensors = load_file(path)
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        whole.update(tensors[name].contiguous().view(-1).numpy().tobytes())
    return whole.hexdigest()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
