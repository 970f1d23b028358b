"""What a model gave, against the schema that a server published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retrain.tools.base import ModelError

SHOWN_CHARS = 200
"""Of one reason why arguments do not fit."""


class Arguments:
    """Checks and converts arguments by a JSON schema.

    A string where the schema wants something else is read as JSON ("3" as 3): between tags all is
    text. A schema that is none checks nothing; the server has the last word in any case.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry

        kind = validator_for(schema)
        self._validator: Any = None
        try:
            kind.check_schema(schema)
            self._validator = kind(schema, registry=Registry())
        except SchemaError:
            pass
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}

    def fit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ModelError: they do not fit, or cannot be sent; the message names each argument.
        """
        from jsonschema.exceptions import UnknownType
        from referencing.exceptions import Unresolvable

        try:
            given = {name: self._converted(name, value) for name, value in arguments.items()}
            errors = [] if self._validator is None else self._validator.iter_errors(given)
            reasons = [_reason(error) for error in errors]
        except (Unresolvable, UnknownType):  # a reference to elsewhere, which is not fetched
            given, reasons = dict(arguments), []
        except RecursionError as error:
            raise ModelError("the arguments are nested too deep") from error
        if reasons:
            raise ModelError("; ".join(reasons))
        return _sendable(given)

    def _converted(self, name: str, value: Any) -> Any:
        if not isinstance(value, str) or name not in self._properties or self._validator is None:
            return value
        one = self._validator.evolve(schema=self._properties[name])
        if one.is_valid(value):
            return value
        try:
            read = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return value
        return read if one.is_valid(read) else value


def _reason(error: Any) -> str:
    if error.validator == "required" and not error.absolute_path:
        missing = [name for name in error.validator_value if name not in error.instance]
        named = next((name for name in missing if repr(name) in error.message), missing[0])
        return f"argument '{named}' is missing"
    where = ".".join(map(str, error.absolute_path))
    reason = str(error.message)
    if len(reason) > SHOWN_CHARS:
        reason = f"{reason[: SHOWN_CHARS // 2]} ... {reason[-SHOWN_CHARS // 2 :]}"
    return f"argument '{where}': {reason}" if where else reason


def _sendable(arguments: dict[str, Any]) -> dict[str, Any]:
    """As the SDK can write them: what it cannot write would end the connection for everybody."""
    from mcp.types import CallToolRequestParams

    try:
        text = json.dumps(arguments, allow_nan=False, ensure_ascii=False)
        clean = json.loads(text.encode("utf-8", "replace"))
        CallToolRequestParams(name="", arguments=clean).model_dump_json(by_alias=True).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"the arguments cannot be sent: {error}") from error
    assert isinstance(clean, dict)
    return clean


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
