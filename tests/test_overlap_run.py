"""Whole runs whose rollouts overlap training, with the real engine and learner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import retrain
from retrain.config import load_config
from retrain.data import Cursor, load_tasks
from retrain.engines import SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Environment
from retrain.envs.base import Agent
from retrain.loops.build import build_calculator, build_sampler
from retrain.loops.repeatable import repeatable
from retrain.loops.update import PolicyUpdate, build_update
from retrain.loops.world import build_environment, build_renderer, build_sandbox
from retrain.models import load_policy
from retrain.types import Message, MessageType, Rollout, Task
from runs import hyperparameters, metrics_of, rl_config, rollouts_of

TIS = {"kind": "tis"}


def config(folder: Path, staleness: int = 1, **changed: Any) -> dict[str, Any]:
    """Five steps of two groups of three in a world of three turns."""
    sections = changed.pop("sections", {})
    hyper = hyperparameters(steps=5, max_staleness=staleness, correction=TIS) | changed
    world = {"type": "python", "path": "test_overlap_run:World"}
    return rl_config(folder, environment=world, algorithm={"hyperparameters": hyper}) | sections


ACTIVE: list[str] = []
"""Rollouts that are under way in a `World`."""
TOGETHER: list[tuple[str, ...]] = []
"""Those at the same time, whenever one of them had said something."""


class World(Environment):
    """Three turns, also of a model that has not learnt to end them."""

    async def run(self, task: Task, agent: Agent) -> Rollout:
        rollout = agent.start(task)
        rollout.add_messages(*task.prompt)
        ACTIVE.append(rollout.id)
        for turn in range(1, 4):
            message = await agent.act(rollout)
            TOGETHER.append(tuple(ACTIVE))
            rollout.env_rewards.append(float(len(message.content) % 3))
            await self.wait(rollout, turn)
            rollout.add_messages(Message(f"Go on, {turn}.", MessageType.MESSAGE))
        ACTIVE.remove(rollout.id)
        rollout.stop_reason = "environment"
        return rollout

    async def wait(self, rollout: Rollout, turn: int) -> None:
        await asyncio.sleep(0.003 * (hash((rollout.id, turn)) % 3))


def step_of(rollout: Rollout) -> int:
    """Which step learns from a rollout, where tasks are not shuffled: question n is of 10 + n."""
    assert rollout.task is not None
    return (int(rollout.task.answer) - 21) // 2 // 2 + 1


UNSHUFFLED = {"type": "python", "function": "runs:questions", "shuffle": False}


def order_of(run: Path) -> list[str]:
    """Groups of all steps, in the order in which the steps have them."""
    return [
        group
        for rollouts in rollouts_of(run).values()
        for group in dict.fromkeys(str(rollout.group_id) for rollout in rollouts)
    ]


def expected_order(settings: dict[str, Any], count: int) -> list[str]:
    source = load_config(settings).prompt_source
    assert source is not None
    cursor = Cursor(load_tasks(source, seed=0), place="prompt_source")
    return [f"{epoch}/{task.id}" for epoch, task in (next(cursor) for _ in range(count))]


def oldest(rollout: Rollout) -> int:
    return min(v for segment in rollout.segments for v in segment.versions if v >= 0)


# On-policy


async def by_hand(settings: Any) -> tuple[list[list[Rollout]], Any]:
    """Sampling, then learning, then sampling again, in the plainest way there is."""
    policy = load_policy(settings.model, seed=settings.seed)
    hyper, steps = settings.algorithm.hyperparameters, []
    engine = TorchEngine(policy.model, tokenizer=policy.tokenizer, deterministic=True)
    sandbox, renderer = build_sandbox(settings), build_renderer(settings, policy)
    sampler = build_sampler(
        settings,
        build_environment(settings, renderer, sandbox),
        engine,
        renderer,
        SamplingParams(hyper.max_new_tokens, hyper.temperature),
    )
    calculator = build_calculator(settings.reward_setup, sandbox)
    update = build_update(hyper, policy, seed=settings.seed)
    tasks = Cursor(load_tasks(settings.prompt_source, seed=settings.seed), place="prompt_source")
    version = 0
    for step in range(1, hyper.steps + 1):
        await engine.update_weights(version)
        batch = [next(tasks) for _ in range(hyper.prompts_per_step)]
        groups = await sampler.groups(batch, hyper.group_size, calculator.score)
        steps.append([rollout for group in groups for rollout in group])
        update.learn(update.samples(groups), step, lambda: None)
        version += hyper.updates
    await engine.close()
    return steps, policy.model


def test_at_staleness_0_the_bits_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    settings = config(tmp_path, 0, epochs=2, correction=None)
    run = retrain.run_sync(settings)
    with repeatable(0):
        steps, model = asyncio.run(by_hand(load_config(settings)))
    for plain, rollouts in zip(steps, rollouts_of(run.path).values(), strict=True):
        assert [r.segments for r in plain] == [r.segments for r in rollouts]
        assert [r.reward for r in plain] == [r.reward for r in rollouts]
    trained = load_policy(
        load_config(settings | {"model": {"name_or_path": str(run.checkpoint)}}).model
    ).model.state_dict()
    assert all(torch.equal(trained[name], p) for name, p in model.state_dict().items())


# Overlap

LEARNING, SAMPLED = threading.Event(), threading.Event()


class Held(World):
    """Rollouts of the second step go on when the first update has begun; then they sample."""

    async def wait(self, rollout: Rollout, turn: int) -> None:
        if step_of(rollout) != 2:
            return
        if turn == 2:
            SAMPLED.set()
        while not LEARNING.is_set():
            await asyncio.sleep(0.001)


def test_rollouts_are_sampled_while_the_learner_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update does not go on before the engine and the world have served others."""
    LEARNING.clear()
    SAMPLED.clear()
    learn, during = PolicyUpdate.learn, []

    def slow(self: PolicyUpdate, samples: Any, step: int, changed: Callable[[], None]) -> Any:
        LEARNING.set()
        during.append((SAMPLED.wait(10), threading.current_thread() is threading.main_thread()))
        return learn(self, samples, step, changed)

    monkeypatch.setattr(PolicyUpdate, "learn", slow)
    world = {"type": "python", "path": "test_overlap_run:Held"}
    sections = {"environment": world, "prompt_source": UNSHUFFLED}
    run = retrain.run_sync(config(tmp_path, sections=sections)).path
    assert during == [(True, False)] * 5
    for step, rollouts in rollouts_of(run).items():
        assert {step_of(rollout) for rollout in rollouts} == {step}


@pytest.mark.parametrize("staleness", [1, 2])
def test_no_token_is_older_than_the_bound_and_the_order_is_the_tasks(
    staleness: int, tmp_path: Path
) -> None:
    settings = config(tmp_path, staleness, epochs=2)
    run = retrain.run_sync(settings).path
    rows, published = metrics_of(run), [0]
    for row, rollouts in zip(rows, rollouts_of(run).values(), strict=True):
        first = min(map(oldest, rollouts))
        behind = sum(version > first for version in published)
        assert behind == row["staleness/steps_max"] <= staleness
        assert row["staleness/max"] == published[-1] - first and row["rollouts/stale"] == 0
        published.append(published[-1] + 2)
    most = [row["staleness/steps_max"] for row in rows]
    assert most[:2] == [0, 1] and max(most) <= staleness
    assert order_of(run) == expected_order(settings, 10)
    assert all(0 <= row["seconds/wait"] < 60 and row["seconds/generate"] > 0 for row in rows)
    assert all(row["correction/mean"] > 0 for row in rows)


@pytest.fixture
def together() -> list[tuple[str, ...]]:
    ACTIVE.clear()
    TOGETHER.clear()
    return TOGETHER


def test_evaluation_on_the_way_is_of_one_version_and_for_itself(
    tmp_path: Path, together: list[tuple[str, ...]]
) -> None:
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions", "params": {"n": 6}},
        "every_steps": 2,
        "success_threshold": 0.5,
    }
    run = retrain.run_sync(config(tmp_path, 2, sections={"evaluation": evaluation})).path
    for step, rollouts in rollouts_of(run, "rl-eval-T_1").items():
        versions = {v for r in rollouts for s in r.segments for v in s.versions if v >= 0}
        assert versions == {step}
    evaluating = [{rollout.startswith("-1/") for rollout in active} for active in together]
    assert {True} in evaluating and {False} in evaluating and {True, False} not in evaluating
    assert order_of(run) == expected_order(config(tmp_path), 10)


