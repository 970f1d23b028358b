"""The run directory: everything that a run leaves behind, in files that any tool can read."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import re
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from retrain.tracking import durable
from retrain.tracking.durable import disk_errors
from retrain.tracking.rollouts import encode_rollout
from retrain.types import Rollout, Sample, UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
ABOUT_FILE = "run.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
FAILURES_FILE = "failures.jsonl"

FAILURES_SHOWN = 20
"""Of one step; the others are counted."""

CAUSE_CHARS = 500

_PARTIAL = ".partial"

_PLACE = ("stage", "step")
"""Columns that say which row it is."""


class RunDirectory:
    """One run's files; docs/run_directory.md describes each of them.

    Whole files are written beside their place and renamed into it, so that a reader sees the old
    one or the new one. Every method that writes raises `UserError` where the disk is full or the
    permission is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls, output_dir: str | Path, experiment_name: str, files: Mapping[str, str] | None = None
    ) -> RunDirectory:
        """Make `<output_dir>/<experiment_name>-NNN`, NNN one above the highest there, with `files`
        (text by name) in it from the first moment on.

        The link `<output_dir>/<experiment_name>-latest` points to the newest run, where the file
        system allows links.
        """
        parent = Path(output_dir)
        with disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            beside = parent / f".{experiment_name}.{uuid.uuid4().hex[:12]}.part"
            try:
                beside.mkdir()
                for name, text in {LOCK_FILE: "", **(files or {})}.items():
                    (beside / name).write_text(text, encoding="utf-8", errors="backslashreplace")
                path = _take_number(beside, parent, experiment_name)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        _link(parent / f"{experiment_name}-latest", path.name)
        return cls(path)

    def about(self) -> dict[str, object]:
        """What run.json holds; nothing where it is not there or cannot be read."""
        try:
            about = json.loads((self.path / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def describe(self, **facts: object) -> None:
        """Set facts in run.json: `status`, and what the run began with."""
        self.write_text(ABOUT_FILE, json.dumps(self.about() | facts, indent=1) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing the same run, where the system has such locks.

        Raises:
            UserError: one does.
        """
        path = self.path / LOCK_FILE
        with disk_errors(path):
            file = path.open("w")
        with file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise UserError(
                            f"another process is writing {self.path}",
                            "Wait for it, or stop it, then resume.",
                        ) from None
            yield

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that only grow, by name."""
        paths = {name: self.path / name for name in (METRICS_FILE, FAILURES_FILE)}
        return {name: path.stat().st_size for name, path in paths.items() if path.exists()}

    def sync_grown(self) -> None:
        """Have the disk hold what `sizes` measures."""
        for name in self.sizes():
            with disk_errors(self.path / name):
                durable.sync(self.path / name)

    def cut_back(self, sizes: Mapping[str, int]) -> None:
        """Cut the files that only grow to what they were when `sizes` was taken, and remove what
        was never written to its end.

        Raises:
            UserError: one is shorter than that.
        """
        present = self.sizes()
        for name in {**present, **sizes}:
            found, wanted, path = present.get(name, 0), sizes.get(name, 0), self.path / name
            if found < wanted:
                raise UserError(
                    f"{path} has {found} bytes; at the checkpoint it had {wanted}",
                    "Put the file back as it was, or start a new run from the checkpoint.",
                )
            with disk_errors(path):
                os.truncate(path, wanted)
        for path in self.path.rglob(f".*{_PARTIAL}"):
            path.unlink(missing_ok=True)

    def directory(self, name: str) -> Path:
        """A directory of the run (`checkpoints`, `plots`, ...), made if it is not there."""
        path = self.path / name
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a UTF-8 file, as a whole or not at all; `name` may hold directories."""
        return self.write_bytes(name, text.encode("utf-8", errors="backslashreplace"))

    def log_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl.

        JSON has no NaN and no infinity: both are written as null.
        """
        row: dict[str, object] = {"stage": stage, "step": step}
        for name, value in metrics.items():
            if name in _PLACE:
                raise ValueError(f"a metric cannot be named {name!r}")
            row[name] = _json_number(value)
        self._append(METRICS_FILE, [row])

    def metrics_of(self, stage: str) -> list[dict[str, float]]:
        """A stage's rows of metrics.jsonl, as they were logged; what was not finite is NaN."""
        return [
            {n: math.nan if v is None else float(v) for n, v in row.items() if n not in _PLACE}
            for row in self._rows()
            if row["stage"] == stage
        ]

    def steps_made(self, stages: Iterable[str]) -> int:
        """Training steps in metrics.jsonl of these stages together: each has a row."""
        wanted = set(stages)
        return sum(row["stage"] in wanted for row in self._rows())

    def latest_metrics(self) -> dict[str, float]:
        """Of each metric that was ever logged, the latest finite value."""
        latest: dict[str, float] = {}
        for row in self._rows():
            latest |= {n: float(v) for n, v in row.items() if n not in _PLACE and v is not None}
        return latest

    def _rows(self) -> list[dict[str, float | str | None]]:
        path = self.path / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    def log_failures(self, stage: str, step: int, rollouts: Iterable[Rollout]) -> None:
        """Append a line to failures.jsonl for each failed attempt, in the rollouts' order.

        Beyond FAILURES_SHOWN of them one line counts the others; without any, nothing is written.
        """
        failed = [(r, i, f) for r in rollouts for i, f in enumerate(r.failures, start=1)]
        rows: list[dict[str, object]] = [
            {
                "stage": stage,
                "step": step,
                "rollout": rollout.id,
                "kind": failure.kind,
                "attempt": failure.attempt,
                "masked": rollout.error is not None and number == len(rollout.failures),
                "cause": failure.cause[:CAUSE_CHARS],
            }
            for rollout, number, failure in failed[:FAILURES_SHOWN]
        ]
        if len(failed) > FAILURES_SHOWN:
            rows.append({"stage": stage, "step": step, "more": len(failed) - FAILURES_SHOWN})
        if rows:
            self._append(FAILURES_FILE, rows)

    def write_rollouts(
        self,
        stage: str,
        step: int,
        rollouts: Iterable[Rollout],
        advantages: Mapping[str, float] | None = None,
    ) -> Path:
        """Write rollouts/<stage>-<step>.jsonl.gz, one rollout a line.

        `advantages` go by rollout id; a rollout without one has no field `advantage`. Equal
        rollouts give equal bytes: the gzip header holds no time.
        """
        given = advantages or {}
        lines = [encode_rollout(rollout, given.get(rollout.id)) for rollout in rollouts]
        data = gzip.compress("".join(lines).encode("ascii"), compresslevel=1, mtime=0)
        return self.write_bytes(f"rollouts/{stage}-{step:06d}.jsonl.gz", data)

    def write_samples(self, name: str, samples: Iterable[Sample]) -> Path:
        """Write <name>.jsonl.gz, a sample a line with all its columns."""
        lines = [json.dumps(_encode_sample(sample)) + "\n" for sample in samples]
        data = gzip.compress("".join(lines).encode("ascii"), compresslevel=1, mtime=0)
        return self.write_bytes(f"{name}.jsonl.gz", data)

    def _append(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Add lines of JSON to a file in one write, so that none is torn by a kill."""
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        path = self.path / name
        with disk_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError("a line was cut short: the disk is full")
            finally:
                os.close(descriptor)

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file, as a whole or not at all; `name` may hold directories."""
        path = self.path / name
        partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return path


def _take_number(beside: Path, parent: Path, experiment_name: str) -> Path:
    """Rename a directory that is not empty to the next number that nobody else takes meanwhile."""
    number = _highest_number(parent, experiment_name) + 1
    while True:
        path = parent / f"{experiment_name}-{number:03d}"
        try:
            beside.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            number += 1
        else:
            return path


def newest_run(output_dir: str | Path, experiment_name: str) -> Path | None:
    """The directory of the run with the highest number, if there is one."""
    parent = Path(output_dir)
    number = _highest_number(parent, experiment_name) if parent.is_dir() else 0
    return parent / f"{experiment_name}-{number:03d}" if number else None


def _encode_sample(sample: Sample) -> dict[str, object]:
    """Arrays as lists; NaN and infinity as JSON's usual extension writes them."""
    return {
        name: value.tolist() if isinstance(value, array) else value
        for name, value in vars(sample).items()
    }


def read_metrics(path: Path) -> list[dict[str, float | str | None]]:
    """The rows of a metrics.jsonl, in order; a last line cut by a crash is left out.

    Raises:
        UserError: the file cannot be read, or another line is not JSON.
    """
    with disk_errors(path, "read"):
        lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[dict[str, float | str | None]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number} is not JSON: {error}", "Remove or repair that line."
            ) from None
    return rows


def _json_number(value: float) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _highest_number(parent: Path, experiment_name: str) -> int:
    pattern = re.compile(re.escape(experiment_name) + r"-(\d{3,})")
    found = (pattern.fullmatch(entry.name) for entry in parent.iterdir())
    return max((int(match[1]) for match in found if match), default=0)


def _link(link: Path, target: str) -> None:
    """Point a symbolic link to `target`, atomically; nothing happens where that is not allowed."""
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    with suppress(OSError, NotImplementedError):
        partial.unlink(missing_ok=True)
        partial.symlink_to(target, target_is_directory=True)
        try:
            os.replace(partial, link)
        finally:
            partial.unlink(missing_ok=True)
