"""Stages of on-policy distillation, whole: what they learn, need, refuse and go on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from retrain import run_sync
from retrain.config.load import load_config, resolve_stages
from retrain.config.root import TrainingConfig
from retrain.loops.check import check
from retrain.loops.rl import thresholds
from retrain.tracking.run_dir import RunDirectory, read_metrics
from retrain.types import UserError
from runs import hyperparameters, metrics_of, model_section, rl_config, sft_section

TEACHER = {"type": "model", "model": model_section(num_hidden_layers=3)}
QA = {"type": "qa"}


def config_of(output: Path, *, settings: Any = None, **section: Any) -> dict[str, Any]:
    """Two steps of four rollouts, each of another task."""
    changed = {"prompts_per_step": 4, "group_size": 1, **(settings or {})}
    return rl_config(
        output,
        environment=QA,
        algorithm={"hyperparameters": hyperparameters(**changed)},
        distillation={"type": "on_policy", "teachers": [TEACHER], **section},
    )


def first_loss(output: Path, **changed: Any) -> float:
    run = run_sync(config_of(output, settings={"group_size": 2}, **changed))
    return float(metrics_of(run.path, "distill")[0]["loss"])


def weights(checkpoint: Path | None) -> dict[str, Any]:
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def test_every_key_of_the_section_acts(tmp_path: Path) -> None:
    """Seen in the loss of the first step, whose rollouts are the same in all."""
    usual = first_loss(tmp_path)
    assert first_loss(tmp_path, coefficient=3.0) == pytest.approx(3 * usual, rel=1e-5)
    other = {**TEACHER, "model": model_section(num_hidden_layers=1)}
    losses = [
        usual,
        first_loss(tmp_path, teachers=[other]),
        first_loss(tmp_path, task_reward=5.0),
        first_loss(tmp_path, estimator="top_k", top_k=4),
        first_loss(tmp_path, estimator="top_k", top_k=40),
    ]
    assert len(set(losses)) == len(losses)


def test_teachers_need_neither_rewards_nor_a_second_rollout(tmp_path: Path) -> None:
    run = run_sync({**config_of(tmp_path), "reward_setup": {}})
    rows = metrics_of(run.path, "distill")
    assert [row["rollouts"] for row in rows] == [4.0, 4.0]
    assert all(row["tokens/trained"] > 4 and row["grad_norm"] > 0 for row in rows)
    assert all(row["groups/zero_variance"] == 4 and row["groups/too_small"] == 0 for row in rows)
    for row in rows:
        student = -row["entropy/sampled"]
        assert row["distill/kl"] == pytest.approx(student - row["teacher/logprob"], abs=1e-4)


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = {"steps": 4, "optimizer": "muon", "learning_rate": 1e-2}
    whole = run_sync(config_of(tmp_path, settings=settings))
    config = {**config_of(tmp_path, settings=settings), "checkpoint": {"every_steps": 2}}
    begun = RunDirectory(run_sync(config).path)
    shutil.rmtree(begun.path / "checkpoints" / "distill")
    begun.describe(status="running")  # as a kill after the third step would have left it
    resumed = run_sync(config, resume=begun.path)
    one, other = weights(whole.checkpoint), weights(resumed.checkpoint)
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_rewards_that_do_not_train_ring_no_alarm(tmp_path: Path) -> None:
    config = load_config(config_of(tmp_path))
    found = thresholds(config, rewards_train=False)
    assert found["zero_variance"] is None and found["flat_reward_steps"] is None
    assert thresholds(config)["zero_variance"] is not None
    asking = {**config_of(tmp_path), "monitors": {"zero_variance": 0.5}}
    with pytest.raises(UserError, match="and rewards that train"):
        load_config(asking)
    asking["distillation"] |= {"task_reward": 1.0}
    asking["algorithm"] = {"hyperparameters": hyperparameters(group_size=2)}
    load_config(asking)


def test_check_says_who_teaches(tmp_path: Path) -> None:
    said = check(load_config(config_of(tmp_path, coefficient=2.0)))
    for line in ("teacher teacher0: in this process", "reverse KL of sampled tokens, times 2",
                 "advantages of rewards: do not train", "4 prompts x 1 rollouts"):  # fmt: skip
        assert line in said


@pytest.mark.parametrize(
    ("settings", "section", "message"),
    [
        ({}, {"task_reward": 1.0}, "group_size 1 gives every rollout an advantage of zero"),
        ({"normalize_advantages": "none"}, {}, "normalize_advantages: nothing to act on, since"),
        ({"credit": "turn"}, {}, "hyperparameters.credit: nothing to act on, since rewards do not"),
        ({"dynamic_sampling_rounds": 1}, {}, "dynamic_sampling_rounds 1 would replace groups"),
        ({"loss": "gmpo"}, {}, "loss: gmpo has one advantage for a whole rollout"),
        ({}, {"estimator": "top_k"}, "estimator: top_k needs top_k"),
        ({}, {"top_k": 4}, "top_k 4 does nothing for estimator: sampled"),
        ({}, {"coefficient": 0}, "distillation.coefficient: input should be greater than 0"),
        ({}, {"teachers": []}, "distillation.teachers: "),
    ],
)
def test_refusals(
    tmp_path: Path, settings: dict[str, Any], section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as failure:
        load_config(config_of(tmp_path, settings=settings, **section))
    assert message in str(failure.value)


def test_what_a_stage_lacks_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="on_policy needs section prompt_source"):
        load_config({**config, "prompt_source": None})
    with pytest.raises(UserError, match="reward_setup has no reward"):
        rewarded = config_of(tmp_path, settings={"group_size": 2}, task_reward=1.0)
        load_config({**rewarded, "reward_setup": {}})
    stages = [{"kind": "distill"}, {"kind": "rl"}]
    with pytest.raises(UserError, match=r"stages.1: algorithm.hyperparameters: group_size 1"):
        load_config({**config, "stages": stages})
    own = {"algorithm": {"hyperparameters": {"group_size": 4}}}
    checked = load_config({**config, "stages": [stages[0], {**stages[1], **own}]})
    sizes = [stage.algorithm.hyperparameters.group_size for *_, stage in resolve_stages(checked)]
    assert isinstance(checked, TrainingConfig) and sizes == [1, 4]


def test_the_student_succeeds_more_often_by_its_teachers_words(tmp_path: Path) -> None:
    """The student had about half of the teacher's SFT, and then no reward."""
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions"},
        "modes": [{"name": "T=1", "repeats": 4}],
        "success_reward": "exact_match",
    }
    base = {
        "environment": QA,
        "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
        "evaluation": evaluation,
    }
    spoken = {"dataset": "test_distill_on_policy_run:sums", "params": {}}

    def taught(steps: int, **model: Any) -> tuple[Path, float]:
        sections = {"sft": sft_section(**spoken, steps=steps), "model": model_section(**model)}
        stages = [{"kind": "sft"}, {"kind": "eval"}]
        run = run_sync(rl_config(tmp_path, **base, **sections, stages=stages))
        assert run.checkpoint is not None
        return run.checkpoint, run.evaluations[-1].success

    teacher, goal = taught(80, num_hidden_layers=3)
    student, start = taught(45)
    settings = hyperparameters(
        steps=40, prompts_per_step=20, group_size=4, learning_rate=1e-2, optimizer="muon",
        aggregation="token_mean", schedule="linear",
    )  # fmt: skip
    section = {"teachers": [{"type": "model", "model": {"name_or_path": str(teacher)}}]}
    run = run_sync(
        rl_config(
            tmp_path,
            **base,
            model={"name_or_path": str(student)},
            algorithm={"hyperparameters": settings},
            distillation={"type": "on_policy", **section},
            stages=[{"kind": "distill"}, {"kind": "eval"}],
        )
    )
    reached = run.evaluations[-1].success
    rows = [row for row in read_metrics(run.path / "metrics.jsonl") if "distill/kl" in row]
    assert start < 0.3 and goal > 0.9 and reached > start + 0.2
    assert float(rows[-1]["distill/kl"] or 0) < 0.7 * float(rows[0]["distill/kl"] or 0)


def sums() -> list[dict[str, str]]:
    """Every question that there is, with its answer."""
    return [
        {"prompt": f"What is {a}+{a + 1}?", "completion": str(2 * a + 1)} for a in range(10, 50)
    ]
