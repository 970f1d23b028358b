"""Answers of judges, kept: in memory, and in a file that several processes may share."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from retrain.types import UserError

T = TypeVar("T")

_PATIENCE_S = 60.0
"""For another process to let go of the file."""


class AnswerCache:
    """Texts by key. The first one put under a key stays.

    Args:
        path: an SQLite file, made where there is none; None keeps them in memory only.
    """

    def __init__(self, path: str | None) -> None:
        self._kept: dict[str, str] = {}
        self._path = None if path is None else Path(path).expanduser()

    async def get(self, key: str) -> str | None:
        """
        Raises:
            UserError: the file cannot be used.
        """
        if key not in self._kept and self._path is not None:
            found = await self._use(lambda file: _read(file, key))
            if found is not None:
                self._kept[key] = found
        return self._kept.get(key)

    async def put(self, key: str, text: str) -> str:
        """The text that is under the key now.

        Raises:
            UserError: the file cannot be used.
        """
        if self._path is not None:
            text = await self._use(lambda file: _write(file, key, text))
        return self._kept.setdefault(key, text)

    async def _use(self, act: Callable[[sqlite3.Connection], T]) -> T:
        path = self._path
        assert path is not None

        def use() -> T:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE_S)) as file, file:
                    file.execute("CREATE TABLE IF NOT EXISTS answers (key PRIMARY KEY, text)")
                    return act(file)
            except (sqlite3.Error, OSError) as error:
                raise UserError(
                    f"the judge's cache {path} cannot be used: {error}",
                    "Name another file, or remove this one.",
                ) from error

        return await asyncio.to_thread(use)


def _read(file: sqlite3.Connection, key: str) -> str | None:
    row = file.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def _write(file: sqlite3.Connection, key: str, text: str) -> str:
    file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, text))
    return str(_read(file, key))
