"""Tests of code that a model wrote, graded where that code does not run.

Every run is a fresh session, so nothing that the code does to its interpreter reaches another
test. What a run prints after a nonce is a claim by untrusted code: it is read as a literal in
the trusted process. The code may find the nonce, or print what it likes; that is worth no more
than returning the same value, since no expected value is ever in its session.
"""

from __future__ import annotations

import ast
import builtins
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrain.rewards.code_module import as_module
from retrain.rewards.literals import NotLiteral, read_literal, same_value, write_literal
from retrain.sandbox.base import Result, Sandbox, SandboxUnavailable

MAX_CALLS = 100
"""Most calls of the code that one statement may make."""

_TOOLS = r"""
def _tools_NONCE(
    isinstance, hasattr, getattr, print, type, Exception, list, tuple, dict, set, frozenset, float
):
    def show(value):
        for name in _stubs_NONCE:
            if value is _stubs_NONCE[name]:
                return name
        if hasattr(value, 'tolist'):
            value = value.tolist()
        if isinstance(value, dict):
            inner = [show(key) + ': ' + show(item) for key, item in value.items()]
            return '{' + ', '.join(inner) + '}'
        if isinstance(value, float) and (value != value or value in (1e999, -1e999)):
            return '(1e999-1e999)' if value != value else '1e999' if value > 0 else '-1e999'
        if not isinstance(value, (list, tuple, set, frozenset)):
            return f'{value!r}'
        inner = [show(item) for item in value]
        if isinstance(value, list):
            return '[' + ', '.join(inner) + ']'
        if isinstance(value, tuple):
            return '(' + ''.join([item + ', ' for item in inner]) + ')'
        inner.sort()
        listed = '{' + ', '.join(inner) + '}' if inner else ''
        return (listed or 'set()') if isinstance(value, set) else 'frozenset(' + listed + ')'

    def say(kind, text):
        print(f'\nNONCE {kind} {text} NONCE')

    def ask(call, quiet):
        kind = 'value'
        try:
            value = call()
        except Exception as error:
            kind = 'raised'
            kinds = getattr(type(error), '__mro__', [type(error)])
            value = [[each.__name__ for each in kinds], f'{error}']
        if not quiet:
            say(kind, show(value))

    def stub(name):
        def call(*args, **kwargs):
            inner = [show(arg) for arg in args]
            inner += [f'{key}={show(arg)}' for key, arg in kwargs.items()]
            call = name + '(' + ', '.join(inner) + ')'
            if not _records_NONCE.get(call):
                say('call', call)
                raise SystemExit
            value, error = _records_NONCE[call].pop(0)
            if error is not None:
                raise error
            return value

        _stubs_NONCE[name] = call
        return call

    return say, ask, stub

_stubs_NONCE = {}
_records_NONCE = {}
_say_NONCE, _ask_NONCE, _stub_NONCE = _tools_NONCE(
    isinstance, hasattr, getattr, print, type, Exception, list, tuple, dict, set, frozenset, float
)
"""
"""Runs ahead of the code, so that the code may redefine any built-in. Written in the subset of
Python that every executor runs."""

_SCRIPT = """
import io, sys
sys.stdin = io.TextIOWrapper(io.BytesIO({stdin!r}), encoding="utf-8")
sys.stderr = io.StringIO()
exec(compile({code!r}, "script.py", "exec"), {{"__name__": "__main__"}})
"""


@dataclass(frozen=True)
class Pair:
    """An expression, whose value is compared with the expected one outside of the sandbox."""

    call: str
    expected: Any

    async def passes(self, sandbox: Sandbox, code: str) -> bool:
        needed = len(write_literal(self.expected))
        try:
            answer = await _Callee(sandbox, code).ask(self.call, needed=needed)
            return not answer.raised and same_value(read_literal(answer.text), self.expected)
        except NotLiteral:
            return False


@dataclass(frozen=True)
class Script:
    """A program's input and output, compared without blanks at the ends of lines."""

    stdin: str
    stdout: str

    async def passes(self, sandbox: Sandbox, code: str) -> bool:
        program = _SCRIPT.format(stdin=self.stdin.encode(), code=code)
        result = await run_once(sandbox, program)
        _refuse_small_output(result, len(self.stdout))
        return result.status in ("ok", "exit") and _lines(result.stdout) == _lines(self.stdout)


