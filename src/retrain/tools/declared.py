"""Parameters that a config declares, in place of a function's signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)

from retrain.tools.signature import Signature
from retrain.tools.templates import as_text
from retrain.types import UserError

_KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list[Any],
    "object": dict[str, Any],
}
_OF_CHOICES = ("string", "integer", "number", "boolean")
_WHOLE = re.compile(r"\s*[+-]?\d{1,4000}\s*")
_NAME = re.compile(r"[A-Za-z_]\w*")


class DeclaredParameters:
    """Arguments by name, each with its JSON schema: `{query: {type: string, description: ...}}`.

    Checked when a call comes are `type` and `enum`. A parameter with a `default` need not be
    given, and takes it for null too; the default None leaves it out.

    Args:
        declared: name to schema; a schema without a type is that of a string.
        where: the place that it comes from, for errors.

    Raises:
        UserError: a name or a schema that cannot be one.
    """

    def __init__(self, declared: Mapping[str, Mapping[str, Any]], where: str) -> None:
        if not isinstance(declared, Mapping) or not declared:
            raise UserError(
                f"{where}: parameters declares none", "Write {query: {type: string}}, for one."
            )
        self.names = tuple(declared)
        properties = {name: _schema(name, declared[name], where) for name in self.names}
        self._defaults = {n: p["default"] for n, p in properties.items() if "default" in p}
        self.schema: dict[str, Any] = {
            "type": "object",
            "properties": properties,
            "required": [name for name in self.names if name not in self._defaults],
            "additionalProperties": False,
        }
        self._signature = Signature("", self.schema, self.names, 0, _model(properties))

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call with defaults filled in, in the order declared.

        Raises:
            ModelError: they do not fit; the message names each argument.
        """
        bound = self._signature.bind(arguments)[1]
        given = self._defaults | {n: value for n, value in bound.items() if value is not None}
        return {n: given[n] for n in self.names if given.get(n) is not None}


def _schema(name: str, given: Any, where: str) -> dict[str, Any]:
    place = f"{where}: parameters.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} cannot be a parameter's name", "Use letters and _.")
    if not isinstance(given, Mapping):
        raise UserError(f"{place} is {given!r}", "Write {type: string, description: ...}.")
    schema = {"type": "string"} | dict(given)
    if not isinstance(schema["type"], str) or schema["type"] not in _KINDS:
        raise UserError(f"{place}.type is {schema['type']!r}", f"One of: {', '.join(_KINDS)}.")
    if "enum" in schema:
        _check_choices(schema, place)
    default = schema.get("default")
    if default is not None and not _admits(schema, default):
        raise UserError(f"{place}.default is {default!r}", "Give one that fits type and enum.")
    return schema


def _check_choices(schema: Mapping[str, Any], place: str) -> None:
    choices, kind = schema["enum"], schema["type"]
    listed = isinstance(choices, list) and choices and kind in _OF_CHOICES
    if not listed or not all(isinstance(choice, str | int | bool) for choice in choices):
        raise UserError(f"{place}.enum is {choices!r}", "List texts or whole numbers.")
    for choice in choices:
        if not _admits({"type": kind}, choice):
            raise UserError(f"{place}.enum has {choice!r}, which is no {kind}", "Correct its type.")


def _admits(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value of the config fits, as it is."""
    choices = schema.get("enum")
    if choices is not None and value not in choices:
        return False
    try:
        TypeAdapter(_KINDS[schema["type"]]).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _kind(schema: Mapping[str, Any]) -> Any:
    """The type that checks a call's argument."""
    choices, kind = schema.get("enum"), schema["type"]
    if choices:
        literal, annotated = Literal[tuple(choices)], cast(Any, Annotated)
        return (
            literal if kind == "string" else annotated[literal, BeforeValidator(_reader(choices))]
        )
    return Annotated[float, WrapValidator(_number)] if kind == "number" else _KINDS[kind]


def _reader(choices: Sequence[Any]) -> Callable[[Any], Any]:
    """Reads a number or a truth value, one of these, out of a text: between tags all is text. True
    is not taken for 1."""
    written = {as_text(choice): choice for choice in choices}

    def read(value: Any) -> Any:
        text = as_text(value) if isinstance(value, bool) else value
        return written.get(text.strip(), text) if isinstance(text, str) else value

    return read


def _number(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """A whole number stays one: as a float it may be another, or none."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole else read(value)


def _model(properties: Mapping[str, Mapping[str, Any]]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for i, (name, schema) in enumerate(properties.items()):
        kind = _kind(schema)
        if "default" in schema:
            fields[f"p{i}"] = (kind | None, Field(None, alias=name))
        else:
            fields[f"p{i}"] = (kind, Field(..., alias=name))
    return create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)
