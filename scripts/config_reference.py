"""Writes docs/config.md: every key of a config, from the pydantic models and their docstrings.

python scripts/config_reference.py           write docs/config.md
python scripts/config_reference.py --check   exit with 1 when it is out of date
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from retrain.config.base import Section
from retrain.config.root import TrainingConfig

TARGET = Path(__file__).parents[1] / "docs" / "config.md"

HEAD = """\
# Every key of a config

`python scripts/config_reference.py` writes this page from the code; `tests/test_docs_config.py`
fails when it is out of date. A key that is not here is refused. `retrain check FILE` shows what a
config amounts to, and `--set dotted.key=value` overrides any key. Paths are relative to the working
directory. An import path is `pkg.module:name` or `path/to/file.py:name`.
"""


def sections(annotation: Any) -> list[type[Section]]:
    """The sections that a value of this type may be."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return [annotation]
    return [section for arg in get_args(annotation) for section in sections(arg)]


def leaves(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys below a section; `[]` stands for an item of a list or mapping."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        below = sections(field.annotation)
        if not below:
            yield path
        for section in below:
            yield from leaves(section, f"{path}{_item(field.annotation)}.")


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_part("", TrainingConfig, set())])


def _part(
    path: str, model: type[Section], written: set[tuple[str, type[Section]]]
) -> Iterator[str]:
    """A heading and a table for a section, then the same for those inside it.

    Args:
        written: sections that are on the page, which several around them may have in one place.
    """
    if (path, model) in written:
        return
    written.add((path, model))
    tag = _tag(model)
    title = f"`{path}`" if path else "The top level"
    if tag:
        title += f", `type: {tag}`"
    yield f"## {title}\n"
    if (about := _about(model)) is not None:
        yield f"{about}\n"
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    prefix = f"{path}." if path else ""
    inside: list[tuple[str, type[Section]]] = []
    for name, field in model.model_fields.items():
        if name == "type" and tag:
            continue
        yield _row(f"{prefix}{name}", field)
        below = f"{prefix}{name}{_item(field.annotation)}"
        inside += [(below, section) for section in sections(field.annotation)]
    yield ""
    for below, section in inside:
        if section.__name__ in _SHOWN_ELSEWHERE and below not in _SHOWN_ELSEWHERE.values():
            yield f"## `{below}`{_type_suffix(section)}\n"
            yield f"The same keys as `{_SHOWN_ELSEWHERE[section.__name__]}`.\n"
        else:
            yield from _part(below, section, written)


_SHOWN_ELSEWHERE = {
    "ModelConfig": "model",
    "ListSourceConfig": "prompt_source",
    "FileSourceConfig": "prompt_source",
    "HFDatasetSourceConfig": "prompt_source",
    "ReasoningGymSourceConfig": "prompt_source",
    "PythonSourceConfig": "prompt_source",
    "MixtureSourceConfig": "prompt_source",
}
"""Sections that stand in two places, and where they are written out."""


def _type_suffix(model: type[Section]) -> str:
    tag = _tag(model)
    return f", `type: {tag}`" if tag else ""


def _row(path: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    cells = [f"`{path}`", _type_name(field), _default(field), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tag(model: type[Section]) -> str | None:
    """The one value of `type` that chooses this section among several."""
    field = model.model_fields.get("type")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    values = get_args(field.annotation)
    return str(values[0]) if len(values) == 1 else None


def _about(model: type[Section]) -> str | None:
    own = model.__dict__.get("__doc__")
    return None if own is None else inspect.cleandoc(own)


def _item(annotation: Any) -> str:
    """`[]` when the sections of a type are items of a list or values of a mapping."""
    origin = get_origin(annotation)
    if origin in (list, dict):
        return "[]" if origin is list else ".<name>"
    found = {_item(arg) for arg in get_args(annotation) if sections(arg)}
    return found.pop() if len(found) == 1 else ""


def _type_name(field: FieldInfo) -> str:
    bounds = [_bound(m) for m in field.metadata]
    return ", ".join(filter(None, [_name(field.annotation), *bounds]))


def _name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [_bound(m) for m in args[1:]]
        return ", ".join(filter(None, [_name(args[0]), *bounds]))
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_name, args)))
    if origin is list:
        return f"list of {_name(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_name(args[0])}s"
    if origin is dict:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return "section"
    plain = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "boolean",
        NoneType: "null",
        Any: "any",
    }
    return plain[annotation]


def _bound(metadata: Any) -> str:
    match metadata:
        case Ge(ge=limit):
            return f"≥ {limit:g}"
        case Gt(gt=limit):
            return f"> {limit:g}"
        case Le(le=limit):
            return f"≤ {limit:g}"
        case Lt(lt=limit):
            return f"< {limit:g}"
        case MinLen(min_length=1):
            return "not empty"
    pattern = getattr(metadata, "pattern", None)
    return f"matching `{pattern}`" if pattern else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if isinstance(value, Section):
        return f"`type: {tag}`" if (tag := _tag(type(value))) else "its defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and value and isinstance(value[0], Section):
        return ", ".join(str(item.model_dump(exclude_defaults=True)) for item in value)
    if isinstance(value, list | tuple | dict):
        return f"`{list(value) if isinstance(value, tuple) else value}`"
    return f"`{value}`" if isinstance(value, str) else re.sub(r"e-0(\d)$", r"e-\1", str(value))


def main() -> int:
    page = reference()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == page:
            return 0
        print(f"{TARGET} is out of date: run python scripts/config_reference.py", file=sys.stderr)
        return 1
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
