"""What pydantic found wrong with a config, in words that name the key."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic_core import ErrorDetails

from retrain.config.base import Section
from retrain.config.root import TrainingConfig

_SCALAR = re.compile(r"(str|int|float|bool|(list|dict|literal)\[.*)$")
"""What pydantic calls the members of a union that are no sections."""

short = reprlib.Repr()
short.maxstring = short.maxother = 60


def explain(errors: Sequence[ErrorDetails]) -> list[str]:
    """One line per error. Of a value that fits neither a scalar nor a section, the errors
    inside the section say more than the scalar's: those are left out."""
    explained = [(_place(error["loc"]), error) for error in errors]
    paths = [place.path for place, _ in explained]
    return list(
        dict.fromkeys(
            _line(place, error)
            for place, error in explained
            if not (place.scalar and any(p.startswith(f"{place.path}.") for p in paths))
        )
    )


def _line(place: _Place, error: ErrorDetails) -> str:
    path, kind = place.path, error["type"]
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        near = difflib.get_close_matches(key, place.keys, n=1, cutoff=0.5)
        keys = ", ".join(sorted(place.keys))
        return f"unknown key {path}; " + (f"did you mean {near[0]!r}?" if near else f"keys: {keys}")
    if kind == "missing":
        return f"{path} is missing"
    if kind == "union_tag_not_found":
        return f"{path}.type is missing; one of: {', '.join(place.tags)}"
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        near = difflib.get_close_matches(tag, place.tags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(place.tags)}"
        return f"{path}.type: there is no {tag!r}; {hint}"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    message = error["msg"][:1].lower() + error["msg"][1:]
    if kind == "model_type":
        message = "expected a mapping"
    return f"{path}: {message}, got {short.repr(error['input'])}"


@dataclass(frozen=True)
class _Place:
    """Where in the file an error is."""

    path: str
    """Dotted, without the tags that pydantic puts in for members of a union."""
    keys: frozenset[str]
    """Valid beside the last part of the path."""
    tags: tuple[str, ...]
    """Values of `type` that the sections at the path have."""
    scalar: bool
    """The error is that of a union's member that is no section."""


def _place(loc: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's location through the sections that it may lie in."""
    around: list[type[Section]] = []
    at: list[type[Section]] = [TrainingConfig]
    path: list[str] = []
    scalar = False
    for part in loc:
        fields = [m.model_fields[part] for m in at if part in m.model_fields]
        chosen = [] if fields else [m for m in at if part == m.__name__ or part in _tags(m)]
        if chosen:
            at = chosen
        elif path and isinstance(part, str) and _SCALAR.match(part) and not fields:
            scalar = True
        else:
            path.append(str(part))
            around = at
            if fields:
                at = [section for f in fields for section in _sections(f.annotation)]
    keys = frozenset(key for model in around for key in model.model_fields)
    tags = tuple(str(tag) for model in at for tag in _tags(model))
    return _Place(".".join(path), keys, tags, scalar)


def _tags(model: type[Section]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return () if field is None else get_args(field.annotation)


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in get_args(annotation) for s in _sections(arg)]
