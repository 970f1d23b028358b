"""From a typed signature and a docstring to a JSON schema, and from arguments to a call."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from retrain.tools.base import ModelError
from retrain.types import UserError


@dataclass(frozen=True)
class Signature:
    """What a function takes."""

    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments."""
    names: tuple[str, ...]
    positional: int
    """How many of the first parameters are positional-only."""
    model: type[BaseModel]
    """One field `p<i>` per parameter, its alias the parameter's name."""

    def bind(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, checked and converted (`"3"` to 3 for an int).

        Raises:
            ModelError: they do not fit; the message names each argument.
        """
        try:
            bound = self.model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ModelError(self._reasons(error)) from error
        given = [(i, n) for i, n in enumerate(self.names) if f"p{i}" in bound.model_fields_set]
        args = [getattr(bound, f"p{i}") for i in range(self.positional)]
        keywords = {n: getattr(bound, f"p{i}") for i, n in given if i >= self.positional}
        return args, keywords

    def _reasons(self, error: ValidationError) -> str:
        reasons = []
        for entry in error.errors(include_url=False):
            where = ".".join(str(part) for part in entry["loc"])
            if entry["type"] == "missing":
                reasons.append(f"argument '{where}' is missing")
            elif entry["type"] == "extra_forbidden":
                takes = ", ".join(self.names) or "none"
                reasons.append(f"unknown argument '{where}' (arguments: {takes})")
            else:
                value = repr(entry["input"])
                value = value if len(value) <= 60 else f"{value[:57]}..."
                reasons.append(f"argument '{where}': {entry['msg']}, got {value}")
        return "; ".join(reasons)


def read_signature(function: Callable[..., Any], label: str) -> Signature:
    """Read a function, or the `__call__` of a tool class, bound or not.

    The description is the docstring's prose; descriptions of parameters come from its "Args:".

    Raises:
        UserError: a parameter without a type, `*args` or `**kwargs`, or a type that has no JSON
            schema. `label` names the function in it.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    hints = _type_hints(function, label)
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {p.arg_name: p.description for p in doc.params}
    fields: dict[str, Any] = {}
    for i, parameter in enumerate(parameters):
        _check(parameter, hints, label)
        fields[f"p{i}"] = (
            hints[parameter.name],
            _field(parameter, described.get(parameter.name)),
        )
    try:
        model = create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)
        schema = model.model_json_schema(schema_generator=_Untitled)
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{label}: a parameter's type has no JSON schema: {reason}",
            "use JSON-like types: str, int, float, bool, list, dict, Literal, dataclasses",
        ) from error
    schema.pop("title", None)
    prose = [doc.short_description, doc.long_description]
    return Signature(
        "\n\n".join(part for part in prose if part),
        schema,
        tuple(p.name for p in parameters),
        sum(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in parameters),
        model,
    )


class _Untitled(GenerateJsonSchema):
    """No generated titles: they repeat names, and the schema is read token by token."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _type_hints(function: Callable[..., Any], label: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise UserError(
            f"{label}: a type annotation cannot be resolved: {error}",
            "import the type at the top of the module that defines the function",
        ) from error


def _check(parameter: inspect.Parameter, hints: Mapping[str, Any], label: str) -> None:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
        raise UserError(
            f"{label}: parameter '{stars}{parameter.name}' cannot be described to a model",
            "name the parameters one by one, each with a type",
        )
    if parameter.name not in hints:
        raise UserError(
            f"{label}: parameter '{parameter.name}' has no type",
            f"annotate it, as in '{parameter.name}: str'",
        )


def _field(parameter: inspect.Parameter, description: str | None) -> FieldInfo:
    default = ... if parameter.default is inspect.Parameter.empty else parameter.default
    field: FieldInfo = Field(default, alias=parameter.name, description=description)
    return field
