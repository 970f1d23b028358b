"""Holds a real inference server against what docs/engines.md says of it, and writes down what came.

python scripts/verify_engine.py vllm --python PYTHON --log docs/verified/vllm_cpu.md -- ARGS...

PYTHON is the interpreter of an environment that has the server; ARGS are added to its command line.
A tiny model is trained by SFT first; then GRPO goes on from there with the server as engine, in
several ways. Exits with 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import retrain
from retrain.config import load_config
from retrain.engines import Completion, GenerateRequest, PolicyEngine, SamplingParams
from retrain.loops.engines import build_engine
from retrain.models import Policy, load_policy
from retrain.models.scores import selected_logprobs
from retrain.tracking.rollouts import read_rollouts
from retrain.tracking.run_dir import read_metrics
from retrain.types import NO_VERSION, UserError

DEMO = str(files("retrain") / "recipes" / "demo" / "demo.yaml")

MOST_GAP = 1e-3
"""Nats between the server's and the learner's log-probabilities, in float32."""

STEPS = 10

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
"""For a build for CPUs, which others leave alone."""


@dataclass
class Verification:
    """What is being verified, and the report so far."""

    server: str
    python: str
    args: list[str]
    directory: Path
    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def promise(self, kept: bool, line: str) -> None:
        self.say(f"- {'ok' if kept else 'BROKEN'}: {line}")
        if not kept:
            self.broken.append(line)

    def run(self, name: str, *overrides: str, engine: dict[str, Any] | None = None) -> Path:
        """GRPO from the checkpoint after SFT; the run directory."""
        retrain.run_sync(DEMO, overrides=[*self.overrides(name, engine), *overrides])
        return self.directory / f"{name}-latest"

    def overrides(self, name: str, engine: dict[str, Any] | None = None) -> list[str]:
        """What makes the demo's config one of GRPO with the server."""
        section = {
            "type": self.server,
            "python": self.python,
            "args": self.args,
            "env": {key: os.environ.get(key, value) for key, value in CPU.items()},
            **(engine or {}),
        }
        checkpoint = self.directory / "sft-001" / "checkpoints" / "sft"
        return [
            f"model={{name_or_path: {checkpoint}}}",
            f"engine={section}",
            "stages=[{kind: rl}]",
            f"experiment_name={name}",
            f"output_dir={self.directory}",
            f"algorithm.hyperparameters.steps={STEPS}",
            "tracking={progress: 'off', plots: false, transcripts: 0}",
        ]


def train(check: Verification, name: str, title: str, *overrides: str) -> None:
    """A run, and what every run has to keep."""
    check.say(f"\n## {title}\n")
    for override in overrides:
        check.say(f"    --set {override!r}")
    check.say("")
    started = time.perf_counter()
    path = check.run(name, *overrides)
    rows = read_metrics(path / "metrics.jsonl")
    check.say("| step | reward | probe gap | largest gap in training | update, s | generation, s |")
    check.say("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        check.say(
            f"| {row['step']} | {row['reward/mean']:.3f} | {row['engine/probe_gap']:.1e} "
            f"| {row.get('logprob_gap/max', 0.0):.1e} | {row['engine/update_s']:.2f} "
            f"| {row['seconds/generate']:.1f} |"
        )
    check.say("")
    check_run(check, path, rows)
    check.say(f"- {time.perf_counter() - started:.0f} s with the start of the server")


def check_run(check: Verification, path: Path, rows: list[dict[str, Any]]) -> None:
    gaps = [float(row["engine/probe_gap"]) for row in rows]
    check.promise(max(gaps) <= MOST_GAP, f"probe after every update: at most {max(gaps):.1e} nats")
    rewards = [float(row["reward/mean"]) for row in rows]
    before, after = statistics.fmean(rewards[:2]), statistics.fmean(rewards[-2:])
    check.promise(after > before + 0.05, f"reward rises: {before:.3f} to {after:.3f}")
    check_rollouts(check, path, rows)


