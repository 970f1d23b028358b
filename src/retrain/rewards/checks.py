"""Built-in verifiers."""

from __future__ import annotations

from retrain.rewards.base import verifier
from retrain.rewards.extract import judged_text
from retrain.rewards.structure import count_tool_calls
from retrain.types import Rollout


@verifier
def is_not_empty(rollout: Rollout) -> bool:
    """The last MODEL message holds more than white space."""
    return bool(judged_text(rollout).strip())


@verifier
def finished(rollout: Rollout) -> bool:
    """The model ended by itself: not cut by a token, step or context limit."""
    return rollout.stop_reason == "answered"


@verifier
def used_tool(rollout: Rollout) -> bool:
    """At least one tool call succeeded."""
    return count_tool_calls(rollout, ("ok",)) > 0
