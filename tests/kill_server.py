"""Runs that are killed: a process that has everything imported forks one child a run.

Reads jobs, a line of JSON each, from standard input; answers each with the child's exit code, -9
when it was killed. A job has `config` and `resume`, for `retrain.run_sync`, and one or none of

- `after_s`: seconds until the child gets `signal` (SIGKILL, where the job names none), counted, if
  there is `after_lines` (a file and a number), from when that file has so many lines;
- `at`: number of the step on the disk at which the child kills itself, counted over all calls of
  `FAILPOINTS`; `torn` cuts what it was about to write in half first;
- `count`: a file that gets the number of such steps and their names.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported once, not in each child
import transformers.models.auto.modeling_auto
import transformers.models.qwen3.modeling_qwen3
import transformers.tokenization_utils_tokenizers  # noqa: F401

import retrain
import retrain.loops.run
from retrain.loops.interrupt import Interrupted
from retrain.models import save
from retrain.tracking import durable
from retrain.types import UserError

FAILPOINTS: list[tuple[Any, str]] = [
    (save, "save_file"),
    (durable, "write"),
    (durable, "sync"),
    (durable, "rename"),
    (durable, "remove"),
]


def plant(at: int | None, torn: bool, names: list[str]) -> None:
    """Have the child die at its `at`-th step on the disk."""

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            if at is None or len(names) - 1 != at:
                return function(*args, **kwargs)
            if torn and name in ("save_file", "write"):
                function(*args, **kwargs)
                path = next(Path(a) for a in args if isinstance(a, str | Path))
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for module, name in FAILPOINTS:
        setattr(module, name, watched(name, getattr(module, name)))


def child(job: dict[str, Any]) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    names: list[str] = []
    if "at" in job or "count" in job:
        plant(job.get("at"), bool(job.get("torn")), names)
    try:
        retrain.run_sync(job["config"], resume=job["resume"])
    except Interrupted as interrupted:
        return interrupted.exit_code
    except UserError as error:
        print(error, flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    if "count" in job:
        Path(job["count"]).write_text(json.dumps(names))
    return 0


def wait_for(pid: int, condition: Callable[[], bool]) -> None:
    """Until it holds, or the child has ended."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if condition():
            return
        time.sleep(0.002)


def has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_text().count("\n") >= count


def serve(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = child(job)
        finally:
            os._exit(code)
    if "after_lines" in job:
        path, count = job["after_lines"]
        wait_for(pid, lambda: has_lines(Path(path), count))
    if "after_s" in job:
        over = time.monotonic() + job["after_s"]
        wait_for(pid, lambda: time.monotonic() >= over)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, job.get("signal", signal.SIGKILL))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(serve(json.loads(line)), flush=True)
