"""What a resumed run must not forget, one thing a test; `test_resume.py` kills whole pipelines."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import retrain
from killing import left_behind
from retrain.learner import NotFiniteError, TorchLearner
from retrain.loops.context import RunContext
from retrain.loops.evaluate import EvalStage
from retrain.loops.interrupt import Interrupted
from retrain.tracking.run_dir import RunDirectory
from retrain.types import InfrastructureError, Rollout, UserError
from runs import hyperparameters, rl_config

STEPS = 4
EVALUATION = {
    "prompt_source": {"type": "python", "function": "runs:questions", "params": {"n": 2}},
    "success_threshold": 0.5,
}


def config(output_dir: Path, **sections: Any) -> dict[str, Any]:
    return rl_config(
        output_dir,
        algorithm={"hyperparameters": hyperparameters(steps=STEPS)},
        environment={"type": "qa"},
        **sections,
    )


class Trouble:
    """Where the rewards below fail: they are called by name, so they look here."""

    at = ""


class Stopped(Exception):
    pass


def fails_at(rollout: Rollout) -> float:
    if rollout.id == Trouble.at:
        raise Stopped
    return float(len(rollout.completion))


def same(run: Path, other: Path) -> bool:
    """Whether two runs learnt the same and say the same of it."""
    left, expected = left_behind(run), left_behind(other)
    weights = [name for name in expected["tensors"] if name.startswith("rl/")]
    tensors = all(left["tensors"][name] == expected["tensors"][name] for name in weights)
    return tensors and left["metrics"] == expected["metrics"]


def test_a_critic_from_a_checkpoint_is_not_fetched_again(tmp_path: Path) -> None:
    def ppo(output_dir: Path, **critic: Any) -> dict[str, Any]:
        hyper = hyperparameters(steps=3, critic=critic)
        algorithm = {"name": "ppo", "hyperparameters": hyper}
        return config(output_dir, checkpoint={"every_steps": 1}) | {"algorithm": algorithm}

    first = retrain.run_sync(ppo(tmp_path / "first")).checkpoint
    changed = ppo(tmp_path / "whole", from_checkpoint=str(first))
    whole = retrain.run_sync(changed).path
    shutil.copytree(whole, tmp_path / "t-001")
    shutil.rmtree(tmp_path / "t-001" / "checkpoints" / "rl")
    RunDirectory(tmp_path / "t-001").describe(status="running")
    retrain.run_sync(changed | {"output_dir": str(tmp_path)}, resume="latest")
    assert same(tmp_path / "t-001", whole)


def by_chance(rollouts: list[Rollout]) -> list[float]:
    """Of the generator that everybody shares; fails, where it is told to, after it has drawn."""
    worth = [random.random() + len(rollout.completion) for rollout in rollouts]
    if rollouts[0].id == Trouble.at:
        raise Stopped
    return worth


def test_the_generators_go_on_from_where_the_saved_step_ended(tmp_path: Path) -> None:
    """What the step that was given up had drawn is drawn again."""
    changed = config(tmp_path / "whole")
    reward = {"function": "test_resume_state:by_chance"}
    changed["reward_setup"] = {"group_reward_configs": {"r": reward}}
    changed["algorithm"]["hyperparameters"]["prompts_per_step"] = 1
    Trouble.at = ""
    whole = retrain.run_sync(changed).path
    third = left_behind(whole)["rollouts"]["rl-000003.jsonl.gz"]
    Trouble.at = third[0]["id"]
    changed["output_dir"] = str(tmp_path)
    with pytest.raises(UserError, match="Stopped"):
        retrain.run_sync(changed)
    Trouble.at = ""
    retrain.run_sync(changed, resume="auto")
    assert same(tmp_path / "t-001", whole)


async def away_from_the_third_step_on(rollout: Rollout) -> float:
    if Trouble.at and int(rollout.id.split("/")[0]) >= 2:
        raise InfrastructureError("the judge is away")
    return float(len(rollout.completion))


def test_steps_that_were_lost_are_made_again(tmp_path: Path) -> None:
    """Evaluations between them included; each of two tasks is an epoch, so epoch 2 is step 3."""
    evaluation = {**EVALUATION, "every_steps": 1}
    changed = config(tmp_path / "whole", evaluation=evaluation, stages=[{"kind": "rl"}])
    changed["rollout"] = {"max_lost_steps": 2, "retries": 0}
    changed["prompt_source"]["params"] = {"n": 2}
    reward = {"function": "test_resume_state:away_from_the_third_step_on"}
    changed["reward_setup"] = {"rollout_reward_configs": {"r": reward}}
    Trouble.at = ""
    whole = retrain.run_sync(changed).path
    Trouble.at = "away"
    changed["output_dir"] = str(tmp_path)
    with pytest.raises(UserError, match="every rollout of the last 2 steps was lost"):
        retrain.run_sync(changed)
    Trouble.at = ""
    retrain.run_sync(changed, resume="auto")
    assert same(tmp_path / "t-001", whole)


def test_a_loss_that_is_not_finite_costs_its_step_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = config(tmp_path)
    forward_backward, calls = TorchLearner.forward_backward, []

    def third_fails(learner: TorchLearner, samples: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(samples)
        if len(calls) == 3:
            raise NotFiniteError("the loss is nan", "Lower the learning rate.", samples)
        return forward_backward(learner, samples, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the loss is nan"):
        patch.setattr(TorchLearner, "forward_backward", third_fails)
        retrain.run_sync(changed)
    assert [p.name for p in (tmp_path / "t-001" / "checkpoints").iterdir()] == ["rl-000002"]


def test_an_error_in_the_users_code_costs_no_step(tmp_path: Path) -> None:
    """Without a periodic checkpoint: what was learnt is saved when the reward raises."""
    changed = config(tmp_path)
    reward = {"function": "test_resume_state:fails_at"}
    changed["reward_setup"] = {"rollout_reward_configs": {"r": reward}}
    Trouble.at = ""
    plain = retrain.run_sync(changed).path
    rollouts = sorted((plain / "rollouts").glob("rl-000003*"))
    Trouble.at = left_behind(plain)["rollouts"][rollouts[0].name][-1]["id"]
    changed["output_dir"] = str(tmp_path / "again")
    with pytest.raises(UserError, match="Stopped"):
        retrain.run_sync(changed)
    run = tmp_path / "again" / "t-001"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["rl-000002"]
    Trouble.at = ""
    retrain.run_sync(changed, resume=run)
    assert left_behind(run)["metrics"] == left_behind(plain)["metrics"]


async def test_stopped_in_the_last_evaluation_it_makes_it_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are learnt; what is left of the stage is to look at them."""
    sections = {"evaluation": {**EVALUATION, "every_steps": STEPS}, "stages": [{"kind": "rl"}]}
    plain = (await retrain.run(config(tmp_path / "plain", **sections))).path
    changed = config(tmp_path, **sections)

    async def stop(stage: EvalStage, context: RunContext, *args: Any, **kwargs: Any) -> Any:
        context.stop.request()
        await asyncio.sleep(60)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as interrupted:
        patch.setattr(EvalStage, "evaluate", stop)
        await retrain.run(changed)
    run = tmp_path / "t-001"
    assert interrupted.value.checkpoint == f"{run}/checkpoints/rl-{STEPS:06d}"
    await retrain.run(changed, resume="auto")
    left, expected = left_behind(run), left_behind(plain)
    assert left["metrics"] == expected["metrics"] and left["metrics"][-1]["stage"] == "rl-eval"
    assert left["tensors"]["rl/model.safetensors"] == expected["tensors"]["rl/model.safetensors"]