def test_all_that_is_under_way_keeps_to_the_concurrency(
    tmp_path: Path, together: list[tuple[str, ...]]
) -> None:
    retrain.run_sync(config(tmp_path, 2, sections={"rollout": {"max_concurrency": 4}}))
    assert max(map(len, together)) == 4


def test_no_more_than_the_bound_is_under_way_and_nothing_that_no_step_learns_from(
    tmp_path: Path, together: list[tuple[str, ...]]
) -> None:
    retrain.run_sync(config(tmp_path, 2))
    assert 2 * 3 < max(map(len, together)) <= 3 * 2 * 3
    assert len({rollout for active in together for rollout in active}) == 5 * 2 * 3, "nor after it"


def sometimes(rollout: Rollout) -> float:
    """Every third task has a group without variance."""
    assert rollout.task is not None
    if int(rollout.task.answer) % 3 == 0:
        return 1.0
    return float(rollout.id.rpartition("/")[2])


def test_dynamic_sampling_takes_further_groups_in_order(tmp_path: Path) -> None:
    sections = {
        "environment": {"type": "qa"},
        "reward_setup": {"rollout_reward_configs": {"r": {"function": FLAT}}},
    }
    settings = config(tmp_path, 1, dynamic_sampling_rounds=3, sections=sections)
    run = retrain.run_sync(settings).path
    order = order_of(run)
    assert len(order) > 10 and order == expected_order(settings, len(order))
    for row in metrics_of(run):
        assert row["groups"] - row["groups/zero_variance"] == 2


FLAT = "test_overlap_run:sometimes"


def test_stages_follow_each_other_whatever_they_overlap(tmp_path: Path) -> None:
    on_policy = {"hyperparameters": {"max_staleness": 0, "steps": 2}}
    stages = [
        {"kind": "rl", "name": "a"},
        {"kind": "rl", "name": "b", "algorithm": on_policy},
        {"kind": "rl", "name": "c"},
    ]
    run = retrain.run_sync(config(tmp_path, sections={"stages": stages})).path
    for name, begin, count in (("a", 0, 5), ("b", 5, 2), ("c", 7, 5)):
        rows = metrics_of(run, name)
        assert len(rows) == count and max(row["rollouts/stale"] for row in rows) == 0
        first = rollouts_of(run, name)[1]
        assert {oldest(rollout) for rollout in first} == {begin}
        assert max(row["staleness/steps_max"] for row in rows) == (name != "b")


# And it learns


def test_the_reward_rises_with_overlap(tmp_path: Path) -> None:
    settings = rl_config(
        tmp_path,
        environment={"type": "qa"},
        algorithm={
            "hyperparameters": hyperparameters(
                steps=20,
                prompts_per_step=4,
                group_size=8,
                learning_rate=2e-2,
                optimizer="muon",
                max_staleness=1,
                correction=TIS,
            )
        },
    )
    rows = metrics_of(retrain.run_sync(settings).path)
    rewards = [row["reward/mean"] for row in rows]
    assert fmean(rewards[:3]) < 0.1 and fmean(rewards[-5:]) > 0.4, rewards
    assert max(row["staleness/steps_max"] for row in rows) == 1
