"""Runs code as Python's prompt would: the value of a final bare expression is shown."""

from __future__ import annotations

import ast
import builtins
import io
import linecache
import sys
import traceback
import types
from typing import Any, Literal

from .wire import MAX_ERROR_BYTES

_UNSHOWABLE = "(the error could not be shown)"


class Interpreter:
    """One `__main__` module, and the code that has run in it."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        """
        Args:
            packages: third-party names that can be imported, for the message when another is.
        """
        self._packages = packages
        self._calls = 0
        main = types.ModuleType("__main__")
        self._names: dict[str, Any] = main.__dict__
        self._names["__builtins__"] = builtins
        sys.modules["__main__"] = main
        for name in ("exit", "quit"):
            setattr(builtins, name, sys.exit)
        sys.argv = [""]
        self._input, self._output = _standard_streams()

    def run(self, code: str) -> tuple[Literal["ok", "error", "exit", "memory"], str]:
        """Run code; its output goes to standard output.

        Returns:
            A status of `wire.STATUSES`, and the error to show, empty when there is none.
        """
        self._calls += 1
        if self._input.closed or self._output.closed:
            self._input, self._output = _standard_streams()
        sys.stdin, sys.stdout, sys.stderr = self._input, self._output, self._output
        filename = f"<python-{self._calls}>"
        try:
            self._execute(code, filename)
            sys.stdout.flush()
        except SystemExit as leaving:
            return "exit", _exit_text(leaving)
        except MemoryError as error:
            return "memory", _last_words(error)
        except BaseException as error:
            return "error", self._explain(error)
        return "ok", ""

    def _execute(self, code: str, filename: str) -> None:
        lines = code.splitlines(keepends=True)
        linecache.cache[filename] = (len(code), None, lines, filename)
        tree = ast.parse(code, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, filename, "exec", dont_inherit=True), self._names)
        if isinstance(last, ast.Expr):
            expression = ast.Expression(last.value)
            value = eval(compile(expression, filename, "eval", dont_inherit=True), self._names)
            if value is not None:
                self._names["_"] = value
                sys.stdout.write(f"{value!r}\n")

    def _explain(self, error: BaseException) -> str:
        """The traceback without the frames of this module, bounded.

        The error may be of a class that makes every look at it fail.
        """
        try:
            shown = traceback.TracebackException.from_exception(error)
            _drop_own_frames(shown)
            text = "".join(shown.format()).rstrip("\n")
            if isinstance(error, ModuleNotFoundError):
                text += self._what_there_is(error)
            return bounded(text)
        except BaseException:
            return f"Error: {_UNSHOWABLE}"

    def _what_there_is(self, error: ModuleNotFoundError) -> str:
        name = (error.name or "").partition(".")[0]
        if not name or name in self._packages:
            return ""
        there = "".join(f", {package}" for package in self._packages)
        return f" (this Python has only: the standard library{there})"


def _standard_streams() -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Input and output, which is not buffered: what was printed before a time-out is there."""
    source: Any = io.FileIO(0, closefd=False)
    target: Any = io.FileIO(1, "w", closefd=False)
    return (
        io.TextIOWrapper(io.BufferedReader(source), "utf-8"),
        io.TextIOWrapper(target, "utf-8", "backslashreplace", write_through=True),
    )


def bounded(text: str) -> str:
    """At most MAX_ERROR_BYTES of UTF-8, the middle left out."""
    end = MAX_ERROR_BYTES // 16  # in characters, which may take four bytes each
    if len(text) <= 2 * end:
        return text
    return f"{text[:end]}\n... [{len(text) - 2 * end} characters left out] ...\n{text[-end:]}"


def _drop_own_frames(shown: traceback.TracebackException) -> None:
    """Of the error and of those that it came from, down to a depth that hostile code may not
    exceed."""
    waiting = [shown]
    for _ in range(100):
        if not waiting:
            return
        current = waiting.pop()
        frames = [frame for frame in current.stack if frame.filename != __file__]
        # `ast.parse` is one frame of the standard library, above code that does not parse.
        if frames and frames[0].filename == ast.__file__:
            frames = frames[1:]
        current.stack = traceback.StackSummary.from_list(frames)
        waiting += [e for e in (current.__cause__, current.__context__) if e is not None]


def _exit_text(leaving: SystemExit) -> str:
    code = leaving.code
    if code is None or isinstance(code, int | str):
        return f"SystemExit: {0 if code is None else code}"[:1000]
    return "SystemExit"


def _last_words(error: MemoryError) -> str:
    try:
        return bounded(f"MemoryError: {error}".removesuffix(": "))
    except BaseException:
        return "MemoryError"