class Counts:
    """A reward whose state is what a test makes it."""

    def __init__(self, state: str) -> None:
        self.state = {"int keys": {3: 7}, "set": {"seen": {1}}, "nan": [float("nan")]}[state]

    def __call__(self, rollout: Rollout) -> float:
        return float(len(rollout.completion))

    def end_step(self, rollouts: Any) -> None: ...

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None: ...


class Half:
    def __call__(self, rollout: Rollout) -> float:
        return 0.0

    def state_dict(self) -> Any:
        return {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("int keys", r"comes back from a checkpoint as \{'3': 7\}, not as \{3: 7\}"),
        ("set", "cannot hold its state_dict.*set is not JSON serializable"),
        ("nan", "cannot hold its state_dict.*not JSON compliant"),
    ],
)
def test_a_state_that_would_not_come_back_is_refused_at_the_start(
    state: str, message: str, tmp_path: Path
) -> None:
    reward = {"function": "test_resume_state:Counts", "params": {"state": state}}
    sections = {"reward_setup": {"rollout_reward_configs": {"counts": reward}}}
    with pytest.raises(UserError, match=f"reward 'counts': .*{message}"):
        retrain.run_sync(config(tmp_path) | sections)
    assert not (tmp_path / "t-001" / "metrics.jsonl").exists()


def test_half_a_state_is_refused(tmp_path: Path) -> None:
    reward = {"function": "test_resume_state:Half"}
    sections = {"reward_setup": {"rollout_reward_configs": {"half": reward}}}
    with pytest.raises(UserError, match="no end_step and no load_state_dict"):
        retrain.run_sync(config(tmp_path) | sections)
