"""The directory that indexes are kept in: who may build there, and what killed builders left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from retrain.types import UserError

if sys.platform != "win32":
    import fcntl

_LEFTOVER = re.compile(r"\.[0-9a-f]{32}(\.[0-9a-f]{32}(\.broken)?)?|[0-9a-f]{32}\.lock")
"""Names that only a builder gives: the user may have named a directory with files of his own."""
_LEFTOVER_AFTER_S = 24 * 3600

_locks: dict[object, contextlib.AbstractContextManager[bool]] = {}
_locks_lock = threading.Lock()


def default_directory() -> Path:
    """The user's cache, since a corpus may lie where nothing can be written."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "retrain" / "indexes"


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Around what writes to the directory, and can raise an `OSError` for no other reason."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write an index to {directory}: {error.strerror or error}",
            "Set params.index_dir to a directory with room that can be written.",
        ) from error


def lock_of(key: object) -> contextlib.AbstractContextManager[bool]:
    """Among the threads of this process. Each key has its own: a corpus function may itself open
    an index, in whatever thread."""
    with _locks_lock:
        return _locks.setdefault(key, threading.RLock())


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Let no other process or thread in that asks for the same place; they wait.

    Where the system or the filesystem knows no locks all are let in.

    Raises:
        UserError: the directory that `place` is in cannot be written.
    """
    lock = place.with_name(f"{place.name}.lock")
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        held = _hold(lock)
    try:
        yield
    finally:
        if held is not None:
            _let_go(held, lock)


def _hold(lock: Path) -> int | None:
    """A descriptor of the lock file, locked; None where there are no locks.

    Who holds a lock removes its file before letting go. Who waited for it then holds a file that
    nobody else can find, and has to begin again.
    """
    if sys.platform == "win32":
        return None
    while True:
        held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        is_kept = False
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            is_kept = _is_at(held, lock)
        except OSError:
            return None
        finally:
            if not is_kept:
                os.close(held)
        if is_kept:
            return held


def _let_go(held: int, lock: Path) -> None:
    with contextlib.suppress(OSError):
        lock.unlink()
    if sys.platform != "win32":
        fcntl.flock(held, fcntl.LOCK_UN)  # closing is not enough where a fork has it open too
    os.close(held)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sweep(directory: Path) -> None:
    """Remove what builders that were killed have left, once it is a day old."""
    with contextlib.suppress(OSError):
        for path in list(directory.iterdir()):
            if not _LEFTOVER.fullmatch(path.name):
                continue
            if time.time() - path.lstat().st_mtime < _LEFTOVER_AFTER_S:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
