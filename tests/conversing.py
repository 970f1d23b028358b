"""What tests of the gateway's APIs have in common: a session with a script, random answers."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from answering import Prescribed, said
from retrain.gateway.ask import Ask, Choice, Reply

TWO_CALLS = said(
    "Let me see.",
    calls=[("call_1", "add", '{"a": 2, "b": {"c": [1.5, null]}}'), ("call_2", "add", "{}")],
    reasoning="Two and three.",
)


class Scripted(Prescribed):
    """Says one thing after another; the last again and again."""

    def __init__(self, *choices: Choice) -> None:
        super().__init__(choices[0])
        self.script = list(choices)

    async def answer(self, ask: Ask) -> Reply:
        self.choice = self.script[min(len(self.asks), len(self.script) - 1)]
        return await super().answer(ask)


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)
_BROKEN = st.sampled_from(['{"a": ', "[1, 2]", "NaN", '{"a": NaN}', '"\\ud800"', "3", "tool: bad"])
_ARGUMENTS = st.dictionaries(_TEXTS, _VALUES | _TEXTS, max_size=3).map(json.dumps) | _BROKEN


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """An answer of any kind: words, calls (some that cannot be read), reasoning."""
    arguments = draw(st.lists(_ARGUMENTS, max_size=3))
    content = draw(_TEXTS)
    calls = [(f"call_{index}", "add", given) for index, given in enumerate(arguments)]
    return said(content or (None if calls else ""), calls=calls, reasoning=draw(_TEXTS))


def parsed(message: Any) -> dict[str, Any]:
    """A message with what the JSON of its arguments stands for in the place of it."""
    calls = [
        (call["id"], call["function"]["name"], _parsed(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls}


def _parsed(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
        return value if json.dumps(value, allow_nan=False) else None
    except ValueError:
        return arguments
