"""Ctrl-C in the middle of a run: saved, exit code 130, and nobody left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from conftest import LISTEN_TO_CTRL_C
from retrain.envs import Environment
from retrain.tracking.checkpoints import read_checkpoint
from retrain.types import Message, Task
from runs import hyperparameters, rl_config, sft_section
from sandboxes import descendants, is_running

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


MAIN = "from retrain.cli import main; main()"


def start(config: dict[str, Any], tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "config.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return subprocess.Popen(
        [sys.executable, "-c", f"{LISTEN_TO_CTRL_C}{MAIN}", "run", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def session_members(leader: int) -> list[str]:
    """Living processes of a session, by name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) == leader and state != "Z":
            found.append(name)
    return found


def wait_for(condition: Any, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_ctrl_c(stage: str, tmp_path: Path) -> None:
    config = rl_config(
        tmp_path / "runs",
        logging_level="error",
        sft=sft_section(steps=10_000 if stage == "sft" else 20),
        algorithm={"hyperparameters": hyperparameters(steps=10_000, max_new_tokens=12)},
        stages=[{"kind": "sft"}, {"kind": "rl"}],
    )
    process = start(config, tmp_path)
    try:
        metrics = tmp_path / "runs" / "t-001" / "metrics.jsonl"
        rows = 5 if stage == "sft" else 30
        assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= rows, 60)
        workers = descendants(process.pid)
        if stage == "rl":
            assert workers, "the sandbox has processes of its own"
        os.kill(process.pid, signal.SIGINT)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=20)
        assert time.monotonic() - started < 10
        assert process.returncode == 130, stderr
        said = re.fullmatch(
            r"stopping; once more to leave at once without saving\n"
            r"interrupted; saved: (.*)\n  Go on with the same command and --resume\.\n",
            stderr,
        )
        assert said, stderr
        assert read_checkpoint(Path(said[1])).damage() is None
        assert "run directory: " in stdout
        assert wait_for(lambda: not session_members(process.pid), 5), session_members(process.pid)
        assert wait_for(lambda: not any(map(is_running, workers)), 5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """The world hangs, and does not let itself be cancelled either."""
    config = rl_config(
        tmp_path / "runs",
        environment={"type": "python", "path": "test_loops_interrupt:Stubborn"},
    )
    process = start(config, tmp_path)
    try:
        metrics = tmp_path / "runs" / "t-001" / "run.json"
        assert wait_for(metrics.exists, 60)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        process.wait(5)
        assert process.returncode == 143
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


class Stubborn(Environment):
    async def reset(self, task: Task) -> list[Message]:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