def check_rollouts(check: Verification, path: Path, rows: list[dict[str, Any]]) -> None:
    """No rollout is lost, none is there twice, all its tokens have a version and a score."""
    count, mixed = 0, 0
    problems: list[str] = []
    for row in rows:
        rollouts = read_rollouts(path / "rollouts" / f"rl-{row['step']:06d}.jsonl.gz")
        ids = Counter(rollout.id for rollout in rollouts)
        problems += [f"{name} is there {n} times" for name, n in ids.items() if n > 1]
        problems += [f"{r.id} is masked: {r.error}" for r in rollouts if r.error is not None]
        count += len(ids)
        for rollout in rollouts:
            versions = {v for s in rollout.segments for v in s.versions if v != NO_VERSION}
            mixed += len(versions) > 1
    check.promise(
        not problems,
        f"{count} rollouts in {len(rows)} steps, none lost, none twice"
        + (f"; {problems[:3]}" if problems else ""),
    )
    check.say(f"- rollouts sampled under more than one version: {mixed}")


def overlap(check: Verification) -> None:
    """Rollouts go on while the learner works."""
    overrides = (
        "algorithm.hyperparameters.max_staleness=1",
        "algorithm.hyperparameters.correction={kind: tis}",
    )
    train(check, "overlap", "Overlap, max_staleness 1, full weights", *overrides)


def midway(check: Verification) -> None:
    """Weights change while requests are under way."""
    check.say("\n## Weights that change in mid-generation\n")
    config = load_config(DEMO, check.overrides("midway"))
    policy = load_policy(config.model)
    engine = build_engine(config, policy)
    mixed, requests, tokens, worst = asyncio.run(change_midway(check, engine, policy))
    check.promise(
        mixed > 0, f"requests with tokens of more than one version: {mixed} of {requests}"
    )
    check.promise(
        worst <= MOST_GAP,
        f"each of {tokens} tokens has the log-probability that the weights of its own version "
        f"give it after all that is before it: {worst:.1e} nats apart at most",
    )


async def change_midway(
    check: Verification, engine: PolicyEngine, policy: Policy
) -> tuple[int, int, int, float]:
    """(requests that saw more than one version, requests, tokens, largest gap in nats)."""
    versions: list[Any] = []
    asked: list[tuple[GenerateRequest, Completion]] = []
    torch.manual_seed(0)
    try:
        await engine.prepare()
        await engine.start(check.directory / "midway")
        for version in range(4):
            if version:
                with torch.no_grad():
                    for parameter in policy.model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
            versions.append(copy.deepcopy(policy.model))
            under_way = [
                GenerateRequest([5 + n] * 20, SamplingParams(200), seed=n) for n in range(24)
            ]
            tasks = [
                asyncio.create_task(asked_later(engine, request, 0.05 * n))
                for n, request in enumerate(under_way if version else [])
            ]
            await asyncio.sleep(0.2 * bool(version))
            await engine.update_weights(version)
            asked += zip(under_way, await asyncio.gather(*tasks), strict=False)
    finally:
        await engine.close()
    mixed = sum(len(set(got.versions)) > 1 for _, got in asked)
    gaps = [gap for request, got in asked for gap in own_gaps(versions, request, got)]
    return mixed, len(asked), len(gaps), max(gaps)


async def asked_later(engine: PolicyEngine, request: GenerateRequest, wait_s: float) -> Completion:
    """So that some are under way whenever the server is interrupted."""
    await asyncio.sleep(wait_s)
    return await engine.generate(request)


def own_gaps(versions: Sequence[Any], request: GenerateRequest, got: Completion) -> Iterator[float]:
    """Of each token: between its log-probability and that under the weights of its version."""
    ids = torch.tensor([[*request.prompt_ids, *got.token_ids]])
    mask = torch.arange(ids.shape[1]).unsqueeze(0) >= len(request.prompt_ids)
    for version in set(got.versions):
        with torch.no_grad():
            found = selected_logprobs(versions[version], ids, torch.tensor([ids.shape[1]]), mask)
        for place, own in enumerate(got.versions):
            if own == version:
                at = len(request.prompt_ids) + place
                yield abs(float(found[0, at]) - got.logprobs[place])


