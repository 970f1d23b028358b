"""The calculator: hand-computed rewards, gates, strategies, failures, warnings."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.rewards import (
    RewardCalculator,
    RewardFailure,
    RewardSpec,
    verifier,
)
from retrain.types import InfrastructureError, Message, MessageType, Rollout, Task, UserError


def dialogue(*said: str, answer: object = None, env: tuple[float, ...] = ()) -> Rollout:
    """A rollout in which the model says each of `said`, with a user before every turn."""
    rollout = Rollout(task=Task("t1", (), answer), env_rewards=list(env))
    for text in said:
        rollout.add_messages(
            Message("go on", MessageType.MESSAGE), Message(text, MessageType.MODEL)
        )
    return rollout


def constant(value: object):
    return lambda rollout: value


def spec(value: object = 1.0, name: str = "r", **options: object) -> RewardSpec:
    return RewardSpec(name, constant(value), "rollout", **options)


def score(calculator: RewardCalculator, *rollouts: Rollout) -> None:
    asyncio.run(calculator.score(list(rollouts)))


def values(rollout: Rollout) -> list[tuple[str, int | None, float]]:
    return [(part.name, part.turn, part.value) for part in rollout.reward_parts]


@verifier
def says_cat(rollout: Rollout) -> bool:
    return "cat" in rollout.completion


@verifier
def never(rollout: Rollout) -> bool:
    return False


def chars(rollout: Rollout, step: int) -> float:
    return len(rollout.messages[rollout.model_messages[step]].content)


def test_turn_reward_is_intrinsic_plus_steps_plus_distributed():
    rollout = dialogue("a", "bbb", env=(0.25, 0.0))
    specs = [
        RewardSpec("chars", chars, "step", weight=0.5),
        spec(6.0, "spread", weight=2.0, distribution_strategy="all_steps_average"),
        spec(10.0, "end"),
        spec(1.0, "each", distribution_strategy="all_steps_equal"),
    ]
    score(RewardCalculator(specs), rollout)
    # turn 0: 0.25 + 0.5*1 + 12/2 + 1; turn 1: 0 + 0.5*3 + 12/2 + 10 + 1
    assert rollout.step_rewards == [7.75, 18.5]
    assert rollout.reward == 26.25
    assert values(rollout) == [
        ("environment", 0, 0.25),
        ("environment", 1, 0.0),
        ("chars", 0, 0.5),
        ("chars", 1, 1.5),
        ("spread", 0, 6.0),
        ("spread", 1, 6.0),
        ("end", 1, 10.0),
        ("each", 0, 1.0),
        ("each", 1, 1.0),
    ]
    spread = rollout.reward_parts[4]
    assert (spread.raw, spread.weight, spread.kind) == (6.0, 2.0, "rollout")


def test_scoring_again_replaces_the_first_result():
    rollout = dialogue("a")
    calculator = RewardCalculator([spec(3.0)])
    score(calculator, rollout)
    score(calculator, rollout)
    assert rollout.reward == 3.0 and len(rollout.reward_parts) == 1


def test_failed_verifier_replaces_its_component_unweighted_and_skips_the_function():
    called = []

    def counted(rollout: Rollout) -> float:
        called.append(rollout)
        return 5.0

    gated = RewardSpec(
        "gated",
        counted,
        "rollout",
        weight=10.0,
        verifiers=(("says_cat", says_cat),),
        verifier_penalty=-2.0,
    )
    dog, cat = dialogue("dog", "dog"), dialogue("cat")
    score(RewardCalculator([gated, spec(1.0)]), dog, cat)
    assert called == [cat]
    assert dog.step_rewards == [0.0, -1.0] and dog.reward == -1.0
    part = dog.reward_parts[0]
    assert (part.name, part.kind, part.verifier) == ("gated", "rollout", "says_cat")
    assert (part.raw, part.weight, part.value) == (-2.0, 1.0, -2.0)
    assert cat.reward == 51.0


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("last_step", [0.0, -3.0]),
        ("all_steps_average", [-1.5, -1.5]),
        ("all_steps_equal", [-3.0, -3.0]),
    ],
)
@pytest.mark.parametrize("kind", ["step", "rollout", "group"])
def test_penalty_is_spread_by_the_strategy_of_its_reward(kind, strategy, expected):
    functions = {"step": chars, "rollout": constant(1.0), "group": lambda rs: [1.0] * len(rs)}
    gated = RewardSpec(
        "gated",
        functions[kind],
        kind,
        verifiers=(("never", never),),
        verifier_penalty=-3.0,
        distribution_strategy=strategy,
    )
    rollout = dialogue("dog", "dog")
    score(RewardCalculator([gated]), rollout)
    assert rollout.step_rewards == expected


def test_failed_verifier_of_the_set_up_is_all_there_is():
    called = []
    specs = [RewardSpec("r", lambda rollout: called.append(1) or 1.0, "rollout")]
    calculator = RewardCalculator(
        specs, verifiers=[("says_cat", says_cat), ("never", never)], verifier_penalty=-4.0
    )
    rollout = dialogue("dog", "dog", env=(7.0, 7.0))
    score(calculator, rollout)
    assert not called
    assert rollout.reward == -4.0 and rollout.step_rewards == [0.0, -4.0]
    (part,) = rollout.reward_parts
    assert (part.name, part.kind, part.verifier) == ("says_cat", "verifier", "says_cat")


def test_a_gated_rollout_takes_no_part_in_group_rewards():
    seen = []

    def first_best(rollouts: list[Rollout]) -> list[float]:
        seen.extend(rollouts)
        return [10.0] * len(rollouts)

    dog, cat = dialogue("dog"), dialogue("cat")
    calculator = RewardCalculator(
        [RewardSpec("best", first_best, "group")],
        verifiers=[("says_cat", says_cat)],
        verifier_penalty=-4.0,
    )
    score(calculator, dog, cat)
    assert seen == [cat] and (dog.reward, cat.reward) == (-4.0, 10.0)


def test_a_verifier_is_asked_once_per_rollout_and_not_past_the_first_failure():
    asked = []

    async def counted(rollout: Rollout) -> bool:
        asked.append(rollout.id)
        return True

    def unreachable(rollout: Rollout) -> bool:
        raise RuntimeError("asked after a failure")

    gates = (("counted", counted), ("never", never), ("unreachable", unreachable))
    calculator = RewardCalculator(
        [spec(1.0, "a", verifiers=gates), spec(1.0, "b", verifiers=gates)],
        verifiers=[("counted", counted)],
    )
    first, second = dialogue("x"), dialogue("y")
    score(calculator, first, second)
    assert sorted(asked) == sorted([first.id, second.id])
    assert first.reward == 0.0


def test_without_turns_the_reward_is_kept_with_no_turn():
    rollout = dialogue()
    specs = [
        spec(2.0, "a", distribution_strategy="all_steps_average"),
        spec(3.0, "b", distribution_strategy="all_steps_equal"),
        RewardSpec("c", chars, "step"),
        spec(9.0, "d", verifiers=(("never", never),), verifier_penalty=-1.0),
    ]
    score(RewardCalculator(specs), rollout)
    assert rollout.step_rewards == [] and rollout.reward == 4.0
    assert sorted(values(rollout)) == [("a", None, 2.0), ("b", None, 3.0), ("d", None, -1.0)]


def test_group_reward_sees_those_that_pass():
    def rank(rollouts: list[Rollout], *, best: float) -> list[float]:
        return [best - i for i in range(len(rollouts))]

    ranked = RewardSpec(
        "rank",
        rank,
        "group",
        weight=2.0,
        params={"best": 5.0},
        verifiers=(("says_cat", says_cat),),
        verifier_penalty=-1.0,
    )
    broken = dialogue("cat")
    broken.error = "engine lost"
    group = [dialogue("cat"), broken, dialogue("dog"), dialogue("cat", "cat")]
    score(RewardCalculator([ranked]), *group)
    assert [r.reward for r in group] == [10.0, 0.0, -1.0, 8.0]
    assert group[3].step_rewards == [0.0, 8.0]
    assert group[1].reward_parts == [] and group[1].error == "engine lost"


def test_async_rewards_of_a_group_run_at_the_same_time():
    running = 0
    together = asyncio.Event()

    async def waits_for_all(rollout: Rollout) -> float:
        nonlocal running
        running += 1
        if running == 4:
            together.set()
        await asyncio.wait_for(together.wait(), 5)
        return 1.0

    group = [dialogue("x") for _ in range(4)]
    score(RewardCalculator([RewardSpec("r", waits_for_all, "rollout")]), *group)
    assert [r.reward for r in group] == [1.0] * 4


def raises(rollout: Rollout) -> float:
    raise KeyError("gold")


BAD = [
    (raises, "KeyError: 'gold'"),
    (constant(math.nan), "nan"),
    (constant(-math.inf), "-inf"),
    (constant("1.0"), "'1.0'"),
    (constant(None), "None"),
]


@pytest.mark.parametrize(("function", "shown"), BAD)
def test_on_error_stop_names_the_reward_and_shows_the_rollout(function, shown):
    rollout = dialogue("meow " * 100)
    with pytest.raises(RewardFailure) as caught:
        score(RewardCalculator([RewardSpec("mood", function, "rollout")]), rollout)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert caught.value.rollout is rollout
    assert "reward 'mood'" in message and shown in message
    assert rollout.id in message and "t1" in message and "meow meow" in message
    assert len(message) < 1500
    assert rollout.reward_parts == []


@pytest.mark.parametrize(("function", "shown"), BAD)
def test_on_error_mask(function, shown):
    bad = RewardSpec("mood", function, "rollout")
    rollout = dialogue("x", env=(1.0,))
    score(RewardCalculator([spec(1.0), bad], on_error="mask"), rollout)
    assert rollout.error is not None and "mood" in rollout.error and shown in rollout.error
    assert rollout.reward_parts == [] and rollout.reward == 0.0


@pytest.mark.parametrize(("function", "shown"), BAD)
def test_on_error_penalty(function, shown):
    bad = RewardSpec("mood", function, "rollout", 9.0, distribution_strategy="all_steps_average")
    rollout = dialogue("x", "y")
    score(RewardCalculator([spec(1.0), bad], on_error="penalty", error_penalty=-4.0), rollout)
    assert rollout.step_rewards == [-2.0, -1.0] and rollout.error is None
    assert [shown in (part.error or "") for part in rollout.reward_parts] == [False, True, True]


def test_a_step_reward_that_fails_at_one_turn_becomes_one_penalty():
    def second_fails(rollout: Rollout, step: int) -> float:
        return 1.0 / (1 - step)

    specs = [RewardSpec("steps", second_fails, "step")]
    rollout = dialogue("x", "y", "z")
    score(RewardCalculator(specs, on_error="penalty", error_penalty=-4.0), rollout)
    assert rollout.step_rewards == [0.0, 0.0, -4.0]


def test_a_weight_that_overflows_is_a_failure():
    with pytest.raises(RewardFailure, match="inf"):
        score(RewardCalculator([spec(1e308, weight=100.0)]), dialogue("x"))


@pytest.mark.parametrize("verdict", [1, None, "yes", 0.0])
def test_a_verifier_must_return_a_bool(verdict):
    gates = (("odd", constant(verdict)),)
    with pytest.raises(RewardFailure, match="verifier 'odd' of reward 'r'"):
        score(RewardCalculator([spec(verifiers=gates)]), dialogue("x"))
    with pytest.raises(RewardFailure, match="verifier 'odd'"):
        score(RewardCalculator([spec()], verifiers=gates), dialogue("x"))
    own, whole = dialogue("x"), dialogue("x", env=(3.0,))
    options = {"on_error": "penalty", "error_penalty": -5.0}
    score(RewardCalculator([spec(verifiers=gates), spec(name="s")], **options), own)
    score(RewardCalculator([spec()], verifiers=gates, **options), whole)
    assert (own.reward, whole.reward) == (-4.0, -5.0)
    assert own.reward_parts[0].verifier == "odd" and own.reward_parts[0].error


def test_group_reward_failure_concerns_the_whole_group():
    def second_is_nan(rollouts: list[Rollout]) -> list[float]:
        return [1.0, math.nan]

    group = [dialogue("x"), dialogue("y")]
    specs = [RewardSpec("rank", second_is_nan, "group"), spec(1.0)]
    with pytest.raises(RewardFailure, match="for rollout 1") as caught:
        score(RewardCalculator(specs), *group)
    assert caught.value.rollout is group[1]
    score(RewardCalculator(specs, on_error="penalty", error_penalty=-2.0), *group)
    assert [r.reward for r in group] == [-1.0, -1.0]
    score(RewardCalculator(specs, on_error="mask"), *group)
    assert all(r.error and not r.reward_parts for r in group)


@pytest.mark.parametrize("returned", [[1.0], 3.0, None])
def test_group_reward_must_return_one_number_per_rollout(returned):
    specs = [RewardSpec("rank", lambda rollouts: returned, "group")]
    with pytest.raises(RewardFailure, match="rank"):
        score(RewardCalculator(specs), dialogue("x"), dialogue("y"))


def test_infrastructure_failure_masks_whatever_on_error_says():
    def lost(rollout: Rollout) -> float:
        if "cat" in rollout.completion:
            raise InfrastructureError("judge unreachable")
        return 1.0

    cat, dog = dialogue("cat"), dialogue("dog")
    score(RewardCalculator([RewardSpec("judge", lost, "rollout")]), cat, dog)
    assert cat.error == "reward 'judge': judge unreachable" and cat.reward_parts == []
    assert dog.reward == 1.0


@pytest.mark.parametrize("env", [(1.0,), (1.0, math.nan)])
def test_bad_intrinsic_rewards_fail_by_name(env):
    with pytest.raises(RewardFailure, match="environment reward"):
        score(RewardCalculator([]), dialogue("x", "y", env=env))


finite = st.floats(-1e6, 1e6)
STRATEGIES = ["last_step", "all_steps_average", "all_steps_equal"]


@given(
    rewards=st.lists(st.tuples(finite, finite, st.sampled_from(STRATEGIES)), max_size=5),
    env=st.lists(finite, max_size=6),
)
def test_parts_steps_and_reward_have_one_sum(rewards, env):
    specs = [
        spec(raw, f"r{i}", weight=weight, distribution_strategy=strategy)
        for i, (raw, weight, strategy) in enumerate(rewards)
    ]
    rollout = dialogue(*("x" for _ in env), env=tuple(env))
    score(RewardCalculator(specs), rollout)
    turns = max(len(env), 1)
    expected = math.fsum(env) + math.fsum(
        raw * weight * (turns if strategy == "all_steps_equal" else 1)
        for raw, weight, strategy in rewards
    )
    near = {"rel": 1e-9, "abs": 1e-2}
    assert rollout.reward == pytest.approx(expected, **near)
    assert rollout.reward == math.fsum(part.value for part in rollout.reward_parts)
    assert len(rollout.step_rewards) == len(env)
    if env:
        assert sum(rollout.step_rewards) == pytest.approx(rollout.reward, **near)
