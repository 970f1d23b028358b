"""What a SandboxFusion server answers, read without trust.

The form, as SandboxFusion's own code makes it: `status` is `Success`, `Failed` (a non-zero
return code or a time-out) or `SandboxError` (with a `message`; a result's own status is then
`Error`). `run_result` has `status`, `stdout`, `stderr` and `return_code`, the last three null
where there is nothing: `return_code` after a time-out, for one. Memory has no status: it shows
as a `MemoryError`, or as a process that was killed.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass

_HEADER = "Traceback (most recent call last):\n"
_TRACEBACK = re.compile(rf"^(?:  \+ Exception Group )?{re.escape(_HEADER)}", re.MULTILINE)
_CHAINED = (
    "\n\nDuring handling of the above exception, another exception occurred:\n\n",
    "\n\nThe above exception was the direct cause of the following exception:\n\n",
)
_UNPARSED = ("SyntaxError", "IndentationError", "TabError", "RecursionError", "MemoryError")
"""How Python refuses a whole script: without the header of a traceback."""

_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)
_CRASHES = ("ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "SEGV", "TERM", "XCPU", "SYS")


class WrongAnswer(Exception):
    """Not the form above; says what is wrong with it."""


@dataclass(frozen=True)
class Answer:
    """Claims of the server about one run."""

    return_code: int | None
    """None after a time-out."""
    stdout: str = ""
    stderr: str = ""
    sandbox_error: str | None = None
    """Why the server could not run the code; None if it did."""

    @property
    def signal(self) -> str:
        """The name of the signal that ended the process, empty if none did.

        A shell in between adds 128 to the number.
        """
        code = self.return_code or 0
        try:
            name = signal.Signals(-code if code < 0 else code - 128).name
        except ValueError:
            return ""
        return name if name.removeprefix("SIG") in _CRASHES else ""

    @property
    def out_of_memory(self) -> bool:
        _, traceback = split_traceback(self)
        _, header, frames = traceback.rpartition(_HEADER)
        raised = next((x for x in frames.splitlines() if x and not x.startswith(" ")), "")
        return bool(header) and raised.partition(":")[0].endswith("MemoryError")


def read_answer(body: bytes) -> Answer:
    """
    Raises:
        WrongAnswer: the body is not what SandboxFusion sends.
    """
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongAnswer("answered something that is not JSON") from error
    if not isinstance(payload, dict):
        raise WrongAnswer("answered JSON that is not an object")
    status = payload.get("status")
    if status == "SandboxError":
        return Answer(None, sandbox_error=_text(payload, "message"))
    if status not in ("Success", "Failed"):
        raise WrongAnswer(f"answered without a known status: {_short(status)}")
    ran = payload.get("run_result")
    if ran is None:
        ran = payload.get("compile_result")
    if not isinstance(ran, dict):
        raise WrongAnswer("answered without a run_result")
    stdout, stderr = _text(ran, "stdout"), _text(ran, "stderr")
    outcome = ran.get("status")
    if outcome == "TimeLimitExceeded":
        return Answer(None, stdout, stderr)
    if outcome == "Error":
        return Answer(None, sandbox_error=stderr)
    code = ran.get("return_code")
    if outcome != "Finished" or not isinstance(code, int) or isinstance(code, bool):
        raise WrongAnswer(f"answered {_short(outcome)} with return code {_short(code)}")
    return Answer(code, stdout, stderr)


def split_traceback(answer: Answer) -> tuple[str, str]:
    """Standard error in two: what was written before an uncaught exception, and its traceback.

    The traceback is empty if no exception ended the program. Python exits with 1 after one (with
    SIGINT after a KeyboardInterrupt), so one that was printed and handled stays where it is.
    """
    stderr = answer.stderr
    if answer.return_code != 1 and answer.return_code not in _INTERRUPTED:
        return stderr, ""
    headers = [match.start() for match in _TRACEBACK.finditer(stderr)]
    start = headers.pop() if headers else _unparsed(stderr)
    while headers and stderr.endswith(_CHAINED, 0, start):
        start = headers.pop()
    return (stderr, "") if start < 0 else (stderr[:start], stderr[start:].rstrip("\n"))


def _unparsed(text: str) -> int:
    """Where the report of a script that could not be parsed starts; -1 if there is none."""
    trimmed = text.rstrip("\n")
    last = trimmed.rfind("\n") + 1
    if trimmed[last:].partition(":")[0] not in _UNPARSED:
        return -1
    place = trimmed.rfind('\n  File "') + 1
    return place if place or trimmed.startswith('  File "') else last


def _text(fields: dict[str, object], name: str) -> str:
    """A text that may be null. Half a surrogate pair, which JSON can hold, becomes `?`."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongAnswer(f"answered with {name} {_short(value)}")
    return value.encode("utf-8", "replace").decode()


def _short(value: object) -> str:
    return ascii(value)[:40] if isinstance(value, str | int | None) else type(value).__name__
