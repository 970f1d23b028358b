"""Deadlines, retries and survivors, one by one."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import DyingEngine, answer_by, failures_of, run_scripted, sample_of, small_run
from retrain.config.load import load_config
from retrain.engines.base import GenerateRequest, SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Environment, Step
from retrain.loops.credit import Credit, Estimator, rollout_advantages
from retrain.loops.metrics import failure_metrics
from retrain.rendering import Codec, Renderer, make_template
from retrain.rollout import Sampler, to_samples
from retrain.tracking.run_dir import RunDirectory
from retrain.types import (
    Failure,
    InfrastructureError,
    Message,
    MessageType,
    Rollout,
    Task,
    UserError,
)
from runs import hyperparameters, metrics_of, rl_config, rollouts_of
from scripted import ScriptedEngine
from tiny import byte_tokenizer, tiny_qwen3

TASK = Task("t", (Message("hello", MessageType.MESSAGE),))


class World(Environment):
    """Counts who is in it; hangs if told to; `fails` attempts of each rollout raise."""

    def __init__(self, *, hangs: bool = False, fails: int = 0) -> None:
        self.hangs = hangs
        self.fails = fails
        self.log: dict[str, list[Any]] = {"in": [], "most": [], "finished": [], "at": []}

    async def reset(self, task: Task) -> Sequence[Message]:
        self.log["in"].append(1)
        self.log["most"].append(len(self.log["in"]))
        self.log["at"].append(asyncio.get_running_loop().time())
        if self.hangs:
            await asyncio.sleep(60)
        await asyncio.sleep(0.001)
        if len(self.log["at"]) <= self.fails:
            raise InfrastructureError("no room")
        return task.prompt

    async def step(self, rollout: Rollout, message: Message) -> Step:
        if message.content == "mask":
            rollout.error = "the world ended"
        return Step(stop="environment")

    async def finish(self, rollout: Rollout) -> None:
        self.log["in"].pop()
        self.log["finished"].append(rollout.id)


def sampler(world: World, says: Sequence[str] = ("fine",) * 100, **options: Any) -> Sampler:
    tokenizer = byte_tokenizer()
    codec = Codec(tokenizer)
    engine = ScriptedEngine(codec, [f"{text}<eos>" for text in says])
    return Sampler(
        environment=world,
        engine=engine,
        renderer=Renderer(codec, make_template(tokenizer)),
        params=SamplingParams(8),
        **options,
    )


async def nothing(group: list[Rollout]) -> None:
    return None


async def test_cancelling_ends_everything_at_once_and_cleans_up() -> None:
    world = World(hangs=True)
    running = asyncio.create_task(sampler(world).groups([(0, TASK)], 5, nothing))
    await asyncio.sleep(0.05)
    running.cancel()
    begun = time.perf_counter()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.perf_counter() - begun < 0.5
    assert sorted(world.log["finished"]) == [f"0/t/{i}" for i in range(5)]


async def test_waits_double_and_belong_to_the_seed() -> None:
    one = sampler(World(), backoff_s=1.0, run_seed=3)
    waits = [one._wait("0/t/0", n) for n in range(1, 12)]
    for n, wait in enumerate(waits):
        assert min(2.0**n, 60.0) / 2 <= wait <= min(2.0**n, 60.0)
    assert waits == [one._wait("0/t/0", n) for n in range(1, 12)]
    assert len({one._wait(f"0/t/{i}", 1) for i in range(8)}) == 8
    world = World(fails=2)
    (rollout,) = await sampler(world, backoff_s=0.1).episode(TASK)
    first, second, third = world.log["at"]
    assert 0.05 <= second - first < third - second < 0.25
    assert rollout.error is None
    assert [(f.kind, f.attempt, f.cause) for f in rollout.failures] == [
        ("environment", 1, "InfrastructureError: no room"),
        ("environment", 2, "InfrastructureError: no room"),
    ]


async def test_there_is_no_retry_for_which_there_is_no_time() -> None:
    begun = time.perf_counter()
    (rollout,) = await sampler(World(fails=9), backoff_s=30.0, timeout_s=5.0).episode(TASK)
    assert time.perf_counter() - begun < 1
    assert rollout.error == "InfrastructureError: no room" and rollout.stop_reason == "error"


async def test_a_rollout_over_its_deadline_is_not_retried_and_is_cleaned_up() -> None:
    world = World(hangs=True)
    (rollout,) = await sampler(world, timeout_s=0.1).episode(TASK)
    assert len(world.log["at"]) == 1 and world.log["finished"] == ["0/t/0"]
    assert [f.kind for f in rollout.failures] == ["deadline"]
    assert rollout.error is not None and "0.1 s (rollout.timeout_s)" in rollout.error


async def test_rollouts_beyond_the_limit_wait_outside_their_clock() -> None:
    world = World()
    one = sampler(world, max_concurrency=3, timeout_s=0.5)
    groups = await one.groups([(0, Task(str(i), TASK.prompt)) for i in range(4)], 5, nothing)
    assert max(world.log["most"]) == 3 and len(world.log["at"]) == 20
    assert not any(rollout.error for group in groups for rollout in group)


async def test_a_world_may_mask_its_rollout() -> None:
    (rollout,) = await sampler(World(), ["mask"]).episode(TASK)
    assert rollout.failures == [Failure("environment", 1, "the world ended")]
    assert failure_metrics([rollout]) == {
        "rollouts/masked": 1.0,
        "rollouts/retried": 0.0,
        "masked/environment": 1.0,
    }


def test_the_end_of_a_run_does_not_wait_for_what_was_left_behind() -> None:
    script = (
        "import asyncio\nfrom retrain.tools.deadline import Late, within\n"
        "async def stubborn():\n"
        "    for _ in range(300):\n"
        "        try: await asyncio.sleep(0.1)\n"
        "        except asyncio.CancelledError: pass\n"
        "async def main():\n"
        "    try: await within(stubborn(), 0.1, grace_s=0.1)\n"
        "    except Late: print('late')\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    assert done.stdout == "late\n"


@pytest.mark.parametrize(
    ("estimator", "normalize", "expected"),
    [
        ("grpo", "none", [-1.0, 1.0]),  # mean of 1 and 3
        ("grpo", "group", [-0.7071067, 0.7071067]),  # unbiased std: sqrt(2)
        ("rloo", "none", [-2.0, 2.0]),  # the other one's
        ("opo", "none", [-1.5, 0.5]),  # (1*1 + 3*3) / 4 tokens = 2.5
    ],
)
async def test_survivors_are_compared_with_each_other_only(
    estimator: Estimator, normalize: Any, expected: list[float]
) -> None:
    """Of three rollouts the second is lost; the others have 1 and 3 tokens."""
    world = World()
    group = await sampler(world, ["", "lost", "ab"]).group(TASK, 3)
    group[1].mask("engine", "away")
    for rollout, reward in zip(group, (1.0, 0.0, 3.0), strict=True):
        rollout.reward = reward
    samples = [sample for rollout in group for sample in to_samples(rollout)]
    Credit(advantage=estimator, normalize_advantages=normalize).assign([group], samples)
    found = rollout_advantages(samples)
    assert list(found) == ["0/t/0", "0/t/2"]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("least", "trained"), [(None, 2), (3, 1)])
def test_a_group_with_too_few_survivors_does_not_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int | None, trained: int
) -> None:
    lost: list[str] = []

    async def say(session: str, turn: int, attempt: int) -> str:
        if sample_of(session) == 1 and (not lost or lost[0] == session):
            lost[:] = [session]
            raise InfrastructureError("away")
        return answer_by(sample_of(session))

    limits = {"min_group_size": least, "retries": 1}
    config = small_run(tmp_path, rollout=limits, environment={"type": "qa"})
    result = run_scripted(monkeypatch, config, say)
    row = metrics_of(result.path)[0]
    assert row["groups/too_small"] == 2 - trained and row["rollouts/masked"] == 1
    masked = next(r for r in rollouts_of(result.path)[1] if r.error)
    lengths = {
        r.id: sum(s.end - s.start for g in r.segments for s in g.turns)
        for r in rollouts_of(result.path)[1]
        if trained == 2 or r.group_id != masked.group_id
    }
    assert row["tokens/trained"] == sum(lengths.values()) > 0


def test_dynamic_sampling_makes_up_for_groups_that_are_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    async def say(session: str, turn: int, attempt: int) -> str:
        if sample_of(session) > 0 and len(lost) < 2:
            lost.append(session)
            raise InfrastructureError("away")
        return answer_by(sample_of(session))

    algorithm = {"hyperparameters": hyperparameters(steps=1, dynamic_sampling_rounds=1)}
    config = small_run(
        tmp_path,
        rollout={"retries": 0, "backoff_s": 1.0},
        environment={"type": "qa"},
        algorithm=algorithm,
    )
    row = metrics_of(run_scripted(monkeypatch, config, say).path)[0]
    assert (row["groups"], row["groups/too_small"]) == (3, 1)


def test_failures_are_bounded_and_in_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rollouts = [Rollout(id=str(i)) for i in range(30)]
    for rollout in rollouts[5:]:
        rollout.mask("tool", "x" * 2000)
    run.log_failures("rl", 3, rollouts[:5])
    assert failures_of(tmp_path) == []
    run.log_failures("rl", 3, rollouts)
    rows = failures_of(tmp_path)
    assert [row.get("rollout") for row in rows[:-1]] == [str(i) for i in range(5, 25)]
    assert len(rows[0]["cause"]) == 500
    assert rows[-1] == {"stage": "rl", "step": 3, "more": 5}


@pytest.mark.parametrize(
    ("rollout", "algorithm", "message"),
    [
        ({"turn_timeout_s": 9, "timeout_s": 8}, {}, "turn_timeout_s 9 never runs out"),
        ({"retries": 0, "backoff_s": 2}, {}, "backoff_s 2 does nothing with retries 0"),
        ({"min_group_size": 4}, {}, "min_group_size 4 is more than group_size 3"),
        ({"min_group_size": 1}, {}, "min_group_size 1 does nothing for grpo"),
        ({"timeout_s": 0}, {}, "rollout.timeout_s: input should be greater than 0"),
        ({"timeout": 5}, {}, "unknown key rollout.timeout; did you mean 'timeout_s'"),
    ],
)
def test_keys_that_cannot_act_are_refused(
    tmp_path: Path, rollout: dict[str, Any], algorithm: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as failure:
        load_config(rl_config(tmp_path, rollout=rollout, **algorithm))
    assert message in str(failure.value)


def test_a_stage_has_limits_of_its_own(tmp_path: Path) -> None:
    from retrain.config.load import resolve_stages

    stages = [{"kind": "rl", "rollout": {"timeout_s": 90.0}}]
    ((_, _, config),) = resolve_stages(load_config(rl_config(tmp_path, stages=stages)))
    assert config.rollout.timeout_s == 90 and config.rollout.turn_limit_s == 30


async def test_requests_are_issued_again_with_their_seeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is asked for is what a calm engine gives; one request is cancelled in between."""
    requests = [
        GenerateRequest(list(range(1, 20 + i)), SamplingParams(12), seed=i, session=str(i))
        for i in range(6)
    ]
    calm = TorchEngine(tiny_qwen3())
    dying = DyingEngine(tiny_qwen3())
    try:
        expected = [await calm.generate(request) for request in requests]
        for _ in range(2):  # a completed request lets it fail three times more
            dying.failures = 3
            with caplog.at_level(logging.WARNING, "retrain"):
                found = await asyncio.gather(*map(dying.generate, requests))
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert dying.restarts == 6
        assert "6 requests are issued again" in caplog.text
        await dying.update_weights(4)
        dying.failures = 4
        with pytest.raises(InfrastructureError, match=r"device lost \(after 3 restarts\)"):
            await dying.generate(requests[0])
        again = await dying.generate(requests[1])
        assert again.token_ids == expected[1].token_ids and set(again.versions) == {4}
    finally:
        await calm.close()
        await dying.close()
