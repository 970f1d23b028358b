"""`retrain` and TRL's `GRPOTrainer(tools=[...])` on the same tasks, in turn, in one command.

    pip install -c constraints.txt trl==1.16.0 jmespath datasets
    python benchmarks/vs_trl.py [--workloads a b c] [--steps 10] [--threads 2] [--workdir DIR]

Workloads: (a) one tool, prompts of about 244 tokens; (b) five tools, about 1,050 tokens; (c) as
(a), each tool call taking 50 ms. A tiny Qwen3 (d=96, 3 layers, 403k parameters, a BPE of 1,024
entries) is made first and taught by a teacher that is often wrong until it succeeds in about four
of ten attempts; `--workdir` keeps it for the next time. Both systems then load the same directory
and do GRPO on the same tasks in the same order with the same tool functions and the same reward:
16 prompts x 8, one update a batch, AdamW at 3e-4, T=1, fp32, at most two turns and
80 new tokens (a turn in retrain; in TRL a rollout, tool results included). That both see the same
token ids is checked. A group without variance teaches nothing: retrain leaves it out, TRL trains
on it with weight zero. (At 1e-3 Adam's first updates undo in both systems what the model copies
digits with; on workload b neither recovers.)

Each run is a process of its own, started from this small one, and tells its own peak of resident
memory. Speed is that of generation and update together, over the steps after the first
`--skip`: the median step, since a shared machine makes single steps slow. Loading, logging and
the last checkpoint are not timed. CPU seconds are those of all threads: where other programs take
processors away, they say more than the clock, if OMP_WAIT_POLICY=PASSIVE keeps idle threads from
spinning.

Each system in its best supported mode, as measured: TRL with `generate` (transformers' continuous
batching is slower on a CPU), without a reference model (beta 0) and without gradient
checkpointing, in micro-batches of 16 rollouts, which cost no more time than one of 128 and take
well under half its memory (`--trl-set per_device_train_batch_size=128 --trl-set
gradient_accumulation_steps=1` for the latter). retrain with one thread for decoding, as tiny
models want, and without its deterministic mode, which TRL does not have; both without per-step
files of rollouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _vs_trl_workers import GROUP, PROMPTS, Job, Result, Step, memory_mb

WORKERS = Path(__file__).with_name("_vs_trl_workers.py")
ROLLOUTS = PROMPTS * GROUP
TITLES = {"a": "one tool", "b": "five tools", "c": "one tool that takes 50 ms"}
TARGETS = {"a": (5.0, 0.4), "b": (8.0, 0.25), "c": (8.0, None)}
"""By workload: rollouts/s at least, peak memory at most, relative to TRL."""


def start(job: Job) -> Result | None:
    """Run a job in a process of its own; its result, which `make` has none of."""
    asked = Path(job.directory) / f"{job.kind}-{job.workload}.json"
    answer = asked.with_suffix(".result.json")
    asked.write_text(json.dumps(dataclasses.asdict(job)))
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    log = asked.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, WORKERS, asked, answer],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(f"{job.kind} failed on workload {job.workload}:\n{log.read_text()[-3000:]}")
    if not answer.exists():
        return None
    read = json.loads(answer.read_text())
    return Result(**{**read, "steps": [Step(**step) for step in read["steps"]]})


def seconds(result: Result, skip: int) -> tuple[float, float, float]:
    """Of the median step: all of it, generation, update."""
    kept = result.steps[skip:] or result.steps
    return (
        median(step.generate_s + step.train_s for step in kept),
        median(step.generate_s for step in kept),
        median(step.train_s for step in kept),
    )


def show(name: str, result: Result, skip: int) -> None:
    total, generate, train = seconds(result, skip)
    curve = " ".join(f"{step.reward:.2f}" for step in result.steps)
    print(
        f"  {name:8s} {ROLLOUTS / total:7.1f} rollouts/s   {total:6.2f} s a step: "
        f"generate {generate:6.2f}, train {train:6.2f}   CPU {result.cpu_s:6.2f} s   "
        f"peak {result.peak_mb:6.0f} MB ({result.loaded_mb:.0f} before the first step)\n"
        f"  {'':8s} reward {curve}"
    )


def compare(workload: str, ours: Result, theirs: Result, skip: int) -> None:
    speed, memory = TARGETS[workload]
    (total, *phases), (their_total, *their_phases) = seconds(ours, skip), seconds(theirs, skip)
    ratios = [their / own for own, their in zip(phases, their_phases, strict=True)]
    wanted = "" if memory is None else f" (target {memory:g})"
    print(
        f"  ratio    {their_total / total:7.2f} x rollouts/s (target {speed:g}); "
        f"generate {ratios[0]:.2f} x, train {ratios[1]:.2f} x, CPU "
        f"{theirs.cpu_s / ours.cpu_s:.2f} x; "
        f"memory {ours.peak_mb / theirs.peak_mb:.2f} x{wanted}; reward over all steps "
        f"{mean_reward(ours):.3f} against {mean_reward(theirs):.3f}"
    )
    if ours.prompts != theirs.prompts:
        print("  WARNING: the two systems did not see the same prompts, token for token")
    if any(step.reward in (0.0, 1.0) for step in ours.steps + theirs.steps):
        print("  WARNING: a step without any variance trained nothing: the times do not compare")


def mean_reward(result: Result) -> float:
    return sum(step.reward for step in result.steps) / len(result.steps)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--systems", nargs="+", choices=["trl", "retrain"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--workdir", type=Path, help="keeps the models; a temporary one by default")
    for system, what in (("retrain", "a config key"), ("trl", "an argument of GRPOConfig")):
        parser.add_argument(
            f"--{system}-set", action="append", default=[], metavar="KEY=VALUE", help=what
        )
    return parser.parse_args()


def parsed(settings: list[str]) -> dict[str, Any]:
    """KEY=VALUE, the value as JSON where it is some."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def benchmark(options: argparse.Namespace, workdir: Path) -> None:
    models, runs = workdir / "models", workdir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    settings = {"retrain": parsed(options.retrain_set), "trl": parsed(options.trl_set)}
    base = Job(
        kind="make",
        workload="a",
        model=str(models),
        directory=str(runs),
        steps=options.steps,
        threads=options.threads,
        seed=0,
        learning_rate=options.learning_rate,
    )
    if not (models / "b").exists():
        print("making the model ...", flush=True)
        start(base)
    base = dataclasses.replace(base, seed=options.seed, dtype=options.dtype)
    for workload in options.workloads:
        print(f"\n({workload}) {TITLES[workload]}", flush=True)
        results: dict[str, Result] = {}
        for system in options.systems or ("trl", "retrain"):
            model = str(models / ("b" if workload == "b" else "a"))
            job = dataclasses.replace(
                base, kind=system, workload=workload, model=model, settings=settings[system]
            )
            result = start(job)
            assert result is not None
            if not results:
                print(f"  prompts of {result.prompt_tokens:.0f} tokens")
            results[system] = result
            show(system, result, options.skip)
            sys.stdout.flush()
        if len(results) == 2:
            compare(workload, results["retrain"], results["trl"], options.skip)


def main() -> None:
    options = arguments()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"{options.threads} threads, {options.dtype}, {ROLLOUTS} rollouts a step; load average "
        f"{os.getloadavg()[0]:.1f}; this process has {memory_mb('VmRSS'):.0f} MB"
    )
    if options.workdir is not None:
        benchmark(options, options.workdir.resolve())
        return
    with tempfile.TemporaryDirectory() as directory:
        benchmark(options, Path(directory))


if __name__ == "__main__":
    main()