@dataclass(frozen=True)
class Statement:
    """Source that passes when it ends without an error, in a session without the model's code.

    What it takes from the code are stubs there: the first call that has no recorded result stops
    the run; the call is made in a session with the code, its result recorded, and the statement
    run again from the start.
    """

    source: str
    called: tuple[str, ...]
    """Names it takes from the code and only calls."""
    loaded: tuple[str, ...]
    """Other names it takes: functions that it passes on, or constants."""

    async def passes(self, sandbox: Sandbox, code: str) -> bool:
        try:
            return await self._replay(sandbox, _Callee(sandbox, code))
        except NotLiteral:
            return False

    async def _replay(self, sandbox: Sandbox, callee: _Callee) -> bool:
        constants = [await self._constant(callee, name) for name in self.loaded]
        records: dict[str, list[str]] = {}
        for _ in range(MAX_CALLS + 1):
            nonce = secrets.token_hex(16)
            result = await run_once(sandbox, self._program(nonce, constants, records))
            call = _said(result, nonce, "call", first=True)
            if call is None:
                self._refuse_broken(result, untouched=not records and not self.loaded)
                return result.status == "ok" and _said(result, nonce, "done") is not None
            records.setdefault(call, []).append((await callee.ask(call, keep=True)).source())
        return False

    async def _constant(self, callee: _Callee, name: str) -> str:
        """A line that defines the name, unless it is to be a stub."""
        try:
            answer = await callee.ask(name)
            return "" if answer.raised else f"{name} = {write_literal(read_literal(answer.text))}"
        except NotLiteral:
            return ""

    def _program(self, nonce: str, constants: list[str], records: Mapping[str, list[str]]) -> str:
        results = (f"{call!r}: [{', '.join(done)}]" for call, done in records.items())
        return "\n".join(
            [
                _TOOLS.replace("NONCE", nonce),
                f"_records_{nonce}.update({{{', '.join(results)}}})",
                *(f"{name} = _stub_{nonce}('{name}')" for name in self.called + self.loaded),
                *constants,
                self.source,
                f"_say_{nonce}('done', '')",
            ]
        )

    def _refuse_broken(self, result: Result, *, untouched: bool) -> None:
        """A test that fails before it has used anything of the code fails by itself."""
        if untouched and result.status == "error":
            error = result.error.strip().rpartition("\n")[2]
            raise ValueError(f"test {self.source!r} fails before it calls the code: {error}")


@dataclass(frozen=True)
class _Answer:
    text: str
    raised: bool

    def source(self) -> str:
        """(value, None) or (None, exception), to be written into a statement's session.

        Raises:
            NotLiteral: the value is something else than literals.
        """
        answer = read_literal(self.text)
        if not self.raised:
            return f"({write_literal(answer)}, None)"
        return f"(None, {_exception(answer)})"


def _exception(answer: Any) -> str:
    """Source of an exception of the nearest built-in type that takes a message."""
    match answer:
        case [[str(first), *_] as kinds, str(message)]:
            pass
        case _:
            raise NotLiteral("not what was asked for")
    kind = next((kind for kind in kinds if kind in _EXCEPTIONS), None)
    if kind is None:
        kind, message = "RuntimeError", f"{first}: {message}"
    if kind == "KeyError":
        message = _key(message)
    return f"{kind}({message!r})"


def _key(message: str) -> str:
    """The argument of a KeyError, whose message is the repr of it."""
    try:
        return str(read_literal(message))
    except NotLiteral:
        return message


_UNLIKE_OTHERS = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError, Warning)
_EXCEPTIONS = frozenset(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, (*_UNLIKE_OTHERS, BaseExceptionGroup))
    and kind is not Exception
)


class _Unfinished(NotLiteral):
    """The code did not answer: it ran out of time, ended or broke its session."""


