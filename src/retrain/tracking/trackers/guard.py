"""Keeps a tracker away from the run: nothing that it does stops, slows or changes what trains."""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from retrain.tracking.trackers.base import GRACE_S, Call, RunInfo, Spec, Status

logger = logging.getLogger(__name__)

QUEUE_SIZE = 256
"""Calls that wait for a slow tracker; further ones are dropped, and counted."""

MOST_ROLLOUTS = 8
"""Of those, calls with rollouts, which may be large."""

MOST_FAILURES = 5
"""In a row; then the tracker is switched off."""

_CAUSE_CHARS = 300


class GuardedTracker:
    """A tracker in a process of its own, and the thread that feeds it from a bounded queue.

    No method raises, and only `join` and `end` wait. `announce` is called, from the thread, with
    where the tracker says that the run can be looked at.
    """

    def __init__(
        self,
        name: str,
        path: str,
        params: dict[str, Any],
        *,
        finish_timeout_s: float,
    ) -> None:
        self.name = name
        self.dropped = 0
        self._path, self._params = path, params
        self._finish_timeout_s = finish_timeout_s
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._room = threading.Semaphore(MOST_ROLLOUTS)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._off = self._late = False
        self._failed = self._in_a_row = 0

    def start(self, run: RunInfo, announce: Callable[[str], None]) -> None:
        """Start the process, without waiting for the tracker in it."""
        log = run.directory / "trackers" / f"{self.name}.log"
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as written:
                self._process = _start_process(written.fileno())
        except OSError as error:
            self._switch_off(f"cannot be started: {error}")
            return
        spec = Spec(self._path, self._params, run, os.getpid(), self._finish_timeout_s)
        self._thread = threading.Thread(
            target=self._serve, args=(spec, announce), name=f"tracker-{self.name}", daemon=True
        )
        self._thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        """Have the tracker's method called, when its turn comes; arguments must not change."""
        if self._off or self._thread is None:
            return
        if method != "log_rollouts" or self._room.acquire(blocking=False):
            try:
                self._calls.put_nowait(Call(method, arguments))
                return
            except queue.Full:
                if method == "log_rollouts":
                    self._room.release()
        self.dropped += 1
        if self.dropped == 1:
            logger.warning(
                "tracker %s is too slow: %d calls wait, others are dropped; the run goes on",
                self.name,
                self._calls.qsize(),
            )

    def finish(self, status: Status) -> None:
        """Have it finish once what waits is done; `join` waits for that."""
        if self._off or self._thread is None:
            return
        with suppress(queue.Empty):
            while self._calls.full():
                self._take(block=False)
                self.dropped += 1
        self.call("finish", status)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of its process. After `timeout_s`, what waits is dropped, and SIGTERM
        breaks off the call that it is in, so that only `finish` is left; `end` waits for that."""
        if self._thread is None or self._process is None or self._ends(timeout_s):
            return
        if not self._off:
            logger.warning(
                "tracker %s was not done after %g s; what it had not sent is lost to it",
                self.name,
                self._finish_timeout_s,
            )
        self._late = True
        self._drop_all_but_finish()
        with suppress(OSError):
            self._process.terminate()

    def end(self, timeout_s: float = GRACE_S) -> None:
        """After `join`: wait `timeout_s` more where it is late, then kill what is left of it and of
        all that it has started."""
        if self._thread is None or self._process is None:
            return
        self._ends(timeout_s if self._late else 0.0)
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._thread.join(1.0)
        if self.dropped or self._failed:
            logger.warning(
                "tracker %s: %d calls dropped, %d failed", self.name, self.dropped, self._failed
            )

    def _ends(self, timeout_s: float) -> bool:
        """Whether its process ends within the time."""
        assert self._thread is not None and self._process is not None
        deadline = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(deadline - time.monotonic(), 0.1))
        return self._process.returncode is not None

    def _take(self, *, block: bool) -> Call:
        """
        Raises:
            queue.Empty: nothing waits, and `block` is false.
        """
        call = self._calls.get(block)
        if call.method == "log_rollouts":
            self._room.release()
        return call

    def _drop_all_but_finish(self) -> None:
        with suppress(queue.Empty):
            while True:
                call = self._take(block=False)
                if call.method == "finish":  # the last that was put
                    self._calls.put_nowait(call)
                    return
                self.dropped += 1

    def _serve(self, spec: Spec, announce: Callable[[str], None]) -> None:
        try:
            where = self._exchange(spec)
            if where is None:
                return
            announce(f"{self.name}: {where}")
            while not self._off:
                call = self._take(block=True)
                self._exchange(call)
                if call.method == "finish":
                    return
        except Exception as error:  # its process ended, or an argument cannot be sent
            if not self._late:
                self._switch_off(f"{type(error).__name__}: {error}")

    def _exchange(self, message: Spec | Call) -> str | None:
        """Send it, and wait for the answer: what `start` returned.

        Raises:
            OSError, EOFError: the process has ended.
        """
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(pickle.dumps(message))
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("its process has ended")
        answer = json.loads(line)
        cause = answer["error"]
        if cause is None:
            self._in_a_row = 0
            where: str | None = answer["where"]
            return where
        self._count(cause[:_CAUSE_CHARS], fatal=isinstance(message, Spec))
        return None

    def _count(self, cause: str, *, fatal: bool) -> None:
        self._failed += 1
        self._in_a_row += 1
        if self._late:
            return
        if fatal:
            self._switch_off(f"did not start: {cause}")
        elif self._in_a_row == MOST_FAILURES:
            self._switch_off(f"failed {MOST_FAILURES} times in a row: {cause}")
        elif self._failed == 1:
            logger.warning("tracker %s failed: %s; the run goes on", self.name, cause)

    def _switch_off(self, why: str) -> None:
        self._off = True
        logger.warning("tracker %s %s; the run goes on without it", self.name, why)
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def _start_process(log: int) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in a terminal does not reach it, and it can be ended with all
    that it has started. It looks for modules where this process does."""
    places = [str(Path(place or ".").resolve()) for place in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "retrain.tracking.trackers.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )
