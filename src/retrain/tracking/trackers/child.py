"""The process of one tracker: reads calls, makes them, answers each with what went wrong.

Of its own, so that nothing a tracker does, be it hanging, printing, drawing random numbers, or
waiting for a network when Python exits, can touch the run. What it prints goes to a log. SIGTERM
breaks off the call that it is in, unless that is `finish`. It does not outlive the run's process.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any, BinaryIO, TextIO

from retrain.importing import import_object
from retrain.tracking.trackers.base import GRACE_S, Call, Spec, Tracker

_NICENESS = 5
"""The run's own work comes first."""

_POLL_S = 1.0
"""Between two looks at whether the run's process is alive."""


class _BrokenOff(BaseException):
    """Of a call; no Exception, which a tracker may catch."""


class _Breakable:
    """What is done while it is entered, SIGTERM breaks off; elsewhere SIGTERM does nothing."""

    def __init__(self) -> None:
        self._entered = False
        signal.signal(signal.SIGTERM, self._heard)

    def __enter__(self) -> None:
        self._entered = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self._entered:
            self._entered = False
            raise _BrokenOff("it took too long")


def main() -> None:
    breakable = _Breakable()
    calls = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    spec: Spec = pickle.load(calls)
    _in_background(_end_with, spec.run_pid, spec.finish_timeout_s)
    try:
        with breakable:
            tracker = _make(spec)
            where = tracker.start(spec.run)
    except (Exception, _BrokenOff) as error:
        _answer(answers, error=_said(error))
        return
    _answer(answers, where=where)
    _serve(tracker, calls, answers, breakable, spec.finish_timeout_s)


def _make(spec: Spec) -> Tracker:
    made: Any = import_object(spec.path, "tracker")
    tracker: Tracker = made(**spec.params)
    return tracker


def _serve(
    tracker: Tracker,
    calls: BinaryIO,
    answers: TextIO,
    breakable: _Breakable,
    finish_timeout_s: float,
) -> None:
    """Until the tracker is finished; where no more calls come, that is now."""
    while True:
        try:
            call: Call = pickle.load(calls)
        except (EOFError, pickle.UnpicklingError):
            _in_background(_end_after, finish_timeout_s)
            tracker.finish("interrupted")
            return
        try:
            with nullcontext() if call.method == "finish" else breakable:
                getattr(tracker, call.method)(*call.arguments)
        except (Exception, _BrokenOff) as error:
            _answer(answers, error=_said(error))
        else:
            _answer(answers)
        if call.method == "finish":
            return


def _in_background(work: Callable[..., None], *arguments: float) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _end_with(pid: int, finish_timeout_s: float) -> None:
    """Wait for the end of the run's process, which is not read from `calls` during a call."""
    while os.getppid() == pid:
        time.sleep(_POLL_S)
    _end_after(finish_timeout_s)


def _end_after(seconds: float) -> None:
    """End this process and all that it has started, unless it ends before."""
    time.sleep(seconds)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def _answer(answers: TextIO, *, where: str | None = None, error: str | None = None) -> None:
    with suppress(BrokenPipeError):  # the run's process is gone
        answers.write(json.dumps({"where": where, "error": error}) + "\n")
        answers.flush()


def _said(error: BaseException) -> str:
    name = type(error).__name__.lstrip("_")
    text = " ".join(str(error).split())
    return f"{name}: {text}" if text else name


if __name__ == "__main__":
    main()
