"""The files that a config gives to code in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from retrain.types import UserError

MAX_FILES_BYTES = 64 * 2**20


def read_files(files: Mapping[str, str]) -> dict[str, bytes]:
    """The content of each file, by its name in the sandbox.

    Raises:
        UserError: a name that leads out of the sandbox's directory, a path that cannot be read,
            or more than MAX_FILES_BYTES in all.
    """
    contents = {}
    for name, path in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\0" in name:
            raise UserError(
                f"sandbox.files: {name!r} is no name of a file in the sandbox",
                "give a relative path without '..'",
            )
        try:
            contents[str(parts)] = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"sandbox.files: {path} cannot be read: {error.strerror}",
                f"correct the path of '{name}'",
            ) from error
    total = sum(map(len, contents.values()))
    if total > MAX_FILES_BYTES:
        raise UserError(
            f"sandbox.files: {total} bytes in all, of at most {MAX_FILES_BYTES}",
            "give smaller files",
        )
    return contents