@dataclass
class _Callee:
    """The model's code, asked for values; each question has a session of its own, in which the
    calls that were kept are made again first, so that the code's state is as they left it."""

    sandbox: Sandbox
    code: str
    kept: list[str] = field(default_factory=list)

    async def ask(self, expression: str, *, keep: bool = False, needed: int = 0) -> _Answer:
        """The value of an expression; `needed` is the length of the text that should come back.

        Raises:
            _Unfinished: there is no answer.
        """
        nonce = secrets.token_hex(16)
        calls = [f"_ask_{nonce}(lambda: ({call}\n), True)" for call in self.kept]
        lines = [
            as_module(self.code, self.sandbox, _TOOLS.replace("NONCE", nonce)),
            *calls,
            f"_ask_{nonce}(lambda: ({expression}\n), False)",
        ]
        result = await run_once(self.sandbox, "\n".join(lines))
        _refuse_small_output(result, needed)
        if keep:
            self.kept.append(expression)
        for kind in ("value", "raised"):
            text = _said(result, nonce, kind) if result.status == "ok" else None
            if text is not None:
                return _Answer(text, kind == "raised")
        raise _Unfinished(result.status)


async def run_once(sandbox: Sandbox, code: str) -> Result:
    """Run code in a session of its own; a sandbox that fails is asked a second time.

    Raises:
        SandboxUnavailable: it failed twice.
    """
    try:
        return await _run(sandbox, code)
    except SandboxUnavailable:
        return await _run(sandbox, code)


async def _run(sandbox: Sandbox, code: str) -> Result:
    session = await sandbox.session()
    try:
        return await session.run(code)
    finally:
        await session.close()


def _said(result: Result, nonce: str, kind: str, *, first: bool = False) -> str | None:
    """What a run printed after the nonce: the last whole line of a kind, or the first."""
    start, end = f"{nonce} {kind} ", f" {nonce}"
    lines = [
        line.removeprefix(start).removesuffix(end)
        for line in result.stdout.split("\n")
        if line.startswith(start) and line.endswith(end)
    ]
    return lines[0 if first else -1] if lines else None


def _refuse_small_output(result: Result, needed: int) -> None:
    if result.truncated and needed > len(result.stdout):
        raise ValueError(
            f"an expected answer has {needed} characters, more than the sandbox keeps of an "
            "output; raise sandbox.max_output_chars"
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


CodeTest = Pair | Script | Statement


def parse_test(test: Any) -> CodeTest:
    """One test as a config or a task gives it.

    Raises:
        ValueError: it can never work.
    """
    if isinstance(test, str):
        return _statement(test)
    if isinstance(test, Mapping) and set(test) == {"call", "expected"}:
        return _pair(test["call"], test["expected"])
    if isinstance(test, Mapping) and set(test) == {"stdin", "stdout"}:
        if not isinstance(test["stdin"], str) or not isinstance(test["stdout"], str):
            raise ValueError(f"test {test!r}: stdin and stdout must be text")
        return Script(test["stdin"], test["stdout"])
    raise ValueError(
        f"test {test!r} is no statement and has not exactly the keys call and expected, or stdin "
        "and stdout"
    )


def _pair(call: Any, expected: Any) -> Pair:
    if not isinstance(call, str):
        raise ValueError(f"call {call!r} is not an expression in quotes")
    _parse(f"({call}\n)", call)
    try:
        write_literal(expected)
    except NotLiteral as error:
        raise ValueError(f"test {call!r}: expected cannot be compared: {error}") from error
    return Pair(call, expected)


def _statement(source: str) -> Statement:
    tree = _parse(source, source)
    loaded, called, own = set(), set(), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name() as function):
                called.add(function)
            case ast.Name(ctx=ast.Load()):
                loaded.add(node)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                own.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                own.add(name)
            case ast.ClassDef(name=name):
                own.add(name)
            case ast.alias(name=name, asname=asname):
                own.add(asname or name.partition(".")[0])
    others = {node.id for node in loaded - called} - own
    only_called = {node.id for node in called} - own - others
    if not others and not only_called:
        raise ValueError(
            f"test {source!r} takes nothing from the code (tests share no variables, and a name "
            "of Python's built-ins is Python's own here: test such a function by call and expected)"
        )
    return Statement(source, tuple(sorted(only_called)), tuple(sorted(others)))


def _parse(source: str, test: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"test {test!r} is not Python: {error}") from error
