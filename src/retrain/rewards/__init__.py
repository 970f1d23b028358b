"""Verifiers, rewards and the calculator that adds them up.

Built-in names are the keys of `REWARDS` and `VERIFIERS`; everything else is an import path,
`pkg.module:name` or `path/to/file.py:name`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retrain.importing import import_object, suggest
from retrain.rewards.base import (
    RewardInfo,
    RewardKind,
    is_reward,
    is_verifier,
    per_step,
    reward,
    reward_info,
    takes_sandbox,
    verifier,
)
from retrain.rewards.calculator import OnError, RewardCalculator
from retrain.rewards.checks import finished, is_not_empty, used_tool
from retrain.rewards.code import code_passes_tests
from retrain.rewards.control import random
from retrain.rewards.equivalence import math_equivalence
from retrain.rewards.failures import RewardFailure
from retrain.rewards.judge import LLMJudge, Rubric
from retrain.rewards.numeric import boxed_answer, numeric_match
from retrain.rewards.pairwise import PairwiseJudge
from retrain.rewards.spec import DistributionStrategy, RewardSpec
from retrain.rewards.structure import format, json_schema, tool_calls
from retrain.rewards.text import (
    contains,
    exact_match,
    f1,
    length,
    penalize_text_containing,
    regex,
    squad_em,
)
from retrain.types import UserError

__all__ = [
    "REWARDS",
    "VERIFIERS",
    "DistributionStrategy",
    "OnError",
    "RewardCalculator",
    "RewardFailure",
    "RewardInfo",
    "RewardKind",
    "RewardSpec",
    "resolve_reward",
    "resolve_verifier",
    "reward",
    "reward_info",
    "takes_sandbox",
    "verifier",
]

REWARDS: dict[str, Callable[..., Any]] = {
    "boxed_answer": boxed_answer,
    "code_passes_tests": code_passes_tests,
    "contains": contains,
    "exact_match": exact_match,
    "f1": f1,
    "format": format,
    "json_schema": json_schema,
    "length": length,
    "llm_judge": LLMJudge,
    "math_equivalence": math_equivalence,
    "numeric_match": numeric_match,
    "pairwise_judge": PairwiseJudge,
    "penalize_text_containing": penalize_text_containing,
    "random": random,
    "regex": regex,
    "rubric": Rubric,
    "squad_em": squad_em,
    "tool_calls": tool_calls,
}

VERIFIERS: dict[str, Callable[..., Any]] = {
    "finished": finished,
    "is_not_empty": is_not_empty,
    "used_tool": used_tool,
}

_WHOLE_ROLLOUT_ONLY = frozenset({"llm_judge", "rubric", "tool_calls"})


def resolve_reward(name: str, kind: RewardKind) -> Callable[..., Any]:
    """The function behind a built-in name or an import path.

    As a step reward, a built-in that judges text judges the message of each turn.

    Raises:
        UserError: no such reward, one of another kind, or an object that cannot be called.
    """
    if name not in REWARDS:
        function = _imported(name, "reward", REWARDS)
        if is_verifier(function) and not is_reward(function):
            raise UserError(
                f"'{name}' is a verifier, not a reward",
                "attach it under verifiers, or return a number and mark it with @reward",
            )
        return function
    own = reward_info(REWARDS[name]).kind
    turn_by_turn = own == "rollout" and name not in _WHOLE_ROLLOUT_ONLY
    if kind != own and not (kind == "step" and turn_by_turn):
        raise UserError(
            f"the built-in reward '{name}' is a {own} reward, not a {kind} reward",
            f"move it to the {own} rewards",
        )
    return per_step(REWARDS[name]) if kind == "step" else REWARDS[name]


def resolve_verifier(name: str) -> Callable[..., Any]:
    """The verifier behind a built-in name or an import path.

    Raises:
        UserError: no such verifier, a reward in its place, or an object that cannot be called.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    if name in REWARDS:
        raise UserError(
            f"'{name}' is a reward, not a verifier", suggest(name, VERIFIERS, "verifiers")
        )
    function = _imported(name, "verifier", VERIFIERS)
    if is_reward(function) and not is_verifier(function):
        raise UserError(
            f"'{name}' is a reward, not a verifier",
            "a verifier returns True or False and is marked with @verifier",
        )
    return function


def _imported(name: str, kind: str, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ":" not in name:
        next_step = suggest(name, known, f"built-in {kind}s")
        raise UserError(
            f"there is no built-in {kind} '{name}'",
            f"{next_step}; or write an import path, pkg.module:name or path/to/file.py:name",
        )
    function = import_object(name, kind)
    if not callable(function):
        raise UserError(
            f"{kind} '{name}' is {type(function).__name__}, not a function", "name a function"
        )
    return function
