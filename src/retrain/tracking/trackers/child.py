"""The process of one tracker: reads calls, makes them, answers each with what went wrong.

Of its own, so that nothing a tracker does, be it hanging, printing, drawing random numbers, or
waiting for a network when Python exits, can touch the run. What it prints goes to a log.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
from typing import Any, BinaryIO, TextIO

from retrain.importing import import_object
from retrain.tracking.trackers.base import Call, Spec, Tracker

_NICENESS = 5
"""The run's own work comes first."""


def main() -> None:
    calls = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    spec: Spec = pickle.load(calls)
    try:
        tracker = _make(spec)
        where = tracker.start(spec.run)
    except Exception as error:
        _answer(answers, error=_said(error))
        return
    _answer(answers, where=where)
    _serve(tracker, calls, answers, spec.finish_timeout_s)


def _make(spec: Spec) -> Tracker:
    made: Any = import_object(spec.path, "tracker")
    tracker: Tracker = made(**spec.params)
    return tracker


def _serve(tracker: Tracker, calls: BinaryIO, answers: TextIO, finish_timeout_s: float) -> None:
    """Until the tracker is finished; where the run's process has died, that is now."""
    while True:
        try:
            call: Call = pickle.load(calls)
        except (EOFError, pickle.UnpicklingError):
            _end_soon(finish_timeout_s)
            tracker.finish("interrupted")
            return
        try:
            getattr(tracker, call.method)(*call.arguments)
        except Exception as error:
            _answer(answers, error=_said(error))
        else:
            _answer(answers)
        if call.method == "finish":
            return


def _end_soon(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _answer(answers: TextIO, *, where: str | None = None, error: str | None = None) -> None:
    answers.write(json.dumps({"where": where, "error": error}) + "\n")
    answers.flush()


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()
