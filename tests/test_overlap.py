"""What starts when, in which order it is handed out, and how old it may be."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrain.config import load_config
from retrain.data import Cursor
from retrain.loops.check import check
from retrain.loops.metrics import rollout_metrics
from retrain.loops.pipeline import Pipeline, SampledGroup, overlapping, seconds_under_way
from retrain.loops.survivors import Freshness, large_enough
from retrain.loops.worker import Worker
from retrain.types import Rollout, Segment, Source, Task, UserError
from runs import hyperparameters, rl_config
from test_docs import blocks, parse

STEPS, PROMPTS = 6, 3


class Numbers:
    """Five tasks an epoch; remembers how many were read."""

    def __init__(self, ids: str = "abcde") -> None:
        self.ids = ids
        self.read = 0

    def epoch(self, n: int) -> Iterator[Task]:
        for name in self.ids:
            self.read += 1
            yield Task(name, ())


def pipeline_of(sample: Any, source: Numbers | None = None) -> Pipeline:
    return Pipeline(Cursor(source or Numbers(), place="prompt_source"), sample)


def names(groups: list[SampledGroup]) -> list[str]:
    return [str(group.rollouts[0].group_id) for group in groups]


async def driven(staleness: int, seed: int) -> tuple[list[str], list[int], int]:
    """What the steps got, under which step's weights each of it began, and most under way; every
    group takes what time it likes, and so does the learner."""
    chance, begun, most, learnt = random.Random(seed), dict[str, int](), 0, 0

    async def sample(epoch: int, task: Task) -> list[Rollout]:
        nonlocal most
        begun[f"{epoch}/{task.id}"] = learnt
        most = max(most, pipeline.under_way)
        await asyncio.sleep(chance.choice([0, 0, 0.002, 0.006]))
        return [Rollout(group_id=f"{epoch}/{task.id}")]

    pipeline = pipeline_of(sample)
    taken = []
    for step in range(1, STEPS + 1):
        pipeline.begin_step()
        ahead = min(staleness, STEPS - step) * PROMPTS
        groups = await pipeline.take(PROMPTS, ahead=ahead)
        groups += await pipeline.take(step % 2, ahead=ahead)  # as dynamic sampling does
        assert pipeline.under_way == ahead
        taken += names(groups)
        assert all(step - 1 - begun[name] <= staleness for name in names(groups))
        await asyncio.sleep(chance.choice([0, 0.003]))
        learnt = step
    assert pipeline.under_way == 0
    return taken, [learnt_then for learnt_then in begun.values()], most


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_the_order_is_that_of_the_tasks_whatever_takes_how_long(staleness: int) -> None:
    total = STEPS * PROMPTS + 3
    expected = [f"{i // 5}/{'abcde'[i % 5]}" for i in range(total)]
    results = [await driven(staleness, seed) for seed in range(5)]
    for taken, begun, most in results:
        assert taken == expected
        assert begun == sorted(begun) == results[0][1], "when a group starts depends on no delay"
        assert most <= (staleness + 1) * PROMPTS
    assert results[0][1][:PROMPTS] == [0] * PROMPTS
    assert max(most for _, _, most in results) == (staleness + 1) * PROMPTS


async def test_the_position_is_that_of_the_first_group_that_was_not_handed_out() -> None:
    async def sample(epoch: int, task: Task) -> list[Rollout]:
        return [Rollout(group_id=f"{epoch}/{task.id}")]

    source, expected = Numbers(), Cursor(Numbers(), place="prompt_source")
    pipeline = pipeline_of(sample, source)
    assert pipeline.position() == expected.position()
    for count, ahead in ((2, 4), (3, 4), (1, 0)):
        pipeline.begin_step()
        await pipeline.take(count, ahead=ahead)
        for _ in range(count):
            next(expected)
        assert pipeline.position() == expected.position()
    assert source.read == 9, "2 + 4 and 3 more, and none for the last step"
    resumed = Cursor(Numbers(), place="prompt_source")
    resumed.restore(pipeline.position())
    assert (await pipeline.take(1))[0].rollouts[0].group_id == "1/b"
    assert [(epoch, task.id) for epoch, task in itertools.islice(resumed, 1)] == [(1, "b")]
    await pipeline.close()


async def test_a_failure_behind_the_one_that_is_waited_for_ends_the_waiting() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    ended: list[str] = []

    async def sample(epoch: int, task: Task) -> list[Rollout]:
        try:
            if task.id == "c":
                raise UserError("reward 'r' raised")
            if task.id == "d":
                raise UserError("too late to matter")
            await asyncio.Event().wait()
        finally:
            ended.append(task.id)
        return []

    pipeline = pipeline_of(sample)
    for wait in (pipeline.take(1, ahead=4), pipeline.settle()):
        with pytest.raises(UserError, match="reward 'r' raised"):
            await asyncio.wait_for(wait, 5)
    await pipeline.close()
    assert sorted(ended) == list("abcde")
    del pipeline
    assert asyncio.all_tasks() == {asyncio.current_task()} and complaints == []


async def test_two_groups_under_way_have_two_ids_and_later_steps_may_have_the_same_again() -> None:
    async def sample(epoch: int, task: Task) -> list[Rollout]:
        return [Rollout(group_id=task.id)]

    pipeline = pipeline_of(sample, Numbers("abaa"))
    assert names(await pipeline.take(2)) == ["a", "b"]
    with pytest.raises(UserError, match="two tasks have the id 'a'"):
        await pipeline.take(1)
    pipeline = pipeline_of(sample, Numbers("abaa"))
    await pipeline.take(2)
    pipeline.begin_step()
    with pytest.raises(UserError, match="two tasks have the id 'a'"):
        await pipeline.take(1, ahead=1)
    await pipeline.close()


async def test_nothing_is_under_way_after_settling_and_nothing_is_lost() -> None:
    done: list[str] = []

    async def sample(epoch: int, task: Task) -> list[Rollout]:
        await asyncio.sleep(0.002 * (5 - "abcde".index(task.id)))
        done.append(task.id)
        return [Rollout(group_id=task.id)]

    pipeline = pipeline_of(sample)
    assert names(await pipeline.take(1, ahead=3)) == ["a"]
    await pipeline.settle()
    assert sorted(done) == list("abcd")
    assert names(await pipeline.take(3)) == ["b", "c", "d"]


def test_seconds_count_once_what_is_under_way_at_the_same_time() -> None:
    groups = [SampledGroup([], b, e) for b, e in ((4, 5), (0, 2), (1, 3), (1, 2), (4.5, 7))]
    assert seconds_under_way(groups) == 3 + 3
    assert seconds_under_way([]) == 0


# Age


def aged(*versions: int, error: str | None = None) -> Rollout:
    count = len(versions)
    return Rollout(
        segments=[
            Segment(
                None,
                0,
                array("i", range(count + 1)),
                array("B", [Source.CONTEXT] + [Source.SAMPLED] * count),
                array("f", [0.0] * (count + 1)),
                array("i", [-1, *versions]),
            )
        ],
        error=error,
    )


def test_age_is_counted_in_publications_of_the_oldest_token() -> None:
    """Two updates a step: versions 20, 22, 24, 26."""
    freshness = Freshness(1)
    for version in (20, 22, 22, 24, 26):
        freshness.publish(version)
    behind = {20: 3, 21: 3, 22: 2, 24: 1, 25: 1, 26: 0, 30: 0}
    assert {v: freshness.steps_behind(aged(26, v)) for v in behind} == behind
    assert freshness.steps_behind(aged()) == 0, "nothing was sampled"
    assert freshness.steps_behind(aged(19)) == 4
    groups = [[aged(24), aged(26, 22), aged(0)], [aged(0, error="lost"), aged(26)]]
    assert [len(group) for group in freshness.of(groups)] == [2 - 1, 2], "masked is not stale"
    assert large_enough(freshness.of(groups)[0], 1) and not large_enough(freshness.of(groups)[0], 2)


def test_weights_from_before_the_stage_are_older_than_any_bound() -> None:
    freshness = Freshness(3)
    freshness.publish(20)
    assert freshness.steps_behind(aged(19)) == 4 and freshness.is_stale(aged(19))


def test_stale_rollouts_are_counted_and_their_reward_is_what_it_was() -> None:
    freshness = Freshness(0)
    freshness.publish(1)
    freshness.publish(2)
    groups = [[aged(2), aged(1), aged(1), aged(0, error="lost")]]
    for rollout, reward in zip(groups[0], (1.0, 0.0, 0.5, 0.0), strict=True):
        rollout.reward = reward
    metrics = rollout_metrics(groups, None, version=2, freshness=freshness, min_group_size=2)
    assert metrics["rollouts"] == 4 and metrics["rollouts/stale"] == 2
    assert metrics["rollouts/masked"] == 1 and metrics["reward/mean"] == 0.5
    assert metrics["staleness/steps_max"] == 1
    assert metrics["groups/too_small"] == 1 and metrics["groups/zero_variance"] == 1


# The learner's thread


async def test_the_worker_computes_with_the_threads_of_who_made_it() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker = Worker()
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        found = await worker.run(
            lambda: (torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident())
        )
        assert found[:2] == (3, True) and found[2] != threading.get_ident()
        with pytest.raises(UserError, match="as it is"):
            await worker.run(fails)
        worker.close()
    finally:
        torch.set_num_threads(before)


def fails() -> None:
    raise UserError("as it is")


async def test_work_that_is_cancelled_is_finished_first() -> None:
    begun, goes_on, seen = threading.Event(), threading.Event(), []

    def work() -> int:
        begun.set()
        assert goes_on.wait(10)
        return 7

    async def caller() -> None:
        seen.append(await worker.run(work))
        seen.append("kept")
        await asyncio.sleep(10)
        seen.append("went on")

    worker = Worker()
    task = asyncio.create_task(caller())
    while not begun.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [7, "kept"]
    worker.close()


# What the config says


def with_hyper(**changed: Any) -> dict[str, Any]:
    hyper = hyperparameters(steps=5, **changed)
    return rl_config(Path("runs"), algorithm={"hyperparameters": hyper})


def test_staleness_without_a_correction_is_refused_with_the_line_to_add() -> None:
    with pytest.raises(UserError) as refused:
        load_config(with_hyper(max_staleness=2))
    assert "max_staleness 2" in str(refused.value)
    assert "add `correction: {kind: tis}` beside it" in str(refused.value)
    tis = {"kind": "tis"}
    assert load_config(with_hyper(max_staleness=2, correction=tis))
    with pytest.raises(UserError, match="max_staleness 5 is never reached in 5 steps"):
        load_config(with_hyper(max_staleness=5, correction=tis))


def test_the_pages_config_loads() -> None:
    (page,) = (b for b in blocks("docs/overlap.md") if b.file == "overlap.yaml")
    settings = load_config(parse(page.text)).algorithm.hyperparameters
    assert settings.max_staleness == 1 and settings.correction is not None


def test_check_says_that_such_a_run_does_not_resume_bit_for_bit() -> None:
    lines = check(load_config(with_hyper(max_staleness=2, correction={"kind": "tis"})))
    assert "rollouts overlap training: up to 2 steps stale" in lines
    assert "resuming: goes on, but not bit for bit: max_staleness is 2 in rl" in lines
    assert "max_staleness" not in check(load_config(with_hyper()))


def test_a_stage_may_overlap_that_the_others_do_not() -> None:
    ahead = {"hyperparameters": {"max_staleness": 1, "correction": {"kind": "mis"}}}
    stages = [{"kind": "rl", "name": "a"}, {"kind": "rl", "algorithm": ahead}]
    assert overlapping(load_config(with_hyper() | {"stages": stages})) == {"stages.1": 1}
    assert overlapping(load_config(with_hyper() | {"stages": stages[:1]})) == {}


def test_a_number_in_quotes_is_a_number_in_a_stage_too() -> None:
    hyper = {"max_staleness": "1", "correction": {"kind": "tis"}}
    stage = {"kind": "rl", "name": "late", "algorithm": {"hyperparameters": hyper}}
    assert overlapping(load_config(rl_config(Path("runs"), stages=[stage]))) == {"late": 1}
