"""What it gains to sample while the learner works: steps per minute by `max_staleness`.

    python benchmarks/overlap.py [--rounds 3] [--steps 10] [--tool-s 0.6]

Whole runs of GRPO on a tiny model with the in-process engine, in a world whose tool sleeps, at
staleness 0, 1 and 2 in turn. At staleness 0 the phases of a step follow each other: the engine
decodes, a rollout waits for its tools (the mean of its sleeps), the learner updates. T0, T1 and T2
are the medians of a step's time once the pipeline is full. Exits with 1 when T0 - T2 is less than
0.8 of the shorter one of tool wait and update: so much of it has to be hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

import retrain
from retrain.envs import Environment
from retrain.envs.base import Agent
from retrain.types import Message, MessageType, Rollout, Task

BOUND = 0.8
TURNS = 3
STALENESS = (0, 1, 2)


COMPLETE: list[float] = []
"""When the steps of the present run had all their rollouts."""


class SlowTool(Environment):
    """Turns with a tool between them that sleeps, up to a fifth longer or shorter by chance."""

    def __init__(self, tool_s: float) -> None:
        self._tool_s = tool_s

    async def run(self, task: Task, agent: Agent) -> Rollout:
        """An untrained model does not end its turns: each takes all its tokens."""
        rollout = agent.start(task)
        rollout.add_messages(*task.prompt)
        slept = 0.0
        for turn in range(TURNS):
            await agent.act(rollout)
            if turn < TURNS - 1:
                share = random.Random(f"{rollout.id}:{turn}").uniform(0.8, 1.2)
                await asyncio.sleep(self._tool_s * share)
                slept += self._tool_s * share
                rollout.add_messages(Message(f"The tool said {turn}.", MessageType.MESSAGE))
        rollout.metrics["seconds/tools"] = slept
        rollout.stop_reason = "environment"
        return rollout


class Digits:
    """Share of digits; notes when a step has all its rollouts."""

    def __call__(self, rollout: Rollout) -> float:
        return sum(c.isdigit() for c in rollout.completion) / max(len(rollout.completion), 1)

    def end_step(self, rollouts: Any) -> None:
        COMPLETE.append(time.perf_counter())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def corpus() -> list[str]:
    return ["What is 12+34? The tool said 1. 0 1 2 3 4 5 6 7 8 9"] * 30


def questions() -> Iterator[dict[str, Any]]:
    yield from ({"prompt": f"What is {a}+{b}?"} for a in range(10, 50) for b in range(10, 50))


def config(folder: str, staleness: int, args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"hidden_size": args.width, "intermediate_size": 3 * args.width}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "max_position_embeddings": 512}
    return {
        "experiment_name": "overlap",
        "output_dir": folder,
        "model": {
            "from_scratch": {
                "config": sizes,
                "tokenizer": {"vocab_size": 300, "corpus": "overlap:corpus"},
            }
        },
        "engine": {"num_threads": 1, "deterministic": False},
        "environment": {
            "type": "python",
            "path": "overlap:SlowTool",
            "params": {"tool_s": args.tool_s},
        },
        "prompt_source": {"type": "python", "function": "overlap:questions"},
        "reward_setup": {"rollout_reward_configs": {"digits": {"function": "overlap:Digits"}}},
        "algorithm": {
            "hyperparameters": {
                "steps": args.steps,
                "prompts_per_step": 8,
                "group_size": 8,
                "max_new_tokens": 24,
                "max_staleness": staleness,
                "correction": {"kind": "tis"},
            }
        },
        "monitors": {"truncated": None},
        "tracking": {"plots": False, "progress": "off", "rollouts": False},
        "logging_level": "error",
    }


def measure(staleness: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Of the steps while as many groups are under way as ever: their times, and their phases."""
    COMPLETE.clear()
    with tempfile.TemporaryDirectory() as folder:
        run = retrain.run_sync(config(folder, staleness, args)).path
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [after - before for before, after in itertools.pairwise(COMPLETE)]
    full = slice(staleness + 2, args.steps - 1 - staleness)
    return {
        "step": times[full],
        "tools": [row["seconds/tools/mean"] for row in rows[1:]][full],
        "update": [row["seconds/train"] for row in rows[:-1]][full],
        "wait": [row["seconds/wait"] for row in rows[1:]][full],
        "generate": [row["seconds/generate"] for row in rows[1:]][full],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tool-s", type=float, default=0.6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the learner")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[int, dict[str, list[float]]] = {s: {} for s in STALENESS}
    for _, staleness in itertools.product(range(args.rounds), STALENESS):
        for name, values in measure(staleness, args).items():
            found[staleness].setdefault(name, []).extend(values)
    middle = {s: {name: median(values) for name, values in found[s].items()} for s in STALENESS}
    for staleness, of in middle.items():
        phases = ", ".join(f"{name} {of[name]:.2f} s" for name in ("tools", "update", "wait"))
        print(f"T{staleness} {of['step']:.2f} s, {60 / of['step']:.1f} steps/min; {phases}")
    zero = middle[0]
    decode = zero["wait"] - zero["tools"]
    print(
        f"phases at staleness 0: decode {decode:.2f} s + tool wait {zero['tools']:.2f} s + update "
        f"{zero['update']:.2f} s = {zero['wait'] + zero['update']:.2f} s"
    )
    hidden = (zero["step"] - middle[2]["step"]) / min(zero["tools"], zero["update"])
    print(f"(T0 - T2) / min(tool wait, update) = {hidden:.2f}; at least {BOUND}")
    return 0 if hidden >= BOUND else 1


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    sys.modules["overlap"] = sys.modules["__main__"]
    sys.exit(main())
