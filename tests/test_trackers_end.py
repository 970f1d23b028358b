"""How the process of a tracker ends, late or with the run's process; nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from recorder import Recorder
from retrain.tracking.trackers import RunInfo, Trackers
from retrain.tracking.trackers.base import GRACE_S, Status
from retrain.tracking.trackers.guard import QUEUE_SIZE, GuardedTracker
from test_trackers_guard import guarded, recorded, use


def gone(pid: int, within_s: float) -> bool:
    """Whether the process ends within the time; a zombie, which nobody may wait for, has."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("at", ["start", "log_metrics", "finish"])
def test_one_that_hangs_is_not_waited_for(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = guarded(tmp_path, "hangs", at)
    started = time.monotonic()
    use(tracker, tmp_path, calls=QUEUE_SIZE + 50, timeout_s=6.0)
    assert time.monotonic() - started < 15.0 + GRACE_S
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "tracker python was not done after 60 s" in said, "the time that all of them had"
    assert "did not start" not in said
    process = tracker._process
    assert process is not None and process.returncode == (-9 if at == "finish" else 0)
    if at != "finish":
        assert tracker.dropped >= 49 and "tracker python is too slow" in said
    if at == "log_metrics":
        told = recorded(tmp_path / "calls")
        assert [call[0] for call in told] == ["start", "log_metrics", "finish"]
        assert told[-1] == ["finish", "completed"]


def test_late_ones_are_ended_together(tmp_path: Path) -> None:
    late = [guarded(tmp_path, "hangs", "finish") for _ in range(3)]
    trackers = Trackers(late, finish_timeout_s=0.1)
    trackers.start(RunInfo("r", tmp_path, {}), lambda where: None)
    time.sleep(4.0)
    started = time.monotonic()
    trackers.finish("completed")
    assert time.monotonic() - started < GRACE_S + 4.0


@pytest.mark.parametrize("method", ["log_metrics", "finish"])
def test_nothing_that_it_started_outlives_it(method: str, tmp_path: Path) -> None:
    path = "test_trackers_end:Parent"
    tracker = GuardedTracker("python", path, {"path": str(tmp_path)}, finish_timeout_s=20.0)
    tracker.start(RunInfo("r", tmp_path, {}), lambda where: None)
    if method == "log_metrics":
        tracker.call("log_metrics", 0, {})
    tracker.finish("completed")
    tracker.join(20.0)
    tracker.end()
    process = tracker._process
    assert process is not None and process.returncode == (7 if method == "log_metrics" else 0)
    assert gone(int((tmp_path / "pid").read_text()), 5.0)


class Parent(Recorder):
    """Starts a process that does not end with it; dies at metrics."""

    def start(self, run: RunInfo) -> str:
        started = subprocess.Popen(["sleep", "300"])
        (self._path / "pid").write_text(str(started.pid))
        return "here"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        os._exit(7)

    def finish(self, status: Status) -> None:
        pass


@pytest.mark.parametrize("at", ["start", "log_metrics"])
def test_a_run_that_dies_while_a_tracker_hangs_leaves_no_process(at: str, tmp_path: Path) -> None:
    pid = dies_after(tmp_path, 1 if at == "start" else 2, f"'hangs', {at!r}", finish_timeout_s=1.0)
    assert gone(pid, 1.0 + 1.0 + GRACE_S + 5.0)
    told = [call[0] for call in recorded(tmp_path / "calls")]
    assert told == (["start"] if at == "start" else ["start", "log_metrics", "finish"])


def test_a_run_that_dies_leaves_no_process_and_is_interrupted(tmp_path: Path) -> None:
    pid = dies_after(tmp_path, 2)
    assert gone(pid, 30.0)
    assert recorded(tmp_path / "calls")[-1] == ["finish", "interrupted"]


def dies_after(
    tmp_path: Path, calls: int, trouble: str = "", finish_timeout_s: float = 60.0
) -> int:
    """The process of a tracker whose run's process died once so many calls were made."""
    code = (
        "import os, time; from pathlib import Path; from test_trackers_end import *\n"
        f"here = Path({str(tmp_path)!r}); tracker = guarded(here, {trouble})\n"
        f"tracker._finish_timeout_s = {finish_timeout_s}\n"
        "tracker.start(RunInfo('r', here, {}), lambda where: None)\n"
        "tracker.call('log_metrics', 1, {})\n"
        f"while not (here / 'calls').exists() or len(recorded(here / 'calls')) < {calls}:\n"
        "    time.sleep(0.05)\n"
        "print(tracker._process.pid, flush=True); os._exit(9)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 9, done.stderr
    return int(done.stdout)
