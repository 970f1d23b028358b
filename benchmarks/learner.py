"""What one update of `TorchLearner` costs: tokens per second and peak memory.

    python benchmarks/learner.py [--threads N] [--repeats 3] [--only SHAPE]

An update is `forward_backward` of PPO's clipped loss and `optim_step` (AdamW), on a tiny Qwen3
made here (d=96, 3 layers) and samples of random tokens. It runs packed (`share_prefixes=True`) and
unpacked; over vocabularies also as a naive one, which keeps the logits of the whole padded batch.
Tokens per second count the samples' tokens as given, so what is shared counts for each; "run" is
what really went through the model, padding included; "ratio" is to unpacked.

Every line is a fresh process, forked from one that has done nothing but imports. In it a small
update proves the packing and makes the optimizer's state, a full one warms up, and of the rest
comes the median. Where "s" is far above "cpu s" over the threads, the machine was busy and the
line's speed and ratios mean little; threads that wait for each other then use up CPU time too.
Peak memory is what full updates add to what was resident before. On a CUDA device the model is in
bf16 and the memory that of torch's allocator. Exits with 1 when the updates of a case disagree
about the gradient's norm.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import sys
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

    from retrain.types import Sample

Mode = Literal["unpacked", "packed", "naive"]
Update = Callable[[list["Sample"]], float]
"""One update; returns the gradient's norm."""

IMPORTS = ["transformers.models.qwen3.modeling_qwen3", "retrain.algorithms", "retrain.learner"]
NAIVE_COPIES = 4
"""Tensors of [B, T, V] alive at once in a naive update: logits, their log-softmax, and the
gradient of each."""


@dataclass(frozen=True)
class Case:
    """`groups` prompts, each with `size` responses; lengths in tokens."""

    prompt: int
    common: int
    """How much of the prompt all groups share."""
    response: int
    """Mean."""
    groups: int
    size: int
    vocab: int = 1024
    spread: float = 0.2
    """Of the lengths of responses, to both sides, as a share of the mean."""

    @property
    def shape(self) -> str:
        ragged = "" if self.spread == 0.2 else f"~{self.spread}"
        return f"{self.prompt}/{self.common}+{self.response}{ragged} {self.groups}x{self.size}"


@dataclass(frozen=True)
class Measured:
    device: str
    given: int
    """Tokens of the samples."""
    logits_mb: float
    """What [B, T, V] takes."""
    before_mb: float
    run: int = 0
    """Tokens that went through the decoder, padding included."""
    added_mb: float = 0.0
    """Peak over `before_mb`."""
    seconds: float = 0.0
    """Of the median update; 0 where a naive update does not fit in memory."""
    cpu_seconds: float = 0.0
    grad_norm: float = 0.0


