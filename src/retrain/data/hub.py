"""Rows of a dataset that Hugging Face `datasets` reads: a hub id or a local directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from retrain.data.files import Row
from retrain.types import UserError

_SAVED_ONE = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
_ROWS = re.compile(r"(?P<name>[^\[\]+:%]+)(\[(?P<first>\d*):(?P<last>\d*)\])?")


def is_saved_dataset(path: str | Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    root = Path(path).expanduser()
    return (root / _SAVED_ONE).is_file() or (root / _SAVED_SPLITS).is_file()


def read_dataset(
    path: str, *, name: str | None = None, split: str = "train", streaming: bool = False
) -> Iterator[Row]:
    """Rows of one split or of parts of splits (`train[:100]`, `train[80%:]`, `train+test`), in
    order. What `save_to_disk` wrote is memory-mapped in any case.

    Raises:
        UserError: `datasets` is missing, there is no such dataset, configuration or split, or a
            stream is to be cut elsewhere than at rows counted from its start.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"the dataset {path} needs the package datasets", "Run: pip install 'retrain[data]'"
        ) from error
    if is_saved_dataset(path):
        rows = _load_saved(path, name, split)
    else:
        local = Path(path).expanduser()
        if local.is_dir() and not any(file.is_file() for file in local.rglob("[!.]*")):
            raise UserError(f"no data files in the directory {path}", "Put one there.")
        whole, first, last = _cut(path, split) if streaming else (split, 0, None)
        try:
            rows = datasets.load_dataset(
                str(local) if local.exists() else path, name, split=whole, streaming=streaming
            )
            if streaming:
                rows = rows.skip(first) if last is None else rows.skip(first).take(last - first)
        except (
            OSError,
            ValueError,
            datasets.exceptions.DatasetGenerationError,
        ) as error:
            raise UserError(
                f"cannot load the dataset {path} (name {name!r}, split {split!r}): "
                f"{_last_cause(error)}",
                "Check path, name and split; a hub dataset needs the network or a local copy.",
            ) from error
    for number, columns in enumerate(rows, 1):
        yield Row(columns, f"{path}[{split}], row {number}")


def _cut(path: str, split: str) -> tuple[str, int, int | None]:
    """A stream's split, and from which row and to before which row it goes."""
    found = _ROWS.fullmatch(split)
    if found is None:
        raise UserError(
            f"{path} is streamed, and its split {split!r} is not one of rows",
            "Write train or train[100:200], or set streaming: false.",
        )
    first, last = int(found["first"] or 0), int(found["last"]) if found["last"] else None
    if last is not None and last <= first:
        raise UserError(f"{path}: the split {split!r} has no row", "Write train[100:200].")
    return found["name"], first, last


def _load_saved(path: str, name: str | None, split: str) -> Iterable[Any]:
    import datasets

    if name is not None:
        raise UserError(
            f"{path} was written by save_to_disk, so name ({name!r}) has no effect",
            "Remove prompt_source.name.",
        )
    loaded = datasets.load_from_disk(str(Path(path).expanduser()))
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
    else:
        own = str(loaded.split) if loaded.split is not None else "train"
        splits, loaded = [own], {own: loaded}
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: len(loaded[name]) for name in splits})
    except ValueError as error:
        raise UserError(
            f"{path} has no split {split!r}; there is: {', '.join(splits)}",
            "Set prompt_source.split to one of them, or to a part such as train[:100].",
        ) from error
    return chain.from_iterable(
        loaded[part.splitname].select(range(part.from_, part.to)) for part in parts
    )


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
