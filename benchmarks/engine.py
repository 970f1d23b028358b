"""Tokens per second of `TorchEngine` and of `model.generate` on the same rollouts.

    python benchmarks/engine.py [--threads 1] [--repeats 3]

A tiny Qwen3 made here (d=64, 3 layers), 16 prompts x 8 rollouts, ragged lengths. A random model
never ends by itself, so each rollout has its own token budget; `generate` runs one batch to the
longest of them and only the tokens within each budget count as useful ("all" counts the rest
too). Prompts have 20 to 40 tokens, 200 to 400 where they are long. In the tool variant each
rollout gets 6 tokens of tool output in the middle: the engine goes on from its cache, `generate`
starts again from the whole conversation. "deterministic" is the engine with `deterministic=True`;
in the last variant all prompts have 400 tokens and begin alike, which it cannot read once for all
rows. The contenders take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from retrain.engines.base import GenerateRequest, SamplingParams
from retrain.engines.torch_engine import TorchEngine

VOCAB = 512
PROMPTS, GROUP = 16, 8


@dataclass(frozen=True)
class Plan:
    """One rollout: its prompt, and per turn how much it says and what a tool answers after."""

    prompt: list[int]
    budgets: list[int]
    answers: list[list[int]]


def demo_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=1000.0,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    return Qwen3ForCausalLM(config).eval()


def make_plans(turns: int, longest: int, seed: int, shortest: int, alike: int) -> list[Plan]:
    """Prompts of `shortest` to twice as many tokens; or all of them `shortest` long, the first
    `alike` tokens equal."""
    rng = np.random.default_rng(seed)
    most = shortest if alike else 2 * shortest
    sizes = rng.integers(shortest, most + 1, PROMPTS)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in sizes]
    prompts = [prompts[0][:alike] + prompt[alike:] for prompt in prompts]
    plans = []
    for prompt in prompts:
        for _ in range(GROUP):
            budgets = rng.integers(longest // 4, longest + 1, turns).tolist()
            answers = [rng.integers(0, VOCAB, 6).tolist() for _ in range(turns - 1)]
            plans.append(Plan(prompt, budgets, answers))
    return plans


async def run_engine(engine: TorchEngine, plans: list[Plan]) -> int:
    async def rollout(index: int, plan: Plan) -> int:
        ids, session = list(plan.prompt), str(index)
        for turn, budget in enumerate(plan.budgets):
            params = SamplingParams(max_new_tokens=budget)
            request = GenerateRequest(ids, params, seed=97 * index + turn, session=session)
            ids = ids + list((await engine.generate(request)).token_ids)
            if turn < len(plan.answers):
                ids = ids + plan.answers[turn]
        await engine.end_session(session)
        return sum(plan.budgets)

    return sum(await asyncio.gather(*(rollout(i, plan) for i, plan in enumerate(plans))))


def run_generate(model: Qwen3ForCausalLM, plans: list[Plan]) -> tuple[int, int]:
    """Useful tokens and all tokens."""
    conversations = [list(plan.prompt) for plan in plans]
    everything = 0
    for turn in range(len(plans[0].budgets)):
        width = max(map(len, conversations))
        ids = torch.tensor([[0] * (width - len(c)) + c for c in conversations])
        mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in conversations])
        longest = max(plan.budgets[turn] for plan in plans)
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=longest, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        everything += out[:, width:].numel()
        for conversation, plan, row in zip(conversations, plans, out, strict=True):
            conversation.extend(row[width : width + plan.budgets[turn]].tolist())
            if turn < len(plan.answers):
                conversation.extend(plan.answers[turn])
    return sum(sum(plan.budgets) for plan in plans), everything


async def compare(
    name: str, turns: int, longest: int, repeats: int, *, prompt: int = 20, alike: int = 0
) -> None:
    model = demo_model()
    engine = TorchEngine(model, max_slots=PROMPTS * GROUP)
    exact = TorchEngine(model, max_slots=PROMPTS * GROUP, deterministic=True)
    start = time.perf_counter()
    await exact.prepare()
    tried = time.perf_counter() - start
    ours, exactly, theirs, theirs_all = [], [], [], []
    for repeat in range(repeats + 1):
        plans = make_plans(turns, longest, repeat, prompt, alike)
        start = time.perf_counter()
        await run_engine(exact, plans)
        begin = time.perf_counter()
        tokens = await run_engine(engine, plans)
        middle = time.perf_counter()
        useful, everything = run_generate(model, plans)
        end = time.perf_counter()
        if repeat > 0:  # the first is a warm-up
            ours.append(tokens / (middle - begin))
            exactly.append(tokens / (begin - start))
            theirs.append(useful / (end - middle))
            theirs_all.append(everything / (end - middle))
        for one in (engine, exact):
            await one.update_weights(repeat + 1)
    await engine.close()
    await exact.close()
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    ratio_all = median(a / b for a, b in zip(ours, theirs_all, strict=True))
    print(
        f"{name:13s} engine {median(ours):8.0f} tok/s   generate {median(theirs):8.0f} useful, "
        f"{median(theirs_all):8.0f} all   ratio {ratio:.2f} useful, {ratio_all:.2f} all   "
        f"deterministic {median(exactly):8.0f} tok/s, "
        f"{median(a / b for a, b in zip(exactly, ours, strict=True)):.2f} of the engine, "
        f"tried in {tried:.1f} s at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asyncio.run(compare("single turn", 1, 64, arguments.repeats))
    asyncio.run(compare("tool call", 2, 32, arguments.repeats))
    asyncio.run(compare("long prompts", 1, 64, arguments.repeats, prompt=200))
    asyncio.run(compare("alike prompts", 1, 64, arguments.repeats, prompt=400, alike=380))


if __name__ == "__main__":
    main()
