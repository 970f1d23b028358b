"""Parameters that a config declares, in place of a function's signature."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from retrain.tools.signature import Signature
from retrain.types import UserError

_KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list[Any],
    "object": dict[str, Any],
}
_NAME = re.compile(r"[A-Za-z_]\w*")


class DeclaredParameters:
    """Arguments by name, each with its JSON schema: `{query: {type: string, description: ...}}`.

    Checked when a call comes are `type` and `enum`. A parameter with a `default` need not be
    given; the default None leaves it out.

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
        given = self._defaults | self._signature.bind(arguments)[1]
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
    choices = schema.get("enum")
    if choices is not None and not (
        isinstance(choices, list)
        and choices
        and all(isinstance(choice, str | int | bool) for choice in choices)
    ):
        raise UserError(f"{place}.enum is {choices!r}", "List texts or whole numbers.")
    return schema


def _model(properties: Mapping[str, Mapping[str, Any]]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for i, (name, schema) in enumerate(properties.items()):
        choices = schema.get("enum")
        kind = Literal[tuple(choices)] if choices else _KINDS[schema["type"]]
        if "default" in schema:
            fields[f"p{i}"] = (kind | None, Field(None, alias=name))
        else:
            fields[f"p{i}"] = (kind, Field(..., alias=name))
    return create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)
