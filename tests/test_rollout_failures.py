"""Failed infrastructure: retried, then masked and counted; never a zero, never a lost step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import DialogueEnvironment, Environment, ScriptedUser
from retrain.loops.credit import Credit, rollout_advantages
from retrain.rendering import Codec, Renderer, make_template
from retrain.rewards import RewardFailure
from retrain.rollout import Sampler, request_seed, to_samples
from retrain.types import InfrastructureError, Message, MessageType, Task, UserError
from runs import hyperparameters, metrics_of, rl_config, rollouts_of
from tiny import byte_tokenizer, tiny_qwen3

TASK = Task("t", (Message("hello", MessageType.MESSAGE),))


class FlakyEngine(TorchEngine):
    """Refuses the first `failures` requests of each session in `sessions` (None: of all)."""

    def __init__(
        self, *args: Any, failures: int, sessions: set[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.failures = failures
        self.sessions = sessions
        self.asked: dict[str, int] = {}
        self.dead = False

    async def generate(self, request: GenerateRequest) -> Completion:
        session = str(request.session)
        self.asked[session] = self.asked.get(session, 0) + 1
        chosen = self.sessions is None or session in self.sessions
        if chosen and self.asked[session] <= self.failures:
            raise InfrastructureError("the server is away")
        return await super().generate(request)

    async def end_session(self, session: str) -> None:
        if self.dead:
            raise InfrastructureError("the server is away")
        await super().end_session(session)


def sampler(environment: Environment | None = None, **engine: Any) -> Sampler:
    tokenizer = byte_tokenizer()
    return Sampler(
        environment=environment or Environment(),
        engine=FlakyEngine(tiny_qwen3(), tokenizer=tokenizer, **engine),
        renderer=Renderer(Codec(tokenizer), make_template(tokenizer)),
        params=SamplingParams(6),
        run_seed=3,
        backoff_s=0.001,
    )


async def test_a_failure_is_retried_and_changes_nothing() -> None:
    calm, flaky = sampler(failures=0), sampler(failures=1)
    try:
        expected = await calm.group(TASK, 3)
        found = await flaky.group(TASK, 3)
        assert [r.error for r in found] == [None] * 3
        assert [r.full_token_ids() for r in found] == [r.full_token_ids() for r in expected]
        assert len({tuple(r.full_token_ids()) for r in found}) == 3
        assert [r.id for r in found] == ["0/t/0", "0/t/1", "0/t/2"]
        assert {r.group_id for r in found} == {"0/t"}
    finally:
        await calm.engine.close()
        await flaky.engine.close()


@pytest.mark.parametrize("dead", [False, True])
async def test_a_lasting_failure_masks_the_rollout_only(dead: bool) -> None:
    flaky = sampler(failures=99, sessions={"0/t/1"})
    assert isinstance(flaky.engine, FlakyEngine)
    flaky.engine.dead = dead
    try:
        group = await flaky.group(TASK, 3)
    finally:
        await flaky.engine.close()
    error = "InfrastructureError: the server is away (3 attempts)"
    assert [r.error for r in group] == [None, error, None]
    assert group[1].stop_reason == "error" and group[1].segments == []
    assert flaky.engine.asked["0/t/1"] == 3
    for rollout, reward in zip(group, (1.0, 0.0, 3.0), strict=True):
        rollout.reward = reward
    samples = [sample for rollout in group for sample in to_samples(rollout)]
    Credit(normalize_advantages="none").assign([group], samples)
    assert rollout_advantages(samples) == {"0/t/0": -1.0, "0/t/2": 1.0}


async def test_a_users_mistake_stops_at_the_first() -> None:
    dialogue = DialogueEnvironment(ScriptedUser(column="lines"))
    flaky = sampler(dialogue, failures=0)
    task = Task("t", TASK.prompt, metadata={"other": 1})
    try:
        with pytest.raises(UserError, match="column 'lines' must hold a list") as failure:
            await flaky.groups([(0, task)] * 2, 8, score=_nothing)
        assert "Columns of this task: other" in str(failure.value)
    finally:
        await flaky.engine.close()


async def _nothing(group: Any) -> None:
    return None


async def test_a_prompt_that_leaves_no_room_names_the_task() -> None:
    short = sampler(failures=0, context_limit=12)
    try:
        with pytest.raises(UserError, match=r"task t: the prompt has \d+ tokens; .* is 12"):
            await short.episode(TASK)
    finally:
        await short.engine.close()


def test_seeds_belong_to_the_request() -> None:
    seeds = {
        request_seed(*key)
        for key in [(0, 0, "a", 0, 0), (1, 0, "a", 0, 0), (0, 1, "a", 0, 0), (0, 0, "b", 0, 0),
                    (0, 0, "a", 1, 0), (0, 0, "a", 0, 1), (0, 0, "a", 11, 0), (0, 0, "a", 1, 1)]
    }  # fmt: skip
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 0, "a", 0, 0) == request_seed(0, 0, "a", 0, 0)


def run_with(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> retrain.RunResult:
    monkeypatch.setattr(
        "retrain.loops.run.build_engine",
        lambda c, policy: FlakyEngine(policy.model, tokenizer=policy.tokenizer, **engine),
    )
    return retrain.run_sync(config | {"rollout": {"backoff_s": 0.01}})


def test_a_step_goes_on_with_the_survivors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = rl_config(tmp_path)
    first = rollouts_of(retrain.run_sync(config).path)[1][0].id
    with caplog.at_level(logging.WARNING, "retrain"):
        result = run_with({"failures": 9, "sessions": {first}}, monkeypatch, config)
    rows = metrics_of(result.path)
    assert [row["rollouts/masked"] for row in rows] == [1, 0]
    assert "rl step 1: 1 of 6 rollouts are masked" in caplog.text
    masked, *others = rollouts_of(result.path)[1]
    assert masked.id == first and masked.error and not any(r.error for r in others)
    kept = [r for r in others if r.group_id == masked.group_id]
    assert len(kept) == 2 and rows[0]["tokens/trained"] > 0
    rewards = [r.reward for r in others]
    assert rows[0]["reward/mean"] == pytest.approx(sum(rewards) / 5)


def test_a_step_without_survivors_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_with({"failures": 99}, monkeypatch, rl_config(tmp_path))
    rows = metrics_of(result.path)
    assert [row["rollouts/masked"] for row in rows] == [6, 6]
    assert not any("loss" in row or "reward/mean" in row for row in rows)


def with_reward(tmp_path: Path, function: str, **setup: Any) -> dict[str, Any]:
    rewards = {"rollout_reward_configs": {"mine": {"function": function}}, **setup}
    algorithm = {"hyperparameters": hyperparameters(steps=1)}
    return rl_config(tmp_path, reward_setup=rewards, algorithm=algorithm)


def test_a_reward_that_raises_stops_and_shows_the_rollout(tmp_path: Path) -> None:
    with pytest.raises(RewardFailure) as failure:
        retrain.run_sync(with_reward(tmp_path, "runs:raises"))
    text = str(failure.value)
    assert "reward 'mine' failed: KeyError: 'oops'" in text and "runs.py:" in text
    assert "[message] What is" in text and "on_error" in text


def test_on_error_mask(tmp_path: Path) -> None:
    config = with_reward(tmp_path, "runs:raises_sometimes", on_error="mask")
    result = retrain.run_sync(config)
    assert result.metrics["rollouts/masked"] == 2
    for rollout in rollouts_of(result.path)[1]:
        assert (rollout.error is not None) == rollout.id.endswith("/0")


def test_on_error_penalty(tmp_path: Path) -> None:
    config = with_reward(tmp_path, "runs:raises_sometimes", on_error="penalty", error_penalty=-2.0)
    result = retrain.run_sync(config)
    assert result.metrics["rollouts/masked"] == 0
    for rollout in rollouts_of(result.path)[1]:
        assert (rollout.reward == -2.0) == rollout.id.endswith("/0")


def test_an_environment_that_raises_stops_and_shows_the_rollout(tmp_path: Path) -> None:
    environment = {"type": "python", "path": "runs:Broken"}
    algorithm = {"hyperparameters": hyperparameters(max_new_tokens=64)}
    with pytest.raises(UserError) as failure:
        retrain.run_sync(rl_config(tmp_path, environment=environment, algorithm=algorithm))
    text = str(failure.value)
    assert "Broken.step failed: ZeroDivisionError: no such world (" in text
    assert "[message] What is" in text
