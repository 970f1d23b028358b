"""Tools from functions and classes: the docstring and the signature make the schema."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from retrain.tools.base import Tool, ToolError, ToolSession
from retrain.tools.signature import Signature, read_signature
from retrain.tools.threads import run_in_daemon_thread
from retrain.types import UserError

P = ParamSpec("P")
R = TypeVar("R")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class FunctionTool(Generic[P, R]):
    """A function as a tool; calling it calls the function.

    A synchronous function runs in a thread, an asynchronous one on the event loop (it must not
    block). A synchronous function that hangs cannot be stopped: after its time-out the model is
    told, and the thread is abandoned.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            function: typed, with a docstring for the model.
            name: what the model calls it; the function's own name if None.
            description: in place of the docstring's.
            timeout_s: of one call; the runner's if None.
        """
        self.name = _checked_name(name or str(getattr(function, "__name__", "tool")))
        self.timeout_s = timeout_s
        self._function = function
        self._signature = read_signature(function, f"tool '{self.name}'")
        self.description = description or self._signature.description
        self.parameters = self._signature.parameters
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def session(self) -> ToolSession:
        return _CallSession(self._function, self._signature)


class ClassTool:
    """A class with a typed `__call__` as a tool: one instance per session, so per rollout.

    Calls of one session run one after the other, in the order of the model's calls. Optional
    class attributes: `name` (else the class's name), `description` (else the docstring of
    `__call__`, then of the class), `timeout_s`.
    """

    def __init__(self, cls: type[Any], params: Mapping[str, Any] | None = None) -> None:
        self.name = _checked_name(getattr(cls, "name", cls.__name__))
        self.timeout_s: float | None = getattr(cls, "timeout_s", None)
        self._cls = cls
        self._params = dict(params or {})
        self._signature = read_signature(cls.__call__, f"tool '{self.name}'")
        self.description = _describe(cls, self._signature)
        self.parameters = self._signature.parameters
        _check_params(cls, self._params)

    def session(self) -> ToolSession:
        return _CallSession(self._cls(**self._params), self._signature, in_order=True)


class _CallSession:
    def __init__(
        self, target: Callable[..., Any], signature: Signature, *, in_order: bool = False
    ) -> None:
        self._target = target
        self._signature = signature
        self._lock = asyncio.Lock() if in_order else None

    async def call(self, arguments: Mapping[str, Any]) -> str:
        args, keywords = self._signature.bind(arguments)
        if self._lock is None:
            return await self._run(args, keywords)
        async with self._lock:
            return await self._run(args, keywords)

    async def close(self) -> None:
        close = getattr(self._target, "close", None) if self._lock is not None else None
        if callable(close):
            result = close()
            if inspect.isawaitable(result):
                await result

    async def _run(self, args: list[Any], keywords: dict[str, Any]) -> str:
        call = functools.partial(self._target, *args, **keywords)
        try:
            if _is_async(self._target):
                result = await cast(Awaitable[Any], call())
            else:
                result = await run_in_daemon_thread(call)
        except (SystemExit, KeyboardInterrupt) as error:
            raise ToolError(f"{type(error).__name__}: {error}") from error
        return show(result)


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...


@overload
def tool(
    *, name: str | None = None, timeout_s: float | None = None
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
) -> FunctionTool[P, R] | Callable[[Callable[P, R]], FunctionTool[P, R]]:
    """Make a tool of a typed function, as `@tool` or `@tool(name=..., timeout_s=...)`.

    For a method, pass the bound one: `tool(searcher.search)`.
    """
    if function is not None:
        return FunctionTool(function, name=name, timeout_s=timeout_s)
    return functools.partial(FunctionTool, name=name, timeout_s=timeout_s)


def as_tool(obj: object, params: Mapping[str, Any] | None = None) -> Tool:
    """The tool that an object is: a tool already, a function, a class, or a callable instance.

    A class is instantiated once per session, with `params`; an instance is shared by all.

    Raises:
        UserError: it is none of these, or `params` do not fit.
    """
    if inspect.isclass(obj):
        if _is_tool(obj):
            _check_params(obj, params or {})
            return cast(Tool, obj(**(params or {})))
        if _has_call(obj):
            return ClassTool(obj, params)
        raise UserError(
            f"class {obj.__name__} is not a tool", "give it a typed __call__ with a docstring"
        )
    if params:
        raise UserError(
            f"tool '{_label(obj)}' takes no parameters ({', '.join(params)} given)",
            "parameters go to the constructor of a tool class",
        )
    if _is_tool(obj):
        return cast(Tool, obj)
    if inspect.isroutine(obj) or isinstance(obj, functools.partial):
        return FunctionTool(cast(Callable[..., Any], obj))
    if callable(obj):
        name = getattr(obj, "name", None) or type(obj).__name__
        timeout_s = getattr(obj, "timeout_s", None)
        described = _describe(obj, read_signature(obj.__call__, f"tool '{name}'"))
        return FunctionTool(obj.__call__, name=name, description=described, timeout_s=timeout_s)
    raise UserError(
        f"{_label(obj)} is not a tool", "give a typed function, or a class with a typed __call__"
    )


def show(value: object) -> str:
    """What the model reads of a result: a string as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _is_async(target: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)


def _is_tool(obj: object) -> bool:
    return callable(getattr(obj, "session", None))


def _has_call(cls: type[Any]) -> bool:
    return any("__call__" in vars(base) for base in cls.__mro__)


def _check_params(cls: type[Any], params: Mapping[str, Any]) -> None:
    try:
        inspect.signature(cls).bind(**params)
    except TypeError as error:
        raise UserError(
            f"tool class {cls.__name__}: {error}", f"{cls.__name__}{inspect.signature(cls)}"
        ) from error


def _describe(obj: Any, signature: Signature) -> str:
    owner = obj if inspect.isclass(obj) else type(obj)
    own = getattr(obj, "description", None)
    return str(own or signature.description or inspect.cleandoc(vars(owner).get("__doc__") or ""))


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot be a tool's name",
            "use letters, digits, '_' and '-', at most 64; for a lambda, pass name=",
        )
    return name


def _label(obj: object) -> str:
    return str(getattr(obj, "__name__", None) or getattr(obj, "name", None) or repr(obj)[:60])
