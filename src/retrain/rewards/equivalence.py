"""Mathematical equivalence, judged by math-verify in a process that can be killed."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from retrain.rewards.base import reward
from retrain.rewards.extract import Scope, accepted_answers, extract, judged_text
from retrain.rewards.text import check_scope
from retrain.types import InfrastructureError, Rollout, UserError

_WORKER_FILE = Path(__file__).with_name("math_worker.py")
_START_S = 120.0


class MathWorker:
    """One worker process, started on first use, killed and replaced when it does not answer.

    Requests are served one at a time; `equal` blocks, so call it in a thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def equal(self, answers: list[str], text: str, timeout_s: float) -> bool:
        """Whether the text's answer equals one of `answers`; False when judging it takes longer
        than `timeout_s` or breaks the worker, which is the text's doing.

        Raises:
            InfrastructureError: the worker cannot be started.
        """
        with self._lock:
            process = self._started()
            try:
                assert process.stdin is not None
                print(
                    json.dumps({"answers": answers, "text": text}),
                    file=process.stdin,
                    flush=True,
                )
                reply = self._lines.get(timeout=timeout_s)
            except (queue.Empty, OSError):
                reply = ""
            if not reply:
                self._kill()
                return False
            return json.loads(reply)["equal"] is True

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER_FILE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise InfrastructureError(f"cannot start a process for math-verify: {error}") from error
        self._process = process
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_START_S)
        except queue.Empty:
            ready = ""
        if not ready:
            self._kill()
            raise InfrastructureError("the math-verify worker process did not start")
        return process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()


def _forward(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    """Copy the worker's replies to the queue; an empty line says that it ended."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put("")


_worker = MathWorker()
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="math-verify")
"""Its own thread, so that waiting calls never fill the event loop's shared pool."""
atexit.register(_worker.close)


def _check(params: Mapping[str, Any]) -> None:
    check_scope(params)
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "the reward math_equivalence needs the package math-verify",
            "install it: pip install 'retrain[math]'",
        )
    if not params["timeout_s"] > 0:
        raise ValueError(f"timeout_s is {params['timeout_s']!r}, expected seconds above 0")


@reward(kind="rollout", range=(0.0, 1.0), check=_check)
async def math_equivalence(
    rollout: Rollout,
    *,
    tag: str | None = None,
    boxed: bool = False,
    timeout_s: float = 5.0,
    scope: Scope = "last",
) -> float:
    r"""1 when the text's answer is mathematically equal to one of the task's, else 0.

    Range [0, 1]. math-verify finds the answer (the last box, formula or number) in the text, or
    in the last `<tag>`, or with `boxed` in the last `\boxed{}` only, and compares it with sympy.
    0 when nothing is found or the comparison takes longer than `timeout_s`. Raises ValueError
    when the task has no answer. Needs the extra `retrain[math]`.

    Example: `math_equivalence: {params: {boxed: true, timeout_s: 5}}`
    """
    answers = [str(answer) for answer in accepted_answers(rollout)]
    found = extract(judged_text(rollout, scope), tag, None, boxed)
    if found is None or not found.strip():
        return 0.0
    text = f"\\boxed{{{found}}}" if boxed else found
    loop = asyncio.get_running_loop()
    return float(await loop.run_in_executor(_thread, _worker.equal, answers, text, timeout_s))
