"""Rewards that remember something between steps."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from retrain.types import Rollout, UserError

_METHODS = ("end_step", "state_dict", "load_state_dict")
_HOLDS = "use strings, finite numbers, booleans, None, lists, and dictionaries with strings as keys"


@runtime_checkable
class Stateful(Protocol):
    """A reward, an object of a class named in the config, that remembers something between steps:
    a sliding window, say. It changes in `end_step` only, so that what a rollout is worth does not
    depend on who was scored before it in the same step."""

    def __call__(self, *args: Any) -> Any: ...

    def end_step(self, rollouts: Sequence[Rollout]) -> None:
        """A step of training is over; these are its rollouts, scored."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def reward_object(key: str, kind: type[Any], params: dict[str, Any]) -> Callable[..., Any]:
    """The one object of a reward class that serves a stage.

    Raises:
        UserError: `params` do not fit, it cannot be called, or it has half a state.
    """
    try:
        made: Any = kind(**params)
    except UserError as error:
        raise UserError(f"reward '{key}': {error.cause}", error.next_step) from error
    except TypeError as error:
        raise UserError(
            f"reward '{key}': params do not fit {kind.__name__}: {error}",
            f"Its parameters: {inspect.signature(kind)}.",
        ) from error
    if not callable(made):
        raise UserError(
            f"reward '{key}': {kind.__name__} has no __call__", "Give it one: (self, rollout)."
        )
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if 0 < len(missing) < len(_METHODS):
        raise UserError(
            f"reward '{key}': {kind.__name__} has a state, but no {' and no '.join(missing)}",
            "docs/resuming.md shows all that a reward with a state needs.",
        )
    scored: Callable[..., Any] = made
    return scored


def plain_state(name: str, state: object) -> object:
    """A copy of a reward's state, as a checkpoint will give it back.

    Raises:
        UserError: it would not be equal.
    """
    try:
        copied: object = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"reward '{name}': a checkpoint cannot hold its state_dict(): {error}", _HOLDS
        ) from error
    if copied != state:
        raise UserError(
            f"reward '{name}': its state_dict() comes back from a checkpoint as "
            f"{str(copied)[:100]}, not as {str(state)[:100]}",
            _HOLDS,
        )
    return copied
