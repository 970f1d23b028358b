"""What it costs to conduct rollouts: processor time of a turn, and memory over many steps.

    python benchmarks/orchestration.py [--rollouts 1000] [--turns 4] [--steps 5] [--long 50]

A thousand rollouts at the same time, in groups of eight: a policy whose words are prescribed and
come at once, the real renderer, ledger, tool environment, sampler and rewards, and a tool that
sleeps for 100 ms, as a coroutine and in threads. Processor time of the whole process is divided by
the MODEL turns; that of the bare sleeps, each in a task with a time-out, is the yardstick, since
processor time grows with what else the machine does. Then steps of the first kind run in a row, and
the growth of resident memory is fitted by a line. Exits with 1 when a bound below is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import linear_regression, median

from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.envs import ToolEnvironment
from retrain.models.tokenizer import train_tokenizer
from retrain.rendering import Codec, Renderer, TagFormat, make_template
from retrain.rewards import RewardCalculator, RewardSpec
from retrain.rollout import Sampler, set_aside, to_samples
from retrain.tools import Tool, tool
from retrain.types import Message, MessageType, Rollout, TagConfig, Task

TOOL_S = 0.1
GROUP = 8
VARIANTS = 10_000
"""Of each turn, so that next to nothing is said twice at a time."""
CPU_MS = 0.5
"""Bound: processor time of a turn."""
GROWTH_KB = 64.0
"""Bound: growth of resident memory in a step, of a thousand rollouts."""
TAGS = TagConfig()


class ScriptedEngine:
    """Says `turns[k][j]` in the k-th turn of a session, j another one for each request; at once."""

    context_limit = 100_000

    def __init__(self, turns: Sequence[Sequence[Sequence[int]]]) -> None:
        self._turns = turns
        self._said: dict[str, int] = {}
        self._answered = 0

    async def generate(self, request: GenerateRequest) -> Completion:
        session = str(request.session)
        turn = self._said[session] = self._said.get(session, -1) + 1
        self._answered += 1
        ids = array("i", self._turns[turn][self._answered % len(self._turns[turn])])
        reason = "stop_token" if ids[-1] in request.params.stop_token_ids else "stop_string"
        return Completion(ids, array("f", [-0.5]) * len(ids), array("i", [0]) * len(ids), reason)

    async def score(self, token_ids: list[int], temperature: float = 1.0) -> array[float]:
        return array("f", bytes(4 * len(token_ids)))

    async def end_session(self, session: str) -> None:
        self._said.pop(session, None)

    async def update_weights(self, version: int) -> None:
        return None

    async def close(self) -> None:
        return None


@tool(name="python")
async def sleeps(code: str) -> str:
    """Run code.

    Args:
        code: Python source
    """
    await asyncio.sleep(TOOL_S)
    return f"the result of {code}"


@tool(name="python")
def blocks(code: str) -> str:
    """Run code.

    Args:
        code: Python source
    """
    time.sleep(TOOL_S)
    return f"the result of {code}"


def answered(rollout: Rollout) -> float:
    """Whether the policy came to an answer."""
    return float("The answer is" in rollout.completion)


def corpus() -> list[str]:
    return ["What is 12*34+5? Let me compute: print(12*34+5) The answer is 413. the result of"] * 50


def make_sampler(a_tool: Tool, turns: int) -> Sampler:
    special = ("<eos>", TAGS.tool_start, TAGS.tool_end, TAGS.response_start, TAGS.response_end)
    tokenizer = train_tokenizer(corpus(), vocab_size=400, special_tokens=special)
    tokenizer.eos_token = "<eos>"
    renderer = Renderer(Codec(tokenizer), make_template(tokenizer), TagFormat(TAGS))
    call = f"Let me compute: {TAGS.tool_start}print(12*34+%d){TAGS.tool_end}"
    texts = [call] * (turns - 1) + ["The answer is %d.<eos>"]
    script = [[renderer.codec.encode(text % i) for i in range(VARIANTS)] for text in texts]
    return Sampler(
        environment=ToolEnvironment([a_tool], renderer, max_steps=turns, describe_tools=True),
        engine=ScriptedEngine(script),
        renderer=renderer,
        params=SamplingParams(64),
        turn_timeout_s=60.0,
        timeout_s=600.0,
    )


def tasks(count: int) -> Iterator[tuple[int, Task]]:
    """(epoch, task) without end: every step has others."""
    for number in itertools.count():
        question = Message(f"What is {number}*34+5?", MessageType.MESSAGE)
        yield number // count, Task(str(number), (question,), answer="413")


async def step(
    sampler: Sampler, questions: Iterator[tuple[int, Task]], rollouts: int, turns: int
) -> float:
    """One step's rollouts, scored and made into samples; milliseconds of processor time a turn."""
    calculator = RewardCalculator([RewardSpec("answered", answered, "rollout")])
    batch = list(itertools.islice(questions, rollouts // GROUP))
    begun = time.process_time()
    groups = await sampler.groups(batch, GROUP, calculator.score)
    spent = time.process_time() - begun
    finished = [rollout for group in groups for rollout in group]
    for rollout in finished:
        if rollout.error or len(rollout.model_messages) != turns or not to_samples(rollout):
            raise RuntimeError(f"unexpected rollout: {rollout}")
    return 1000 * spent / (len(finished) * turns)


async def bare(rollouts: int, turns: int) -> float:
    """Milliseconds of processor time a turn of what no conductor can do without."""

    async def one() -> None:
        for _ in range(turns - 1):
            async with asyncio.timeout(60):
                await asyncio.create_task(asyncio.sleep(TOOL_S))

    begun = time.process_time()
    await asyncio.gather(*(one() for _ in range(rollouts)))
    return 1000 * (time.process_time() - begun) / (rollouts * turns)


def resident_kb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


async def cost(a_tool: Tool, args: argparse.Namespace) -> tuple[list[float], float, float]:
    """Milliseconds of processor time a turn, sorted; their median in yardsticks; and the median
    seconds of a step."""
    sampler, questions = make_sampler(a_tool, args.turns), tasks(args.rollouts // GROUP)
    await step(sampler, questions, args.rollouts, args.turns)
    spent, took, ratios = [], [], []
    for _ in range(args.steps):
        begun = time.perf_counter()
        spent.append(await step(sampler, questions, args.rollouts, args.turns))
        took.append(time.perf_counter() - begun)
        ratios.append(spent[-1] / await bare(args.rollouts, args.turns))
    return sorted(spent), median(ratios), median(took)


async def growth(args: argparse.Namespace) -> tuple[float, float]:
    """Kilobytes of resident memory added by a step, after ten to warm up; and megabytes then."""
    sampler, questions = make_sampler(sleeps, args.turns), tasks(args.rollouts // GROUP)
    memory = []
    for _ in range(args.long):
        await step(sampler, questions, args.rollouts, args.turns)
        memory.append(resident_kb())
    settled = memory[10:]
    return linear_regression(range(len(settled)), settled).slope, settled[-1] / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--long", type=int, default=50)
    args = parser.parse_args()
    with set_aside():
        return int(bounds_missed(args))


def bounds_missed(args: argparse.Namespace) -> bool:
    """Measure and print everything; whether a bound was missed."""
    missed = False
    for name, a_tool in (("coroutines", sleeps), ("threads", blocks)):
        spent, ratio, took = asyncio.run(cost(a_tool, args))
        missed |= median(spent) > CPU_MS
        print(
            f"{name}: {median(spent):.3f} ms of processor time a turn ({spent[0]:.3f} to "
            f"{spent[-1]:.3f}), {ratio:.1f} times the bare sleeps; a step took {took:.2f} s"
        )
    if args.long > 12:
        slope, size = asyncio.run(growth(args))
        missed |= slope > GROWTH_KB
        print(f"memory: {slope:+.1f} kB a step over {args.long} steps, {size:.0f} MB at the end")
    return missed


if __name__ == "__main__":
    sys.exit(main())