LENGTHS = [
    Case(244, 200, 35, groups=16, size=8),
    Case(1050, 1000, 35, groups=4, size=8),
    Case(512, 0, 128, groups=4, size=8),
    Case(64, 0, 512, groups=4, size=8),
]
SIZES = [Case(512, 0, 128, groups=32 // size, size=size) for size in (4, 8, 16)]
RAGGED = [Case(8, 0, response, groups=16, size=1, spread=0.9) for response in (64, 256, 512)]
VOCABULARIES = [Case(64, 0, 35, groups=2, size=8, vocab=v) for v in (1024, 32_000, 151_936)]
SECTIONS: list[tuple[str, list[Case], list[Mode]]] = [
    ("Prompt and response length", LENGTHS, ["unpacked", "packed"]),
    ("Group size", SIZES, ["unpacked", "packed"]),
    ("Traces of unlike lengths, as in SFT", RAGGED, ["unpacked", "packed"]),
    ("Vocabulary", VOCABULARIES, ["unpacked", "packed", "naive"]),
]


def make_model(vocab: int) -> Qwen3ForCausalLM:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=96, intermediate_size=288, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    return model  # type: ignore[no-any-return]


def make_samples(case: Case) -> list[Sample]:
    """Random tokens. The middle fifth of a response does not train, as a tool's output."""
    from retrain.types import Sample

    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return rng.choices(range(case.vocab), k=count)

    samples = []
    common = words(case.common)
    for group in range(case.groups):
        prompt = common + words(case.prompt - case.common)
        for member in range(case.size):
            count = round(case.response * rng.uniform(1 - case.spread, 1 + case.spread))
            tool = range(2 * count // 5, 3 * count // 5)
            sample = Sample(
                array("i", prompt + words(count)),
                array("B", [0] * case.prompt + [int(i not in tool) for i in range(count)]),
                rollout_id=f"{group}/{member}",
                group_id=str(group),
            )
            sample.behavior_logprobs = array("f", [-1.0] * len(sample))
            sample.advantages = array("d", [rng.uniform(-1, 1)] * len(sample))
            samples.append(sample)
    return samples


def learner_update(model: Qwen3ForCausalLM, share_prefixes: bool) -> Update:
    from retrain.algorithms import ppo_clip
    from retrain.learner import PolicyObjective, TorchLearner

    learner = TorchLearner(model, learning_rate=1e-6, share_prefixes=share_prefixes)
    objective = PolicyObjective(
        lambda logprobs, old, advantages, mask, _: ppo_clip(logprobs, old, advantages, mask)
    )

    def update(samples: list[Sample]) -> float:
        learner.forward_backward(samples, objective)
        return learner.optim_step()["grad_norm"]

    return update


def naive_update(model: Qwen3ForCausalLM) -> Update:
    """The same by way of `model(...).logits`, [B, T, V] for the whole padded batch."""
    import torch

    from retrain.algorithms import ppo_clip
    from retrain.learner import collate

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def update(samples: list[Sample]) -> float:
        trained = sum(sum(sample.loss_mask) for sample in samples)
        batch = collate(samples, [1 / trained] * len(samples), model.device)
        logits = model(input_ids=batch.token_ids, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1], -1, dtype=torch.float32)
        chosen = logprobs.gather(-1, batch.token_ids[:, 1:, None]).squeeze(-1)
        loss, _ = ppo_clip(chosen, chosen.detach(), batch.advantages[:, 1:], batch.mask[:, 1:])
        (loss * batch.weights[:, 1:]).sum().backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return update


def start_memory(cuda: bool) -> int:
    """Bytes in use now, of this process or of torch's CUDA allocator; the peak starts anew."""
    import torch

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return _proc("self/status", "VmRSS")


def _proc(file: str, name: str) -> int:
    """Bytes, from a file whose unit is the kilobyte."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(case: Case, mode: Mode, repeats: int, threads: int | None) -> Measured:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    model, samples = make_model(case.vocab), make_samples(case)
    cuda = model.device.type == "cuda"
    update = naive_update(model) if mode == "naive" else learner_update(model, mode == "packed")
    update(make_samples(Case(8, 4, 8, groups=2, size=2, vocab=case.vocab)))
    logits = len(samples) * max(map(len, samples)) * case.vocab
    found = Measured(
        device=f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {model.dtype}, "
        f"{torch.get_num_threads()} threads",
        given=sum(map(len, samples)),
        logits_mb=logits * model.dtype.itemsize / 1e6,
        before_mb=start_memory(cuda) / 1e6,
    )
    free = torch.cuda.mem_get_info()[0] if cuda else _proc("meminfo", "MemAvailable")
    if mode == "naive" and NAIVE_COPIES * 4 * logits > 0.8 * free:
        return found
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    norm = update(samples)
    hook.remove()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        update(samples)
        if cuda:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = torch.cuda.max_memory_allocated() if cuda else _proc("self/status", "VmHWM")
    added = peak / 1e6 - found.before_mb
    return replace(found, run=sum(sizes), grad_norm=norm, added_mb=added,
                   seconds=median(walls), cpu_seconds=median(cpus))  # fmt: skip


HEADER = (
    f"{'prompt/common+response':>24s} {'vocab':>6s} {'update':>8s} {'s':>6s} {'cpu s':>6s} "
    f"{'tokens/s':>8s} {'ratio':>5s} {'given':>6s} {'run':>6s} {'MB before':>9s} {'added':>5s} "
    f"{'[B,T,V] MB':>10s}"
)


def line(case: Case, mode: Mode, found: Measured, base: Measured) -> str:
    start = f"{case.shape:>24s} {case.vocab:6d} {mode:>8s} "
    if not found.seconds:
        return f"{start}does not fit: its logits alone take {found.logits_mb:.0f} MB"
    return (
        f"{start}{found.seconds:6.2f} {found.cpu_seconds:6.2f} {found.given / found.seconds:8.0f} "
        f"{base.seconds / found.seconds:5.2f} {found.given:6d} {found.run:6d} "
        f"{found.before_mb:9.0f} {found.added_mb:5.0f} {found.logits_mb:10.0f}"
    )


def compare(case: Case, modes: list[Mode], repeats: int, threads: int | None) -> list[Measured]:
    """Measure a case, and print one line a mode."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    measured: list[Measured] = []
    for mode in modes:
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            try:
                measured.append(fresh.submit(measure, case, mode, repeats, threads).result())
            except BrokenProcessPool:
                sys.exit(f"the process of {case.shape} {mode} was killed, perhaps for its memory")
        print(line(case, mode, measured[-1], measured[0]), flush=True)
    return [found for found in measured if found.seconds]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a shape, as printed")
    arguments = parser.parse_args()
    devices, differences = set(), [0.0]
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for title, cases, modes in SECTIONS:
        print(f"\n{title}\n{HEADER}", flush=True)
        for case in (case for case in cases if arguments.only in case.shape):
            found = compare(case, modes, arguments.repeats, arguments.threads)
            devices.add(found[0].device)
            norms = [one.grad_norm for one in found]
            differences.append(max(norms) / min(norms) - 1)
    print(f"\n{', '.join(devices)}; gradient norms of a case differ by {max(differences):.1e}")
    return max(differences) > (5e-2 if any("bfloat16" in device for device in devices) else 1e-4)


if __name__ == "__main__":
    sys.exit(main())
