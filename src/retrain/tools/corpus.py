"""A corpus that a function of the user's makes, as a file."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retrain.importing import import_object
from retrain.tools.index_dir import lock_of, sweep, writing
from retrain.types import UserError

_made: dict[object, Path] = {}


def write_rows(function: str, params: Mapping[str, Any], directory: Path) -> Path:
    """The rows that a function makes as a JSONL file in `directory`, named by their hash; it is
    called once in a process.

    Raises:
        UserError: the function cannot be called so or raises something, its rows are not JSON,
            or the directory cannot be written.
    """
    known = (function, repr(sorted(params.items())), directory.absolute())
    with lock_of(known):
        if known not in _made or not _made[known].is_file():
            _made[known] = _write_rows(function, params, directory)
        return _made[known]


def _write_rows(function: str, params: Mapping[str, Any], directory: Path) -> Path:
    rows = _call(function, params)
    aside = directory / f".{uuid.uuid4().hex}"
    digest = hashlib.sha256()
    try:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
            with aside.open("wb") as stream:
                for line in _lines(function, rows):
                    digest.update(line)
                    stream.write(line)
            file = directory / f"{digest.hexdigest()[:32]}.jsonl"
            aside.replace(file)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return file


def _call(function: str, params: Mapping[str, Any]) -> Iterable[Any]:
    make = import_object(function, "corpus")
    if not callable(make):
        raise UserError(f"corpus '{function}' is not a function", "Name one that returns rows.")
    try:
        inspect.signature(make).bind(**params)
    except TypeError as error:
        raise UserError(f"corpus '{function}': {error}", "See corpus_params.") from error
    except ValueError:
        pass  # of a builtin nothing is known
    with _user_code(function):
        rows = make(**params)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise UserError(
            f"corpus '{function}' returned {type(rows).__name__}, not rows",
            "Return or yield objects.",
        )
    return rows


def _lines(function: str, rows: Iterable[Any]) -> Iterator[bytes]:
    """Of JSON; whatever goes wrong is a `UserError`."""
    with _user_code(function):
        for number, row in enumerate(rows, 1):
            try:
                line = json.dumps(row)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"corpus '{function}': row {number}: {error}", "Make it of plain values."
                ) from error
            yield line.encode() + b"\n"


@contextlib.contextmanager
def _user_code(function: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"corpus '{function}' raised {type(error).__name__}: {error}", "Correct the function."
        ) from error