def trap(check: Verification) -> None:
    """A server that keeps its old output layer is found out."""
    check.say("\n## The tied-embedding trap\n")
    try:
        check.run("trap", "model.torch_dtype=float32", engine={"untie_embeddings": False})
    except UserError as error:
        check.say(f"The run stopped:\n\n    {error}\n")
        check.promise("does not serve version" in str(error), "caught by the probe")
    else:
        check.promise(False, "caught by the probe (this server may not have the trap)")


def crash(check: Verification) -> None:
    """The server is killed in the middle of a step."""
    check.say("\n## The server is killed in mid-step\n")
    killed: list[int] = []
    stop = threading.Event()

    def kill_once() -> None:
        log = check.directory / "crash-latest" / "metrics.jsonl"
        while not stop.wait(0.05):
            if log.exists() and len(read_metrics(log)) >= 2:
                time.sleep(0.3)
                for pid in server_processes(check):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                return

    thread = threading.Thread(target=kill_once, daemon=True)
    thread.start()
    try:
        path = check.run("crash", "algorithm.hyperparameters.steps=5")
    finally:
        stop.set()
        thread.join()
    rows = read_metrics(path / "metrics.jsonl")
    restarts = sum(float(row.get("engine/restarts") or 0) for row in rows)
    check.promise(bool(killed) and restarts == 1, f"processes killed: {len(killed)}; 1 restart")
    gaps = [float(row["engine/probe_gap"]) for row in rows]
    check.promise(max(gaps) <= MOST_GAP, f"probe: at most {max(gaps):.1e} nats")
    check_rollouts(check, path, rows)


def server_processes(check: Verification) -> Iterator[int]:
    """Processes whose command line names the server's module and this verification's directory."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if command[0] == check.python and any(str(check.directory) in c for c in command):
                yield int(entry.name)


def circumstances(check: Verification) -> Iterator[str]:
    listed = subprocess.run(
        [check.python, "-m", "pip", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = re.findall(r"^(?:vllm|sglang|torch|transformers)(?:-cpu)?==.*$", listed, re.MULTILINE)
    yield f"- the server's environment: {', '.join(named)}"
    yield f"- retrain {retrain.__version__}, Python {platform.python_version()}, "
    yield f"  {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


PARTS: dict[str, Callable[[Verification], None]] = {
    "full": lambda check: train(check, "full", "Full weights"),
    "lora": lambda check: train(
        check,
        "lora",
        "A LoRA adapter",
        "model.peft={r: 16, alpha: 32}",
        "algorithm.hyperparameters.learning_rate=2.0e-3",
        "algorithm.hyperparameters.optimizer=adamw",
    ),
    "overlap": overlap,
    "midway": midway,
    "crash": crash,
    "trap": trap,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("server", choices=["vllm", "sglang"])
    parser.add_argument("--python", required=True)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    own, _, args = " ".join(sys.argv[1:]).partition(" -- ")
    given = parser.parse_args(own.split())
    with tempfile.TemporaryDirectory() as directory:
        check = Verification(given.server, given.python, args.split(), Path(directory))
        check.say(f"# {given.server}, verified\n")
        check.say(
            f"`make test-{given.server}` wrote this page: the demo's model, after SFT, goes on"
        )
        check.say("by GRPO with a real server as engine, started and ended by the run.\n")
        for line in circumstances(check):
            check.say(line)
        retrain.run_sync(
            DEMO,
            overrides=[
                "stages=[{kind: sft}]",
                "experiment_name=sft",
                f"output_dir={directory}",
                "tracking={progress: 'off', plots: false}",
            ],
        )
        for part in given.parts:
            PARTS[part](check)
    check.say("")
    check.say(f"**{len(check.broken)} promises broken.**" if check.broken else "All promises kept.")
    if given.log is not None:
        given.log.parent.mkdir(parents=True, exist_ok=True)
        given.log.write_text("\n".join(check.lines) + "\n", encoding="utf-8")
    return 1 if check.broken else 0


if __name__ == "__main__":
    sys.exit(main())
