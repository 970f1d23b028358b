"""Checkpoint directories: whole or not there, with a manifest that tells a whole one from a torn.

A checkpoint is filled beside its place, synced, given its manifest, synced again and renamed. Its
manifest holds the size and the SHA-256 of every file, so that one that a crash or a disk damaged
later is recognised, and the one before it used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrain.tracking import durable
from retrain.types import UserError

MANIFEST_FILE = "manifest.json"
PART = ".part"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One that has a manifest that can be read; `damage` says whether the rest is as written."""

    path: Path
    serial: int
    """Counts the checkpoints of a run, in the order in which they were written."""
    about: dict[str, Any]
    """What the writer said of it."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and SHA-256, by name."""

    def damage(self) -> str | None:
        """What is not as it was written, or None."""
        for name, (size, digest) in self.files.items():
            path = self.path / name
            try:
                found = path.stat().st_size
                if found != size:
                    return f"{name} has {found} bytes, not {size}"
                if _sha256(path) != digest:
                    return f"{name} has another checksum"
            except OSError as error:
                return f"{name}: {error.strerror or error}"
        return None


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, name: str, about: dict[str, Any], fill: Callable[[Path], None]) -> Checkpoint:
        """Have `fill` write the files into a directory that is then called `name`.

        An older checkpoint of that name gives way once the new one is whole.

        Raises:
            UserError: the disk is full or not writable; what was there before still is.
        """
        target = self.directory / name
        beside = self.directory / f".{name}.{os.getpid()}{PART}"
        try:
            with durable.disk_errors(target):
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
                fill(beside)
                durable.sync_tree(beside)
                manifest = {
                    "format": FORMAT,
                    "serial": self._next_serial(),
                    "about": about,
                    "files": dict(_described(beside)),
                }
                text = json.dumps(manifest, indent=1) + "\n"
                durable.write(beside / MANIFEST_FILE, text.encode())
                durable.sync(beside)
                durable.replace(beside, target)
        except UserError as error:
            self.sweep()
            raise UserError(error.cause, f"{error.next_step} {self._what_is_left()}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return read_checkpoint(target)

    def all(self) -> list[Checkpoint]:
        """Those with a manifest, from old to new."""
        return sorted(self._readable(), key=lambda checkpoint: checkpoint.serial)

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest one that is as it was written, and what is wrong with newer ones."""
        problems = []
        for path in sorted(self._directories()):
            if not (path / MANIFEST_FILE).is_file():
                problems.append(f"{path.name} has no {MANIFEST_FILE}")
            elif _readable(path) is None:
                problems.append(f"{path.name}: {MANIFEST_FILE} cannot be read")
        for checkpoint in reversed(self.all()):
            damage = checkpoint.damage()
            if damage is None:
                return checkpoint, problems
            problems.append(f"{checkpoint.path.name}: {damage}")
        return None, problems

    def drop_old(
        self, stage: str, *, keep_last: int, keep_best: int, metric: str | None, highest: bool
    ) -> None:
        """Of those saved during a stage, keep the last, and those with the best values of a metric;
        the one at its end stays in any case.

        Raises:
            UserError: one cannot be removed.
        """
        during = [
            checkpoint
            for checkpoint in self.all()
            if checkpoint.about["stage"] == stage and not checkpoint.about["finished"]
        ]
        rated = [
            checkpoint
            for checkpoint in during
            if checkpoint.about["value"] is not None and checkpoint.about["metric"] == metric
        ]
        rated.sort(key=lambda checkpoint: float(checkpoint.about["value"]), reverse=highest)
        kept = {checkpoint.path for checkpoint in [*during[-keep_last:], *rated[:keep_best]]}
        for checkpoint in during:
            if checkpoint.path not in kept:
                with durable.disk_errors(checkpoint.path, "remove"):
                    durable.remove(checkpoint.path)

    def sweep(self) -> None:
        """Put right what a writer that was cut short left behind."""
        for path in self.directory.glob(".*"):
            if path.suffix == durable.ASIDE:
                durable.put_back(path)
            elif path.suffix in (PART, durable.GONE):
                shutil.rmtree(path, ignore_errors=True)

    def _directories(self) -> Iterator[Path]:
        if self.directory.is_dir():
            found = (path for path in self.directory.iterdir() if path.is_dir())
            yield from (path for path in found if not path.name.startswith("."))

    def _readable(self) -> Iterator[Checkpoint]:
        for path in self._directories():
            checkpoint = _readable(path)
            if checkpoint is not None:
                yield checkpoint

    def _next_serial(self) -> int:
        return 1 + max((checkpoint.serial for checkpoint in self._readable()), default=0)

    def _what_is_left(self) -> str:
        good, _ = self.newest_good()
        if good is None:
            return "There is no earlier checkpoint."
        return f"The one before, {good.path}, is whole: go on from it with --resume."


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its manifest.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    with durable.disk_errors(path / MANIFEST_FILE, "read"):
        text = (path / MANIFEST_FILE).read_bytes()
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
        files = {name: (int(size), str(d)) for name, (size, d) in manifest["files"].items()}
        return Checkpoint(path, int(manifest["serial"]), dict(manifest["about"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / MANIFEST_FILE} cannot be read: {error!r}", "Use another checkpoint."
        ) from error


def _readable(path: Path) -> Checkpoint | None:
    try:
        return read_checkpoint(path)
    except UserError:
        return None


def _described(root: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), (path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
