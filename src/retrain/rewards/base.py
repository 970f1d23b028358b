"""What a verifier and a reward are: plain functions, with an optional mark.

Call shapes, each sync or async, with keyword parameters from the config:

- verifier: `f(rollout) -> bool`
- rollout reward: `f(rollout, **params) -> float`
- step reward: `f(rollout, step, **params) -> float`, `step` in 0..S-1; the message judged is
  `rollout.messages[rollout.model_messages[step]]`
- group reward: `f(rollouts, **params) -> list[float]`, one number per rollout, in order

A reward with a keyword parameter named `sandbox` gets the run's `retrain.sandbox.Sandbox` (section
`sandbox` of the config) in it:

    async def runs(rollout: Rollout, *, sandbox: Sandbox) -> float: ...

The decorators only attach a mark; a function without one works as well when it is named by its
import path. The mark lets the set-up be refused early (wrong kind, impossible parameters) and
lets `retrain check` compare a verifier's penalty with the reward's range.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from retrain.types import Rollout, UserError

RewardKind = Literal["step", "rollout", "group"]
Range = tuple[float, float]
"""Lowest and highest value that a reward returns, before its weight; per turn for a step reward."""

Function = TypeVar("Function", bound=Callable[..., Any])

_REWARD_MARK = "__retrain_reward__"
_VERIFIER_MARK = "__retrain_verifier__"
_LEADING_ARGUMENTS: dict[RewardKind, tuple[str, ...]] = {
    "step": ("rollout", "step"),
    "rollout": ("rollout",),
    "group": ("rollouts",),
}


@dataclass(frozen=True)
class RewardInfo:
    """What `@reward` says about a function."""

    kind: RewardKind | None = None
    """None: the place where it is configured decides."""
    range: Range | Callable[[Mapping[str, Any]], Range] | None = None
    """Fixed, or computed from the parameters (defaults filled in)."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Called with the parameters (defaults filled in) when the set-up is built; raises ValueError
    or UserError on values that can never work."""


@overload
def reward(function: Function) -> Function: ...
@overload
def reward(
    *,
    kind: RewardKind | None = None,
    range: Range | Callable[[Mapping[str, Any]], Range] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Callable[[Function], Function]: ...
def reward(
    function: Function | None = None,
    *,
    kind: RewardKind | None = None,
    range: Range | Callable[[Mapping[str, Any]], Range] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Function | Callable[[Function], Function]:
    """Mark a function as a reward and leave it callable: `@reward` or `@reward(range=(0, 1))`."""

    def mark(marked: Function) -> Function:
        setattr(marked, _REWARD_MARK, RewardInfo(kind, range, check))
        return marked

    return mark if function is None else mark(function)


def verifier(function: Function) -> Function:
    """Mark `f(rollout) -> bool` as a verifier and leave it callable."""
    setattr(function, _VERIFIER_MARK, True)
    return function


def reward_info(function: Callable[..., Any]) -> RewardInfo:
    """The mark of a reward; an empty one for a function without a mark."""
    info = getattr(function, _REWARD_MARK, None)
    return info if isinstance(info, RewardInfo) else RewardInfo()


def is_reward(function: Callable[..., Any]) -> bool:
    return getattr(function, _REWARD_MARK, None) is not None


def is_verifier(function: Callable[..., Any]) -> bool:
    return getattr(function, _VERIFIER_MARK, False) is True


def takes_sandbox(function: Callable[..., Any]) -> bool:
    """Whether a reward has a parameter named `sandbox`, which gets the run's."""
    try:
        return "sandbox" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def bind_parameters(
    name: str, function: Callable[..., Any], kind: RewardKind, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Check `params` against the function's signature; return them with defaults filled in.

    Raises:
        UserError: a parameter that the function does not take, one that it needs and did not
            get, or a function that does not fit the call shape of its kind.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return dict(params)
    leading = _LEADING_ARGUMENTS[kind]
    shape = f"f({', '.join(leading)}, **params)"
    named: list[inspect.Parameter] = []
    positional_slots = 0
    takes_any = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional_slots = max(positional_slots, len(leading))
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY and positional_slots < len(
            leading
        ):
            positional_slots += 1
        else:
            named.append(parameter)
    if positional_slots < len(leading):
        raise UserError(
            f"reward '{name}' is a {kind} reward, but its function does not take "
            f"({', '.join(leading)})",
            f"a {kind} reward is called as {shape}",
        )
    _refuse_bad_names(name, named, params, takes_any)
    defaults = {p.name: p.default for p in named if p.default is not inspect.Parameter.empty}
    return defaults | dict(params)


def _refuse_bad_names(
    name: str, named: list[inspect.Parameter], params: Mapping[str, Any], takes_any: bool
) -> None:
    valid = [parameter.name for parameter in named]
    listed = f"valid parameters: {', '.join(valid)}" if valid else "it takes no parameters"
    for key in params:
        if key not in valid and not takes_any:
            raise UserError(f"reward '{name}' has no parameter '{key}'", listed)
    for parameter in named:
        if parameter.default is inspect.Parameter.empty and parameter.name not in params:
            raise UserError(f"reward '{name}' needs the parameter '{parameter.name}'", listed)


def check_verifier_shape(name: str, function: Callable[..., Any]) -> None:
    """Refuse a verifier that cannot be called with one rollout."""
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise UserError(
            f"verifier '{name}' does not take exactly one rollout ({error})",
            "a verifier is called as f(rollout) -> bool",
        ) from error
    except ValueError:
        return


def per_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a rollout reward that judges text into a step reward that judges one turn's text.

    The function sees a rollout that holds that one MODEL message, with the same task. `scope`
    has no meaning there, so it is no longer a parameter.
    """

    @functools.wraps(function)
    def judge_turn(rollout: Rollout, step: int, **params: Any) -> Any:
        message = rollout.messages[rollout.model_messages[step]]
        return function(dataclasses.replace(rollout, messages=[message]), **params)

    first, *rest = inspect.signature(function).parameters.values()
    step = inspect.Parameter("step", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    kept = [parameter for parameter in rest if parameter.name != "scope"]
    judge_turn.__signature__ = inspect.Signature([first, step, *kept])  # type: ignore[attr-defined]
    info = dataclasses.replace(reward_info(function), kind="step")
    setattr(judge_turn, _REWARD_MARK, info)
    return judge_turn
