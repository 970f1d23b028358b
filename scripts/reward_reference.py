"""Write the part of docs/rewards.md that says what each built-in reward and verifier is, from the
docstrings: `python scripts/reward_reference.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrain.rewards import REWARDS, VERIFIERS

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"
BEGIN, END = "<!-- built-in -->", "<!-- /built-in -->"


def reference() -> str:
    """The part, between its marks."""
    lines = [BEGIN, *_all(), END]
    return "\n".join(lines)


def _all() -> Iterator[str]:
    for name, function in REWARDS.items():
        yield from (f"### {name}", "", *_described(function), "")
    yield from ("### Verifiers", "", "| verifier | passes when |", "|---|---|")
    for name, function in VERIFIERS.items():
        yield f"| `{name}` | {_text(function).rstrip('.')} |"


def _described(function: Callable[..., Any]) -> Iterator[str]:
    text = _text(function).partition("\nRaises:")[0].rstrip()
    about, _, example = text.partition("Example: ")
    yield re.sub(r"(?<!\n)\n *(?=[^\s-])", " ", about.strip())
    yield ""
    yield f"Parameters: {_parameters(function)}. Example: {example.strip()}"


def _text(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def _parameters(function: Callable[..., Any]) -> str:
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.append("those of [every judge](#judges)")
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "sandbox":
            required = parameter.default is inspect.Parameter.empty
            found.append(f"`{name}`" if required else f"`{name}` ({parameter.default!r})")
    return ", ".join(found) or "none"


def page() -> str:
    """The whole page with the part as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + reference() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
