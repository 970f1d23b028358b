"""How a server misbehaves, or how slow it is: set in the process, over HTTP, or by a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

VARIABLE = "ENGINE_SERVER_KNOBS"
"""Environment variable with the path of a JSON file of knobs."""


@dataclass
class Knobs:
    keeps_head: bool = False
    """A reload answers 200, and goes on with the output head of before: what a real server with
    tied embeddings was seen to do."""
    ignores_reload: bool = False
    """A reload, of an adapter too, answers 200 and changes nothing."""
    delay_s: float = 0.0
    """Of each token."""
    hang: bool = False
    """Nothing is answered, health included."""
    fail_next: int = 0
    """That many of the next generation requests are answered with 500."""
    drop_next: int = 0
    """That many of the next generation requests have their connection closed."""
    die_after: int | None = None
    """The process ends at the next generation request after that many; own process only. The
    knob leaves the file as it acts, so that a server started again lives."""
    missing: list[str] = field(default_factory=list)
    """Paths that are not served."""
    drop_field: str | None = None
    """Left out of every completion: a field of the answer, its choice or its `meta_info`."""
    start_delay_s: float = 0.0
    """Before the port opens; own process only."""
    exit_at_start: int | None = None
    """The exit code of a server that does not come up; own process only."""

    def update(self, values: dict[str, Any]) -> None:
        names = {item.name for item in fields(self)}
        if unknown := set(values) - names:
            raise ValueError(f"no such knobs: {sorted(unknown)}")
        for name, value in values.items():
            setattr(self, name, value)


class KnobFile:
    """A file that is read again when it changed, so that counters in it count down."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._knobs = Knobs()
        self._text = ""

    def bind(self, knobs: Knobs) -> None:
        """Write into these from now on."""
        self._knobs = knobs
        self._text = ""

    def read(self) -> None:
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
        if text != self._text:
            self._text = text
            self._knobs.update(vars(Knobs()) | json.loads(text))

    def forget(self, name: str) -> None:
        """Take a knob out of the file."""
        values = json.loads(self._path.read_text(encoding="utf-8"))
        values.pop(name, None)
        self._path.write_text(json.dumps(values), encoding="utf-8")
