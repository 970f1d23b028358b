"""Tools from functions and classes: the docstring and the signature make the schema."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from retrain.tools.base import Tool, ToolOutput, ToolSession
from retrain.tools.signature import Signature, read_signature
from retrain.tools.smolagents import from_smolagents, wrap_smolagents
from retrain.tools.threads import in_daemon_thread
from retrain.types import UserError

P = ParamSpec("P")
R = TypeVar("R")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class FunctionTool(Generic[P, R]):
    """A function as a tool; calling it calls the function.

    A synchronous function runs in a thread, an asynchronous one on the event loop (it must not
    block: that would hold up every rollout). A synchronous function that hangs cannot be stopped:
    after its time-out the model is told, and the thread is abandoned.
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
        self.name = checked_name(name or str(getattr(function, "__name__", "tool")))
        self.timeout_s = timeout_s
        self._function = function
        self._signature = read_signature(function, f"tool '{self.name}'")
        self.description = description or self._signature.description
        self.parameters = self._signature.parameters
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def session(self) -> ToolSession:
        return _FunctionSession(self._function, self._signature)


class ClassTool:
    """A class with a typed `__call__` as a tool: one instance per session, so per rollout.

    Calls of one session run one after the other, in the order of the model's calls; a thread that
    hangs keeps its instance, so that later calls of the session run out of time as well. With a
    synchronous `__call__` the instance is made, called and closed in threads. Optional class
    attributes: `name` (else the class's name), `description` (else the docstring of `__call__`,
    then of the class), `timeout_s`.
    """

    in_order = True

    def __init__(self, cls: type[Any], params: Mapping[str, Any] | None = None) -> None:
        self.name = checked_name(getattr(cls, "name", cls.__name__))
        self.timeout_s: float | None = getattr(cls, "timeout_s", None)
        self._cls = cls
        self._params = dict(params or {})
        self._signature = read_signature(cls.__call__, f"tool '{self.name}'")
        self.description = _describe(cls, self._signature)
        self.parameters = self._signature.parameters
        _check_params(cls, self._params)

    def session(self) -> ToolSession:
        return _ClassSession(self._cls, self._params, self._signature)


class _FunctionSession:
    def __init__(self, function: Callable[..., Any], signature: Signature) -> None:
        self._function = function
        self._signature = signature

    async def call(self, arguments: Mapping[str, Any]) -> str | ToolOutput:
        args, keywords = self._signature.bind(arguments)
        if _is_async(self._function):
            return show(await cast(Awaitable[Any], self._function(*args, **keywords)))
        return await in_daemon_thread(lambda: show(self._function(*args, **keywords)))

    async def close(self) -> None:
        return None


class _ClassSession:
    """One instance, made at the first call."""

    def __init__(self, cls: type[Any], params: Mapping[str, Any], signature: Signature) -> None:
        self._make: Callable[[], Any] = lambda: cls(**params)
        self._signature = signature
        self._async = _is_async(cls)
        self._instance: Any = None
        self._in_use = asyncio.Lock()
        self._thread: asyncio.Future[Any] | None = None
        """What runs in a thread, perhaps since a call that was given up."""

    async def call(self, arguments: Mapping[str, Any]) -> str | ToolOutput:
        args, keywords = self._signature.bind(arguments)

        def run() -> str | ToolOutput:
            return show(self._made()(*args, **keywords))

        async with self._in_use:
            if self._async:
                return show(await self._made()(*args, **keywords))
            return cast(str | ToolOutput, await self._in_thread(run))

    async def close(self) -> None:
        close: object = getattr(self._instance, "close", None)
        if not callable(close):
            return
        if self._async or inspect.iscoroutinefunction(close):
            result = close()
            if inspect.isawaitable(result):
                await result
        else:
            await self._in_thread(close)

    def _made(self) -> Any:
        if self._instance is None:
            self._instance = self._make()
        return self._instance

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        """One at a time, however long the one before takes."""
        if self._thread is not None:
            await asyncio.wait({self._thread})
        self._thread = in_daemon_thread(function)
        return await asyncio.shield(self._thread)


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
    """The tool that an object is: a tool already, a function, a class, a callable instance, or a
    `smolagents.Tool`.

    A class is instantiated once per session, with `params`; an instance is shared by all.

    Raises:
        UserError: it is none of these, or `params` do not fit.
    """
    if from_smolagents(obj):
        return wrap_smolagents(obj, params or {})
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


def show(value: object) -> str | ToolOutput:
    """What the model reads of a result: a string as it is, bytes as UTF-8, anything else as JSON,
    and what JSON has no form for as its `repr`. A `ToolOutput` stays what it is."""
    if isinstance(value, str | ToolOutput):
        return value
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "replace")
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _is_async(target: Callable[..., Any]) -> bool:
    """Whether calling it (an instance, for a class) gives something to await."""
    call = target.__call__ if inspect.isclass(target) else type(target).__call__
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(call)


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


def checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot be a tool's name",
            "use letters, digits, '_' and '-', at most 64; for a lambda, pass name=",
        )
    return name


def _label(obj: object) -> str:
    return str(getattr(obj, "__name__", None) or getattr(obj, "name", None) or repr(obj)[:60])
