"""The user's function: found, called, and what it returned."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[[dict[str, Any]], Any]

_CLIENTS = {"openai": ("OpenAI", "chat"), "anthropic": ("Anthropic", "messages")}
"""Of an SDK its client, and what of it loads the rest: seconds, at the first use."""

_HERE = os.path.dirname(__file__)


class Unusable(Exception):
    """There is no such function."""


def load(path: str) -> Function:
    """The function that `pkg.module:name` or `/path/to/file.py:name` points at.

    Raises:
        Unusable: there is none, or it does not take one argument.
    """
    source, _, name = path.rpartition(":")
    try:
        found: Any = (
            _import_file(source) if source.endswith(".py") else importlib.import_module(source)
        )
    except (Exception, SystemExit) as error:
        raise Unusable(f"importing {source} raised {_said(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise Unusable(f"{source} does not define {name!r}")
        found = getattr(found, part)
    try:
        inspect.signature(found).bind({})
    except (TypeError, ValueError) as error:
        raise Unusable(f"{name} cannot be called with one argument, the task: {error}") from error
    if inspect.iscoroutinefunction(found):
        importlib.import_module("asyncio")
    function: Function = found
    return function


def use_sdks_once() -> None:
    """Have those that the user's module has imported load here what else they load in each task:
    a client is made and dropped, which asks nobody."""
    for name, (client, resource) in _CLIENTS.items():
        if name in sys.modules:
            with contextlib.suppress(Exception):
                getattr(getattr(sys.modules[name], client)(), resource)


def call(function: Function, task: dict[str, Any]) -> dict[str, Any]:
    """What it returned, see `outcome`; a coroutine is awaited."""
    made = function(task)
    if inspect.isawaitable(made):
        import asyncio

        async def main() -> Any:
            return await made

        made = asyncio.run(main())
    return outcome(made)


def outcome(made: Any) -> dict[str, Any]:
    """`reward` and `metadata`, numbers by name; or `fault`, what is wrong with it."""
    if isinstance(made, numbers.Real):
        return {"reward": float(made), "metadata": {}}
    if not isinstance(made, Mapping):
        return {"reward": None, "metadata": {}}
    reward = made.get("reward")
    if reward is not None and not isinstance(reward, numbers.Real):
        return {"fault": f"it returned reward {reward!r}, which is no number"}
    rest = {str(name): value for name, value in made.items() if name != "reward"}
    figures = {name: float(v) for name, v in rest.items() if isinstance(v, numbers.Real)}
    return {"reward": None if reward is None else float(reward), "metadata": figures}


def print_exception(error: BaseException) -> None:
    """With the frames that are the user's."""
    trace = error.__traceback__
    while trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == _HERE:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def exit_code(error: SystemExit) -> int:
    """As Python itself ends with."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _import_file(path: str) -> Any:
    """As `python file.py` finds what is beside it."""
    sys.path.insert(0, os.path.dirname(path))
    name = os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _said(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
