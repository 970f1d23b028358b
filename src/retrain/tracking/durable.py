"""What a checkpoint does to the disk, one function for each kind of step.

A file or a directory entry is there after a power cut only once it has been synced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrain.types import UserError

GONE, ASIDE = ".gone", ".aside"


def write(path: Path, data: bytes) -> None:
    """Write a file and sync it; its directory entry is not."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Have the disk hold what a file, or the list of names in a directory, now is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Sync every file and directory below, and the root itself."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


def rename(source: Path, target: Path) -> None:
    """Rename within one directory and sync it."""
    os.replace(source, target)
    sync(target.parent)


def replace(source: Path, target: Path) -> None:
    """Rename a directory to where another may be: at any moment the old one or the new one is
    there, or the old one as `put_aside(target)`, from where `put_back` fetches it."""
    old = put_aside(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        rename(target, old)
    rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def put_aside(target: Path) -> Path:
    """Where `replace` keeps the old directory until the new one is there."""
    return target.with_name(f".{target.name}{ASIDE}")


def put_back(old: Path) -> None:
    """Undo what a `replace` that was cut short has done; `old` is where it put something aside."""
    target = old.with_name(old.name.removeprefix(".").removesuffix(ASIDE))
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        rename(old, target)


def remove(path: Path) -> None:
    """Remove a directory and all in it, in one rename as far as a reader can see."""
    gone = path.with_name(f".{path.name}{GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def disk_errors(path: Path, verb: str = "write") -> Iterator[None]:
    """Errors of the operating system as the user's: the path, the cause and what to do.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot {verb} {path}: {error.strerror or error}",
            "Free space, fix the permissions, or choose another output_dir."
            if verb == "write"
            else "Check the path.",
        ) from error
