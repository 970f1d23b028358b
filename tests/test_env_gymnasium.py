"""Gymnasium's environments: its own Frozen Lake as it is, and environments on its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium")

import retrain
from adapting import Adapted, built, check_exact, train, weights_changed
from gym_worlds import LAKE, Guess
from retrain.config import load_config
from retrain.envs.adapters.gymnasium import GymnasiumEnvironment
from retrain.loops.check import check
from retrain.types import Message, MessageType, Rollout, Task, UserError
from runs import rl_config
from test_docs import blocks, parse
from test_envs import Speaker, tagged

TASK = Task("t", (Message("Play.", MessageType.MESSAGE),), metadata={"options": {"digit": 4}})


async def play(environment: GymnasiumEnvironment, *lines: str, task: Task = TASK) -> Rollout:
    rollout = await environment.spawn().run(task, Speaker(lines))
    assert isinstance(rollout, Rollout)
    return rollout


def texts(rollout: Rollout) -> list[str]:
    return [message.content for message in rollout.messages]


def guess(**settings: Any) -> GymnasiumEnvironment:
    return GymnasiumEnvironment("gym_worlds:Guess", **settings)


async def test_words_are_actions_and_observations_are_read() -> None:
    rollout = await play(guess(), "I think\n 2 ", "3", "4")
    assert texts(rollout) == [
        "Play.\n\nguess", "I think\n 2 ", "higher", "3", "higher", "4", "yes",
    ]  # fmt: skip
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.25, 0.25, 1.0], "environment")
    assert "invalid_actions" not in rollout.metrics


async def test_truncation_ends_too() -> None:
    rollout = await play(guess(params={"most": 1}), "9", "9")
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.25], "environment")
    by_id = GymnasiumEnvironment("gym_worlds:Guess-v0", observation_field="tries")
    rollout = await play(by_id, "9", "9", "9")
    assert (texts(rollout)[0], rollout.env_rewards) == ("Play.\n\n0", [0.25, 0.0])


async def test_an_invalid_action_is_shown_and_does_not_reach_the_environment() -> None:
    environment = guess(action_pattern=r"<a>(.*?)</a>", invalid_reward=-0.5, max_steps=4)
    rollout = await play(environment, "4", "<a>44</a>", "<a>4</a> no, <a>\n5\n</a>", "<a>4</a>")
    assert rollout.env_rewards == [-0.5, -0.5, 0.25, 1.0]
    assert rollout.metrics["invalid_actions"] == 2.0
    assert texts(rollout)[2] == "Invalid action: the answer has nothing that matches <a>(.*?)</a>."
    assert texts(rollout)[4].startswith("Invalid action: '44' is not in Text(1, 1")


async def test_max_steps() -> None:
    rollout = await play(guess(max_steps=2, params={"most": 9}), "9", "8", "7")
    assert (len(rollout.env_rewards), rollout.stop_reason) == (2, "max_steps")


async def test_the_seed_is_the_tasks() -> None:
    """A group begins alike; tasks differ; a column decides."""

    async def digit(task_id: str, **metadata: int) -> int:
        environment = guess().spawn()
        task = Task(task_id, TASK.prompt, metadata=metadata)
        await environment.reset(task)
        found = environment._env.digit
        await environment.finish(Rollout())
        return int(found)

    digits = [await digit(f"t{n}") for n in range(12)]
    assert digits == [await digit(f"t{n}") for n in range(12)] and len(set(digits)) > 3
    seeded = {await digit(f"t{n}", seed=3) for n in range(5)}
    assert len(seeded) == 1
    with pytest.raises(UserError, match="column 'seed' is -1"):
        await digit("t", seed=-1)


async def test_one_thread_and_one_close_for_each_rollout() -> None:
    Guess.threads.clear()
    Guess.closed.clear()
    await play(guess(), "1", "2", "3")
    await play(guess(), "1", "2", "3")
    assert len(Guess.closed) == 2
    assert len(Guess.threads) == len({instance for instance, _ in Guess.threads})


async def test_numbers_take_the_spaces_shape() -> None:
    environment = GymnasiumEnvironment("gym_worlds:Point", action="number", max_steps=5)
    rollout = await play(environment, "[0.5, -0.25]", "0.5", "2 2", "nan 0", "x 1")
    assert rollout.env_rewards == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert rollout.metrics["invalid_actions"] == 4.0
    assert texts(rollout)[2] == "[0.25]"


async def test_frozen_lake_by_number_and_by_name() -> None:
    params = {"is_slippery": False}
    lake = GymnasiumEnvironment("FrozenLake-v1", params=params, action="number", max_steps=3)
    rollout = await play(lake, "2", "9", "1.5", task=Task("t", TASK.prompt))
    assert texts(rollout)[0::2][:2] == ["Play.\n\n0", "1"]
    assert rollout.metrics["invalid_actions"] == 2.0
    places = [f"at {row},{column}" for row in range(4) for column in range(4)]
    lake = GymnasiumEnvironment(
        "FrozenLake-v1", params=params, action="choice", choices=LAKE, observations=places
    )
    route = ["down", "DOWN", "right", "right", "down", "right"]
    rollout = await play(lake, *route, task=Task("t", TASK.prompt))
    assert texts(rollout)[2::2] == ["at 1,0", "at 2,0", "at 2,1", "at 2,2", "at 3,2", "at 3,3"]
    assert (sum(rollout.env_rewards), rollout.stop_reason) == (1.0, "environment")


async def test_names_must_fit_the_space() -> None:
    lake = GymnasiumEnvironment("FrozenLake-v1", action="choice", choices=["left", "right"])
    with pytest.raises(UserError, match="choices names 2 things"):
        await play(lake, "left")


async def test_an_environment_that_raises_is_the_users_fault() -> None:
    with pytest.raises(UserError, match=r"step failed: ZeroDivisionError: no such world \(.*gym_w"):
        await play(GymnasiumEnvironment("gym_worlds:Broken"), "x")


@pytest.mark.parametrize(
    ("id", "fault"),
    [
        ("Nowhere-v0", "cannot make 'Nowhere-v0'"),
        ("no_such_module:Guess-v0", "No module named"),
        ("gym_worlds:LAKE", "not a subclass of gymnasium.Env"),
        ("gym_worlds:Gues", "does not define"),
    ],
)
def test_what_is_no_environment_is_refused_at_once(id: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        GymnasiumEnvironment(id)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"action": "choice"}, "need each other"),
        ({"choices": ["a"]}, "need each other"),
        ({"observations": ["a"], "observation_field": "x"}, "no observation_field"),
        ({"action_pattern": "("}, "not a regular expression"),
        ({"action_pattern": "x"}, "has no group"),
    ],
)
def test_keys_that_cannot_act_are_refused(keys: dict[str, Any], fault: str, tmp_path: Path) -> None:
    environment = {"type": "gymnasium", "id": "FrozenLake-v1", **keys}
    with pytest.raises(UserError, match=fault):
        retrain.run_sync(rl_config(tmp_path, environment=environment, reward_setup={}))


def test_every_key_reaches_the_environment() -> None:
    given: dict[str, Any] = {
        "params": {"is_slippery": False},
        "action": "choice",
        "choices": LAKE,
        "action_pattern": "<a>(.*?)</a>",
        "observations": ["a", "b"],
        "max_steps": 3,
        "invalid_reward": -0.5,
    }
    made, line = built(tagged(), type="gymnasium", id="FrozenLake-v1", **given)
    assert isinstance(made, GymnasiumEnvironment) and made.pattern is not None
    assert (made.id, made.params, made.action) == ("FrozenLake-v1", given["params"], "choice")
    assert (made.choices, made.observations) == (tuple(LAKE), ("a", "b"))
    assert (made.pattern.pattern, made.max_steps) == ("<a>(.*?)</a>", 3)
    assert made.invalid_reward == -0.5
    assert line == "FrozenLake-v1; at most 3 turns"
    made, _ = built(tagged(), type="gymnasium", id="FrozenLake-v1", observation_field="x")
    assert isinstance(made, GymnasiumEnvironment) and made.observation_field == "x"


def test_the_configs_on_the_page_load(tmp_path: Path) -> None:
    texts = [block.text for block in blocks("docs/environments.md") if block.language == "yaml"]
    loaded = [load_config(rl_config(tmp_path) | {"reward_setup": {}} | parse(t)) for t in texts]
    kinds = [config.environment.type for config in loaded]
    assert kinds == ["gymnasium", "openenv", "openenv", "verifiers", "qa"]
    assert "FrozenLake-v1; at most 20 turns" in check(loaded[0])


async def test_a_pattern_takes_all_that_was_said() -> None:
    environment = guess(action_pattern=r"\A(.*)")
    assert (await play(environment, "\n4\n")).env_rewards == [1.0]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return train(
        tmp_path_factory.mktemp("lake"),
        sft="gym_worlds:lake_traces",
        environment={
            "type": "gymnasium",
            "id": "FrozenLake-v1",
            "params": {"desc": ["SG", "FF"], "is_slippery": False},
            "action": "choice",
            "choices": LAKE,
            "observations": ["start", "goal", "below", "corner"],
            "max_steps": 3,
            "invalid_reward": -0.5,
        },
        prompt_source={"type": "python", "function": "gym_worlds:lake_tasks"},
    )


def test_a_training_step_in_gymnasiums_own_environment(lake: Adapted) -> None:
    check_exact(lake)
    assert weights_changed(lake)
    assert {r.messages[0].content.split("\n\n")[1] for r in lake.rollouts} == {"start"}
    crossed = [r for r in lake.rollouts if r.stop_reason == "environment"]
    assert crossed and all(r.messages[-1].content == "goal" for r in crossed)
    assert all(r.env_rewards[-1] == 1.0 for r in crossed)


def test_a_training_step_in_a_text_environment(tmp_path: Path) -> None:
    trained = train(
        tmp_path,
        sft="gym_worlds:guess_traces",
        environment={"type": "gymnasium", "id": "gym_worlds:Guess", "params": {"most": 2}},
        prompt_source={"type": "python", "function": "gym_worlds:guess_tasks"},
    )
    check_exact(trained)
    assert weights_changed(trained)
    assert {0.25, 1.0} & {value for r in trained.rollouts for value in r.env_rewards}
