"""A stage of SFT on a stream, scored and evaluated on the way, is killed and ends with its bits."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from killing import KillServer, left_behind
from runs import rl_config, sft_section
from test_sft import written

LINES = 6 + 4 + 3
"""Of metrics.jsonl: six steps, validation after 0, 2, 4 and 6, evaluation after 2, 4 and 6."""


def config(output_dir: Path, data: str) -> dict[str, Any]:
    return rl_config(
        output_dir,
        sft=sft_section(
            dataset=data,
            steps=6,
            batch_size=4,
            streaming=True,
            shuffle_buffer=7,  # of 17 traces: the last steps are in the second epoch
            validation=data,
            validation_every_steps=2,
        ),
        evaluation={
            "prompt_source": {"type": "python", "function": "runs:questions", "params": {"n": 3}},
            "every_steps": 2,
        },
        checkpoint={"every_steps": 3, "keep_best": {"metric": "validation/loss", "mode": "min"}},
        stages=[{"kind": "sft"}],
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_stage_ends_with_the_same_bits(number: int, tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl", 17)
    with KillServer(tmp_path, hash_seed=1) as server:
        assert server.run(config(tmp_path / "whole", data)) == 0, server.said()
        whole = left_behind(tmp_path / "whole" / "t-001")
        assert len(whole["metrics"]) == LINES
        moments = random.Random(number).sample(range(1, LINES - 3), 3)
        for lines in moments:
            given, run = config(tmp_path / str(lines), data), tmp_path / str(lines) / "t-001"
            watched = [str(run / "metrics.jsonl"), lines]
            code = server.run(given, after_lines=watched, after_s=0.01, signal=number)
            assert code == (-9 if number == signal.SIGKILL else 128 + number), server.said()
            assert server.run(given, "auto") == 0, server.said()
            left = left_behind(run)
            assert left["metrics"] == whole["metrics"] and left["rollouts"] == whole["rollouts"]
            same = [path for path in whole["tensors"] if path.startswith("sft/")]
            assert same and all(left["tensors"][p] == whole["tensors"][p] for p in same)
