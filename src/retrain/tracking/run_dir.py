"""The run directory: everything that a run leaves behind, in files that any tool can read."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from retrain.tracking.rollouts import encode_rollout
from retrain.types import Rollout, Sample, UserError

METRICS_FILE = "metrics.jsonl"


class RunDirectory:
    """One run's files; docs/run_directory.md describes each of them.

    Whole files are written beside their place and renamed into it, so that a reader sees the old
    one or the new one. Every method that writes raises `UserError` where the disk is full or the
    permission is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output_dir: str | Path, experiment_name: str) -> RunDirectory:
        """Make `<output_dir>/<experiment_name>-NNN`, NNN one above the highest there.

        The link `<output_dir>/<experiment_name>-latest` points to the newest run, where the file
        system allows links.
        """
        parent = Path(output_dir)
        with _disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            number = _highest_number(parent, experiment_name) + 1
            while True:
                path = parent / f"{experiment_name}-{number:03d}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    number += 1
        _link(parent / f"{experiment_name}-latest", path.name)
        return cls(path)

    def directory(self, name: str) -> Path:
        """A directory of the run (`checkpoints`, `plots`, ...), made if it is not there."""
        path = self.path / name
        with _disk_errors(path):
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
            if name in ("stage", "step"):
                raise ValueError(f"a metric cannot be named {name!r}")
            row[name] = _json_number(value)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        path = self.path / METRICS_FILE
        with _disk_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError("a line was cut short: the disk is full")
            finally:
                os.close(descriptor)

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

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file, as a whole or not at all; `name` may hold directories."""
        path = self.path / name
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return path


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
    with _disk_errors(path, "read"):
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


@contextmanager
def _disk_errors(path: Path, verb: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot {verb} {path}: {error.strerror or error}",
            "Free space, fix the permissions, or choose another output_dir."
            if verb == "write"
            else "Check the path.",
        ) from error
