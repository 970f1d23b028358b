"""The base of every config section."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are refused; values are checked when assigned."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def changed(self, *keys: str) -> list[str]:
        """Which of the keys have another value than their default.

        What a file says and what a default says cannot be told apart once a config was written
        down whole, so a key that cannot act is refused by its value: a default asks for nothing.
        """
        fields = type(self).model_fields
        return [
            key
            for key in keys
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]


def _names_a_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(  # without the value, which may be a key
            "not the name of an environment variable; name the one that holds the key"
        )
    return name


VariableName = Annotated[str, AfterValidator(_names_a_variable)]
"""Of an environment variable; what it holds has no place in a config."""
