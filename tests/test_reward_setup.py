"""Reward set-ups that are refused, and the warnings of `retrain check`."""

from __future__ import annotations

import math

import pytest

from retrain.rewards import RewardCalculator, RewardSpec, resolve_reward, reward, verifier
from retrain.types import Rollout, UserError


def spec(value: object = 1.0, name: str = "r", **options: object) -> RewardSpec:
    return RewardSpec(name, lambda rollout: value, "rollout", **options)


@verifier
def says_cat(rollout: Rollout) -> bool:
    return "cat" in rollout.completion


def chars(rollout: Rollout, step: int) -> float:
    return len(rollout.messages[rollout.model_messages[step]].content)


def test_params_are_checked_when_the_set_up_is_built():
    def judged(rollout: Rollout, *, strictness: float, style: str = "a") -> float:
        return strictness

    with pytest.raises(UserError) as caught:
        RewardSpec("taste", judged, "rollout", params={"strictnes": 1.0})
    message = str(caught.value)
    assert "taste" in message and "strictnes'" in message and "strictness, style" in message
    with pytest.raises(UserError, match="needs the parameter 'strictness'"):
        RewardSpec("taste", judged, "rollout")
    RewardSpec("any", lambda rollout, **params: 1.0, "rollout", params={"x": 1})
    RewardSpec("taste", judged, "rollout", params={"strictness": 1.0})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RewardSpec("r", lambda rollout: 1.0, "step"), "does not take"),
        (lambda: spec(kindness=1), "kindness"),
        (lambda: spec(distribution_strategy="first_step"), "last_step, all_steps_average"),
        (lambda: spec(weight=math.nan), "weight"),
        (lambda: spec(verifiers=(("two", lambda a, b: True),)), "two"),
        (lambda: RewardSpec("r", reward(kind="group")(lambda rs: []), "rollout"), "group reward"),
        (lambda: RewardCalculator([spec(), spec()]), "named 'r'"),
        (lambda: RewardCalculator([spec(verifier_penalty=-1.0)]), "no verifiers"),
        (lambda: RewardCalculator([spec()], verifier_penalty=-1.0), "no verifier"),
        (lambda: RewardCalculator([spec()], error_penalty=-1.0), "on_error is stop"),
        (lambda: RewardCalculator([spec()], on_error="ignore"), "stop, mask, penalty"),
        (
            lambda: RewardCalculator(
                [RewardSpec("s", chars, "step", distribution_strategy="all_steps_equal")]
            ),
            "own step",
        ),
    ],
)
def test_a_set_up_that_cannot_work_is_refused(build, message):
    with pytest.raises((UserError, TypeError), match=message):
        build()


def penalize(**options: object) -> RewardSpec:
    function = resolve_reward("penalize_text_containing", "rollout")
    return RewardSpec("no_s", function, "rollout", params={"text": "s"}, **options)


def test_warns_when_failing_the_verifier_pays_better():
    gates = (("says_cat", says_cat),)
    (own,) = RewardCalculator([penalize(verifiers=gates)]).warnings()
    assert "'no_s'" in own and "'says_cat' pays 0" in own and "-100" in own
    (weighted,) = RewardCalculator([penalize(verifiers=gates, weight=0.5)]).warnings()
    assert "as little as -50" in weighted
    (whole,) = RewardCalculator([penalize(), spec(1.0)], verifiers=gates).warnings()
    assert "set-up" in whole and "pays 0" in whole and "-100" in whole and "no_s" in whole
    flipped = RewardSpec(
        "not_cat",
        resolve_reward("contains", "rollout"),
        "rollout",
        weight=-3.0,
        params={"text": "cat"},
        verifiers=gates,
    )
    assert "as little as -3" in RewardCalculator([flipped]).warnings()[0]


def test_does_not_warn_when_failing_pays_no_better():
    gates = (("says_cat", says_cat),)
    assert RewardCalculator([penalize(verifiers=gates, verifier_penalty=-100.0)]).warnings() == []
    calm = RewardCalculator([penalize()], verifiers=gates, verifier_penalty=-100.0)
    assert calm.warnings() == []
    assert RewardCalculator([penalize()]).warnings() == []
    positive = RewardSpec("p", resolve_reward("f1", "rollout"), "rollout", verifiers=gates)
    assert RewardCalculator([positive]).warnings() == []


def test_a_users_declared_range_is_used():
    @reward(range=(-7.0, 0.0))
    def constraint(rollout: Rollout) -> float:
        return -7.0

    gated = RewardSpec("mine", constraint, "rollout", verifiers=(("says_cat", says_cat),))
    assert "as little as -7" in RewardCalculator([gated]).warnings()[0]
    assert constraint(Rollout()) == -7.0
