"""Curricula: shares from measured success, order, and the same continuation after a restore."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import retrain
from retrain.config import load_config
from retrain.config.data import PromptSourceConfig
from retrain.config.stages import EvaluationConfig
from retrain.data import TaskCursor, TaskSource, load_tasks
from retrain.data.curriculum import CurriculumCursor, Draw, Window, weight
from retrain.data.cursor import Cursor
from retrain.loops.check import check
from retrain.loops.pipeline import Pipeline
from retrain.loops.success import check_curricula, success_of
from retrain.types import RewardPart, Rollout, Task, UserError
from runs import digits, hyperparameters, metrics_of, rl_config
from test_data_mixture import assert_resumed_the_same

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)
SIZES = {"easy": 6, "hard": 2}


def levelled(sizes: dict[str, int] = SIZES, **curriculum: Any) -> dict[str, Any]:
    rows = [
        {"prompt": f"{level}{i}", "level": level} for level in sizes for i in range(sizes[level])
    ]
    section = {"column": "level", **curriculum}
    return {"type": "list", "prompts": rows, "shuffle": False, "curriculum": section}


def load(source: dict[str, Any], seed: int = 0) -> TaskSource:
    return load_tasks(ADAPTER.validate_python(source), seed=seed)


def cursor(source: dict[str, Any] | None = None, seed: int = 0) -> CurriculumCursor:
    made = load(source or levelled(), seed).cursor("prompt_source")
    assert isinstance(made, CurriculumCursor)
    return made


def texts(data: TaskCursor, number: int) -> list[str]:
    return [task.prompt[-1].content for _, task in islice(data, number)]


def outcomes(level: str, *rewards: float) -> list[Rollout]:
    task = next(t for t in load(levelled()).epoch(0) if t.metadata["level"] == level)
    return [Rollout(task=task, reward=reward) for reward in rewards]


TOTAL = success_of(None)


# --- shares ---


@pytest.mark.parametrize(
    ("successes", "rollouts", "expected"),
    [
        (0, 0, 1.0),
        (1, 2, 1.0),
        (8, 8, 0.36),  # p = 9 / 10
        (0, 8, 0.36),
        (3, 4, 8 / 9),  # p = 4 / 6
        (64, 64, 0.1),  # 4 * 65 / 66 / 66 = 0.0597 is less
    ],
)
def test_a_weight_is_the_variance_of_a_success(
    successes: int, rollouts: int, expected: float
) -> None:
    assert weight(successes, rollouts, least=0.1) == pytest.approx(expected, abs=1e-12)


def test_shares_are_sizes_times_weights() -> None:
    data = cursor()
    assert data.shares() == {"easy": 0.75, "hard": 0.25}
    data.observe(outcomes("easy", *[1.0] * 8) + outcomes("hard", 1.0, 0.0), TOTAL)
    easy = 6 * 0.36
    assert data.shares()["easy"] == pytest.approx(easy / (easy + 2), abs=1e-12)
    metrics = data.metrics()
    assert metrics["curriculum/level=easy/share"] == data.shares()["easy"]
    assert metrics["curriculum/level=easy/success"] == 1.0
    assert metrics["curriculum/level=hard/success"] == 0.5


def test_success_is_that_of_the_latest_rollouts_of_a_level() -> None:
    data = cursor(levelled(window=4, min_weight=0.9))
    data.observe(outcomes("easy", 0, 0, 0, 1, 1), TOTAL)
    assert data.metrics()["curriculum/level=easy/success"] == 0.5
    data.observe(outcomes("easy", 1, 1, 1), TOTAL)
    assert data.metrics()["curriculum/level=easy/success"] == 1.0
    assert data.shares()["easy"] == pytest.approx(6 * 0.9 / (6 * 0.9 + 2)), "4 * 5/6 * 1/6 < 0.9"
    assert "curriculum/level=hard/success" not in data.metrics()


def test_what_does_not_train_measures_nothing() -> None:
    data = cursor()
    masked, frozen, other = outcomes("easy", 1, 1, 1)
    masked.mask("engine", "away")
    frozen.trainable = False
    other.task = Task("made up", ())
    data.observe([masked, frozen, other, Rollout()], TOTAL)
    assert data.shares() == {"easy": 0.75, "hard": 0.25}


# --- order ---


def test_levels_come_by_share_and_their_tasks_each_once_before_any_again() -> None:
    data = cursor()
    assert texts(data, 8) == [
        "easy0", "easy1", "hard0", "easy2", "easy3", "easy4", "hard1", "easy5"]  # fmt: skip
    data.observe(outcomes("easy", *[1.0] * 64) + outcomes("hard", *[1.0, 0.0] * 32), TOTAL)
    seen = Counter(text[:4] for text in texts(data, 26))
    assert seen == {"easy": 6, "hard": 20}, "shares are 6 * 0.1 and 2 * 1 of 2.6"


def test_epochs_are_those_of_the_levels() -> None:
    data = cursor(levelled({"a": 2, "b": 2}))
    drawn = list(islice(data, 6))
    assert [(epoch, task.prompt[0].content) for epoch, task in drawn] == [
        (0, "a0"), (0, "b0"), (0, "a1"), (0, "b1"), (1, "a0"), (1, "b0")]  # fmt: skip
    assert len({(epoch, task.id) for epoch, task in drawn}) == 6


def test_a_source_with_a_curriculum_has_all_its_tasks_in_an_epoch() -> None:
    source = load(levelled())
    assert len(source) == 8 == len(list(source.epoch(0))) == len(list(source.known()))
    assert source.summary().splitlines()[:2] == [
        "8 rows read, 8 kept", "curriculum by level: easy (6), hard (2)"]  # fmt: skip


# --- resuming ---

measured = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.booleans(), min_size=1, max_size=6)), max_size=8
)


def steps(data: TaskCursor, plan: Sequence[tuple[int, list[bool]]]) -> list[tuple[int, Task]]:
    """Some tasks, what became of them, some more tasks, and so on."""
    taken = []
    for number, won in plan:
        drawn = list(islice(data, number))
        data.observe([Rollout(task=drawn[-1][1], reward=float(w)) for w in won], TOTAL)
        taken += drawn
    return taken


few = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)


@few
@given(measured, measured, st.booleans(), st.integers(0, 3))
def test_a_restored_curriculum_goes_on_the_same(
    before: Any, after: Any, shuffle: bool, seed: int
) -> None:
    source = {**levelled({"a": 5, "b": 3, "c": 1}, window=9), "shuffle": shuffle}
    whole = cursor(source, seed)
    steps(whole, before)
    position = json.loads(json.dumps(whole.position()))
    expected = steps(whole, after)
    again = cursor(source, seed)
    steps(again, [(2, [True])])
    again.restore(position)
    assert again.position() == position
    assert steps(again, after) == expected
    assert again.position() == whole.position()


@few
@given(st.integers(0, 2), st.integers(1, 5), st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_was_drawn_ahead_is_drawn_again(staleness: int, stop: int, won: list[bool]) -> None:
    """A pipeline that is stopped after any step goes on with the tasks that the other one has,
    whatever was under way, given that the same was measured."""

    async def sample(epoch: int, task: Task) -> list[Rollout]:
        return [Rollout(task=task, group_id=f"{epoch}/{task.id}")]

    async def train(data: TaskCursor, first: int, last: int) -> tuple[list[Any], dict[str, Any]]:
        pipeline, taken = Pipeline(data, sample), []
        for step in range(first, last):
            pipeline.begin_step()
            groups = await pipeline.take(2, ahead=2 * min(staleness, 5 - step))
            rollouts = [group.rollouts[0] for group in groups]
            for rollout, good in zip(rollouts, won[2 * step :], strict=False):
                rollout.reward = float(good)
            taken += [rollout.group_id for rollout in rollouts]
            data.observe(rollouts, TOTAL)
        position = json.loads(json.dumps(pipeline.position()))
        await pipeline.close()
        return taken, position

    async def compared() -> None:
        source = levelled({"a": 5, "b": 3}, window=3)
        expected, end = await train(cursor(source), 0, 6)
        start, position = await train(cursor(source), 0, stop)
        again = cursor(source)
        again.restore(position)
        rest, other_end = await train(again, stop, 6)
        assert start + rest == expected
        assert other_end == end

    asyncio.run(compared())


def test_of_draws_only_those_since_the_oldest_mark_are_kept() -> None:
    def kept() -> int:
        gc.collect()
        return sum(type(found) is Draw for found in gc.get_objects())

    before = kept()
    data = cursor()
    texts(data, 50)
    assert kept() - before == 1
    mark = data.mark()
    expected = texts(data, 7)
    assert kept() - before == 8
    again = cursor()
    again.restore(json.loads(json.dumps(data.rewound(mark))))
    assert texts(again, 7) == expected


def test_a_draw_costs_no_position_of_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    position = Cursor.position

    def counted(self: Cursor[Task]) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return position(self)

    async def sample(epoch: int, task: Task) -> list[Rollout]:
        return [Rollout(task=task)]

    async def draw(data: TaskCursor) -> None:
        pipeline = Pipeline(data, sample)
        await pipeline.take(100)
        monkeypatch.setattr(Cursor, "position", counted)
        await pipeline.take(100)

    asyncio.run(draw(cursor(levelled({f"level{i}": 3 for i in range(100)}))))
    assert asked == 100


@few
@given(st.lists(st.booleans(), max_size=20), st.integers(1, 5))
def test_a_window_counts_the_latest(outcomes: list[bool], size: int) -> None:
    window = Window(size)
    for won in outcomes:
        window.add(won)
    assert list(window) == outcomes[-size:]
    assert (len(window), window.successes) == (len(list(window)), sum(window))


def test_other_levels_are_other_data() -> None:
    data = cursor(levelled({"a": 2, "b": 2}))
    with pytest.raises(UserError, match="levels were a, b and are a, c now"):
        cursor(levelled({"a": 2, "c": 2})).restore(data.position())
    list(islice(data, 3))
    changed = levelled({"a": 2, "b": 2})
    changed["prompts"][0]["answer"] = 7
    with pytest.raises(UserError, match="prompt_source: the data is not what the run was trained"):
        cursor(changed).restore(data.position())


# --- what success is ---


def test_success_is_that_of_the_evaluation_unless_the_curriculum_says() -> None:
    part = RewardPart("exact", "rollout", None, raw=0.6, weight=1.0, value=0.6)
    rollout = Rollout(reward=0.7, reward_parts=[part])
    evaluation = EvaluationConfig.model_validate({
        "prompt_source": {"type": "list", "prompts": ["a"]},
        "success_reward": "exact", "success_threshold": 0.6,
    })  # fmt: skip
    assert not success_of(None)(rollout, None, None), "0.7 is less than 1"
    assert success_of(evaluation)(rollout, None, None)
    assert success_of(evaluation)(rollout, None, 0.7), "the total, by a threshold of its own"
    assert not success_of(evaluation)(rollout, "exact", None), "0.6 is less than 1"
    assert success_of(None)(rollout, "exact", 0.5)


def run_config(output_dir: Path, **curriculum: Any) -> dict[str, Any]:
    section = {"column": "parity", "success_threshold": 0.01, "window": 8, **curriculum}
    return rl_config(
        output_dir,
        prompt_source={"type": "python", "function": "runs:questions", "curriculum": section},
        environment={"type": "qa"},
        algorithm={"hyperparameters": hyperparameters(steps=4, prompts_per_step=3)},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )


def test_a_run_measures_and_is_resumed_to_the_bit(tmp_path: Path) -> None:
    config = run_config(tmp_path / "whole", success_reward="digits")
    assert "curriculum by parity: 0 (20), 1 (20)" in check(load_config(config))
    run = retrain.run_sync(config)
    rows = metrics_of(run.path)
    for row in rows:
        success = [row.get(f"curriculum/parity={p}/success") for p in (0, 1)]
        assert any(value is not None for value in success)
        assert sum(row[f"curriculum/parity={p}/share"] for p in (0, 1)) == pytest.approx(1)
    assert len({row["curriculum/parity=0/share"] for row in rows}) > 1
    assert_resumed_the_same(run.path, run_config(tmp_path, success_reward="digits"), after=2)


def test_the_reward_that_decides_has_to_be_there(tmp_path: Path) -> None:
    config = run_config(tmp_path, success_reward="digit")
    for act in (lambda: check(load_config(config)), lambda: retrain.run_sync(config)):
        with pytest.raises(UserError, match=r"success_reward: there is no reward 'digit'") as told:
            act()
        assert digits.__name__ in told.value.next_step


def test_so_has_the_one_that_it_takes_from_the_evaluation(tmp_path: Path) -> None:
    config = run_config(tmp_path, success_threshold=None)
    config["evaluation"] = {
        "prompt_source": {"type": "python", "function": "runs:questions"},
        "success_reward": "digit",
    }
    config["stages"] = [{"kind": "rl"}]  # none evaluates, which would look at it too
    fault = r"evaluation\.success_reward, which prompt_source\.curriculum goes by: there is no rew"
    for act in (lambda: check(load_config(config)), lambda: retrain.run_sync(config)):
        with pytest.raises(UserError, match=fault):
            act()


@pytest.mark.parametrize("own", [{"success_threshold": 0.5}, {"success_reward": "digits"}])
def test_an_evaluation_does_not_matter_to_a_curriculum_with_a_key_of_its_own(own: Any) -> None:
    source = ADAPTER.validate_python(levelled(**own))
    evaluation = EvaluationConfig.model_validate(
        {"prompt_source": {"type": "list", "prompts": ["a"]}, "success_reward": "digit"}
    )
    check_curricula(source, evaluation, ["digits"])
    with pytest.raises(UserError, match="there is no reward 'digit'"):
        check_curricula(ADAPTER.validate_python(levelled()), evaluation, ["digits"])


# --- what cannot be ---


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"prompt": "a"}], "task .* has no metadata 'level'"),
        ([{"prompt": "a", "level": None}], "task .* has no metadata 'level'"),
        ([{"prompt": "a", "level": 1}], "'level' has 1 different values in 1 tasks"),
        ([{"prompt": f"{i}", "level": i} for i in range(101)], "has 101 different values"),
    ],
)
def test_levels_that_are_none_are_refused(rows: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load({"type": "list", "prompts": rows, "curriculum": {"column": "level"}})


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"curriculum": {"column": "l"}, "streaming": True}, "curriculum needs every task in mem"),
        ({"curriculum": {"column": ""}}, "at least 1 character"),
        ({"curriculum": {"column": "l", "window": 0}}, "greater than 0"),
        ({"curriculum": {"column": "l", "min_weight": 0}}, "greater than 0"),
        ({"curriculum": {"column": "l", "min_weight": 1.1}}, "less than or equal to 1"),
        ({"curriculum": {"column": "l", "success_threshold": float("nan")}}, "finite"),
    ],
)
def test_keys_that_cannot_act_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ADAPTER.validate_python({"type": "file", "path": "x.jsonl", **keys})


def test_an_evaluation_refuses_a_curriculum() -> None:
    evaluation = {"prompt_source": levelled()}
    with pytest.raises(UserError, match=r"evaluation.prompt_source: curriculum has no effect"):
        load_config(rl_config(Path("runs"), evaluation=evaluation))
