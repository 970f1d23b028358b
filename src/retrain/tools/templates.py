"""Texts with `{name}` in them, filled in with the arguments of a call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from retrain.types import UserError

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_WHOLE = re.compile(r"\{(\w+)\}")


def check_template(template: Any, names: Collection[str], where: str) -> None:
    """Refuse what names another field than these, in a text or in texts that JSON holds.

    Raises:
        UserError: it does.
    """
    if isinstance(template, str):
        for match in _FIELD.finditer(template):
            if match[1] is not None and match[1] not in names:
                raise UserError(
                    f"{where} names {match[0]}, which is no parameter",
                    f"Parameters: {', '.join(names)}. A brace itself is written twice.",
                )
    elif isinstance(template, Mapping):
        for key, value in template.items():
            check_template(value, names, f"{where}.{key}")
    elif isinstance(template, list):
        for value in template:
            check_template(value, names, where)


def fill(template: str, values: Mapping[str, Any], write: Callable[[str], str] = str) -> str:
    """A text with each `{name}` replaced by what `write` makes of its value; by nothing where it
    has none. What a value holds is not looked at again."""

    def replaced(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return write(as_text(values[match[1]])) if match[1] in values else ""

    return _FIELD.sub(replaced, template)


def fill_json(template: Any, values: Mapping[str, Any]) -> Any:
    """JSON with its texts filled in. One that is a field and no more becomes the value itself; in
    a mapping it is left out where it has none."""
    if isinstance(template, str):
        whole = _WHOLE.fullmatch(template)
        return values.get(whole[1]) if whole else fill(template, values)
    if isinstance(template, Mapping):
        kept = {k: v for k, v in template.items() if not _lacks_its_value(v, values)}
        return {key: fill_json(value, values) for key, value in kept.items()}
    if isinstance(template, list):
        return [fill_json(value, values) for value in template]
    return template


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lacks_its_value(template: Any, values: Mapping[str, Any]) -> bool:
    whole = _WHOLE.fullmatch(template) if isinstance(template, str) else None
    return whole is not None and whole[1] not in values
