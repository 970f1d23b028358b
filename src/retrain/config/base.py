"""The base of every config section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
