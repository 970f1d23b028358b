"""What a program is given: its command line, its environment, its task."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.gateway.variables import variables
from retrain.types import MessageType, Task, UserError

MOST_BYTES = 120_000
"""Of one argument or variable: Linux takes no more than 128 KiB."""

_SECRET = re.compile(
    r"(^|_)(API_?KEY|TOKEN|SECRET|SECRET_KEY|ACCESS_KEY|PRIVATE_KEY|PASSWORD|PASSWD|CREDENTIALS?)$",
    re.IGNORECASE,
)
_OTHER_MODELS = ("OPENAI_", "ANTHROPIC_", "AZURE_OPENAI_")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_ROLES = {
    MessageType.SYSTEM: "system",
    MessageType.MESSAGE: "user",
    MessageType.MODEL: "assistant",
    MessageType.TOOL: "tool",
}


def inherited(own: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment without what leads to other models and without what looks like a
    key, and with `own`; None there stands for this process's own value.

    Raises:
        UserError: this process has no such variable.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET.search(name) and not name.upper().startswith(_OTHER_MODELS)
    }
    for name, value in own.items():
        given = os.environ.get(name) if value is None else value
        if given is None:
            raise UserError(
                f"environment.env.{name} is null, and the run's own environment has no {name}",
                f"Set {name} before the run, or give a value.",
            )
        kept[name] = given
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in kept.get(name, "").split(",") if host]
        kept[name] = ",".join(dict.fromkeys([*hosts, *_LOOPBACK]))
    kept.setdefault("PYTHONUNBUFFERED", "1")  # what it printed is seen where it is killed
    return kept


def session_variables(url: str, name: str, key: str, record: Mapping[str, Any]) -> dict[str, str]:
    """How a program finds the policy, and its task where that is not too long for a variable."""
    found = variables(url, name, key) | {"ANTHROPIC_AUTH_TOKEN": key}
    text = json.dumps(record, ensure_ascii=False, default=str)
    if len(text.encode()) <= MOST_BYTES:
        found["RETRAIN_TASK"] = text
    return found


def task_record(task: Task, *, with_answer: bool) -> dict[str, Any]:
    """What JSON can say of a task: `id`, `prompt`, `messages`, `metadata`, perhaps `answer`.

    `prompt` is what all but system messages say.
    """
    told = [m.content for m in task.prompt if m.type is not MessageType.SYSTEM]
    record: dict[str, Any] = {
        "id": task.id,
        "prompt": "\n\n".join(told),
        "messages": [
            {"role": message.role or _ROLES[message.type], "content": message.content}
            for message in task.prompt
        ],
        "metadata": task.metadata,
    }
    if with_answer:
        record["answer"] = task.answer
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def check_command(command: Sequence[str], directory: Path, path: str | None) -> str:
    """Where its program is.

    Args:
        directory: that it will run in.
        path: the variable PATH that it will have.

    Raises:
        UserError: a field cannot be read, there is no such program, or no such script for Python.
    """
    for argument in command:
        for _ in _fields(argument):
            pass
    program = command[0]
    if any(_fields(program)):
        raise UserError(
            f"environment.command: the program is {program!r}, which has a field",
            "Name one program for all tasks; fields are for its arguments.",
        )
    found = shutil.which(str(directory / program) if os.sep in program else program, path=path)
    if found is None:
        raise UserError(
            f"environment.command: there is no program {program!r}",
            f"Looked for it in {directory if os.sep in program else 'PATH'}.",
        )
    script = command[1] if len(command) > 1 else ""
    is_script = script.endswith(".py") and not any(_fields(script))
    if is_script and Path(program).name.startswith("python") and not (directory / script).is_file():
        raise UserError(
            f"environment.command: there is no file {script!r}",
            f"Looked for it in {directory}; environment.working_dir says where programs run.",
        )
    return found


def absolute(function: str) -> str:
    """The import path with a file's own path made absolute.

    Raises:
        UserError: it is none, or there is no such file.
    """
    source, colon, name = function.rpartition(":")
    if not (source and colon and name):
        raise UserError(
            f"environment.function: {function!r} is not an import path",
            "Write pkg.module:name or path/to/file.py:name.",
        )
    if not source.endswith(".py"):
        return function
    file = Path(source).resolve()
    if not file.is_file():
        raise UserError(f"environment.function: there is no file {source!r}", f"Looked for {file}.")
    return f"{file}:{name}"


def fill(command: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """The command line of one task: `{prompt}`, `{id}`, `{answer}` where it is given, and the names
    of metadata stand for their values.

    Raises:
        UserError: the task has no such field, or an argument is longer than the system takes.
    """
    values = {**record["metadata"], **{k: v for k, v in record.items() if k != "metadata"}}
    filled = []
    for argument in command:
        text = argument
        if fields := list(_fields(argument)):
            missing = [name for name in fields if name not in values]
            if missing:
                raise UserError(
                    f"environment.command: task {record['id']} has no {missing[0]!r} for the "
                    f"argument {argument!r}",
                    f"It has: {', '.join(sorted(values))}. Write braces twice where they are meant "
                    "as such; the answer is there with pass_answer: true.",
                )
            text = argument.format_map({name: _text(values[name]) for name in fields})
        elif "{" in argument or "}" in argument:
            text = argument.format_map({})
        if len(text.encode()) > MOST_BYTES or "\0" in text:
            raise UserError(
                f"environment.command: the argument {argument!r} cannot be given task "
                f"{record['id']}: it is longer than {MOST_BYTES} bytes, or has a NUL",
                "Use environment.function, which is given a task of any size.",
            )
        filled.append(text)
    return filled


def _fields(argument: str) -> list[str]:
    """
    Raises:
        UserError: it is no template of plain names.
    """
    try:
        parts = list(string.Formatter().parse(argument))
    except ValueError as error:
        raise UserError(
            f"environment.command: the argument {argument!r} cannot be read: {error}",
            "Write braces twice where they are meant as such: {{ and }}.",
        ) from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or set(name) & set(".[")):
            raise UserError(
                f"environment.command: the field in {argument!r} is no plain name",
                "Write {prompt}, or {name of a column}; braces that are meant as such, twice.",
            )
    return names


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
