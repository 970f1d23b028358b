"""Keys that no stage of a pipeline would read are refused; what may be meant for another day is
told by `retrain check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.config import StageConfig, dump_yaml, load_config
from retrain.loops.check import check
from retrain.types import UserError
from runs import hyperparameters, rl_config, sft_section

EVALUATION = {"prompt_source": {"type": "python", "function": "runs:questions"}}
RL, EVAL, SFT = ({"kind": kind} for kind in ("rl", "eval", "sft"))
PPO = {"name": "ppo", "hyperparameters": hyperparameters()}


def algorithm(**changed: Any) -> dict[str, Any]:
    return {"hyperparameters": hyperparameters(**changed)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {**EVALUATION, "every_steps": 5}, "stages": [EVAL]},
         "evaluation.every_steps does nothing: it evaluates during stages that train"),
        ({"tracking": {"transcripts": 5}}, "tracking.transcripts 5 does nothing: no stage of kin"),
        ({"tracking": {"transcripts": 5}, "evaluation": EVALUATION, "stages": [RL]},
         "tracking.transcripts 5 does nothing"),
        ({"monitors": {"kl": 0.3}}, "monitors.kl does nothing: it needs algorithm.hyperparame"),
        ({"monitors": {"tool_calls": 1}, "environment": {"type": "qa"}},
         "monitors.tool_calls does nothing: it needs tools"),
        ({"monitors": {"ratio": 0.2}}, "monitors.ratio does nothing: it needs several updates a"),
        ({"monitors": {"approx_kl": 0.2}}, "monitors.approx_kl does nothing: it needs several up"),
        ({"monitors": {"clip_fraction": 0.2}, "algorithm": algorithm(loss="sapo", epochs=2)},
         "monitors.clip_fraction does nothing: it needs several updates a step (algorithm.hyperp"),
        ({"monitors": {"zero_variance": 0.5}, "algorithm": PPO},
         "monitors.zero_variance does nothing: it needs an algorithm.hyperparameters.advantage "),
        ({"algorithm": algorithm(train_turns="last"), "environment": {"type": "qa"}},
         "algorithm.hyperparameters.train_turns: last does nothing: rollouts have one turn"),
        ({"algorithm": algorithm(train_turns="last"), "environment": {"type": "smolagent"}},
         "algorithm.hyperparameters.train_turns: last does nothing"),
        ({"algorithm": algorithm(train_turns="last"),
          "environment": {"type": "smolagent", "tools": ["python"], "max_steps": 1}},
         "algorithm.hyperparameters.train_turns: last does nothing"),
        ({"algorithm": algorithm(train_turns="last"),
          "environment": {"type": "dialogue", "max_turns": 1,
                          "user": {"type": "scripted", "replies": ["Go on."]}}},
         "algorithm.hyperparameters.train_turns: last does nothing"),
        ({"monitors": {"masked": 0.5}, "evaluation": EVALUATION, "stages": [EVAL]},
         "monitors.masked does nothing: it needs a stage of kind rl"),
    ],
)  # fmt: skip
def test_what_no_stage_reads_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as failure:
        load_config(rl_config(Path("runs"), **sections))
    assert failure.value.cause.startswith(f"config: {message}")
    assert failure.value.next_step


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluation": {**EVALUATION, "every_steps": 5}},
        {
            "evaluation": {**EVALUATION, "every_steps": 5},
            "sft": sft_section(),
            "stages": [SFT],
            "tracking": {"rollouts_logged": 3, "trackers": ["wandb"]},
            "checkpoint": {"every_steps": 5, "keep_best": {"metric": "eval/greedy/success"}},
        },
        {"tracking": {"transcripts": 5}, "evaluation": EVALUATION},
        {"tracking": {"transcripts": 0}},
        {"tracking": {"transcripts": 5}, "stages": [RL, {**EVAL, "evaluation": EVALUATION}]},
        {"monitors": {"kl": None, "tool_calls": None}, "environment": {"type": "qa"}},
        {"monitors": {"kl": 0.3}, "stages": [RL, {**RL, "algorithm": algorithm(kl={})}]},
        {"monitors": {"ratio": 0.2, "clip_fraction": 0.2}, "algorithm": algorithm(epochs=2)},
        {"algorithm": algorithm(train_turns="last")},
        {"environment": {"type": "qa"}, "algorithm": algorithm(train_turns="all")},
    ],
)
def test_what_one_stage_reads_is_taken(sections: dict[str, Any]) -> None:
    config = load_config(rl_config(Path("runs"), **sections))
    assert load_config(config) == config
    assert dump_yaml(config)


def test_with_only_some_of_the_stages_nothing_is_held_against_the_file() -> None:
    sections = {"tracking": {"transcripts": 5}, "monitors": {"kl": 0.3}, "sft": sft_section()}
    load_config(rl_config(Path("runs"), **sections), only="sft")


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        *(("sft", name) for name in ("prompt_source", "monitors", "distillation")),
        *(("eval", name) for name in ("prompt_source", "checkpoint", "monitors", "sft")),
        ("rl", "sft"),
    ],
)  # fmt: skip
def test_a_stage_overlays_only_what_it_reads(kind: Any, section: str) -> None:
    with pytest.raises(
        ValueError, match=f"{section}: nothing of it acts in a stage of kind {kind}"
    ):
        StageConfig.model_validate({"kind": kind, section: {"x": 1}})


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"sft": sft_section()}, "note: sft does nothing: no stage is of kind sft"),
        ({"evaluation": EVALUATION, "stages": [EVAL]},
         "note: prompt_source does nothing: no stage is of kind rl or distill"),
        ({"evaluation": EVALUATION, "sft": sft_section(), "stages": [SFT]},
         "note: evaluation does nothing: no stage is of kind rl or distill or eval"),
        ({"sandbox": {"timeout_s": 3}, "environment": {"type": "qa"}},
         "note: sandbox does nothing: neither a tool nor a reward runs code"),
        ({"checkpoint": {"every_steps": 2}},
         "note: checkpoint.every_steps 2 adds none to that after 2 steps"),
        ({"evaluation": {**EVALUATION, "every_steps": 3}},
         "note: evaluation.every_steps 3 never comes in 2 steps"),
        ({"algorithm": algorithm(loss="reinforce", epochs=2)},
         "(reinforce weighs no ratio: nothing corrects that later updates are off-policy)"),
    ],
)  # fmt: skip
def test_check_tells_what_may_be_meant(sections: dict[str, Any], line: str) -> None:
    def lines(config: dict[str, Any]) -> list[str]:
        return [found.strip() for found in check(load_config(config)).splitlines()]

    assert line in lines(rl_config(Path("runs"), **sections))
    assert line not in lines(rl_config(Path("runs")))


def test_a_warm_up_that_takes_every_epoch_is_refused(tmp_path: Path) -> None:
    sections = {"sft": sft_section(steps=None, warmup_steps=20), "stages": [SFT]}
    with pytest.raises(UserError, match="warmup_steps is 20, but 1 x 320 traces"):
        check(load_config(rl_config(tmp_path, **sections)))


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    config = rl_config(tmp_path, model={"name_or_path": str(tmp_path), "revision": "v2"})
    with pytest.raises(UserError, match="revision 'v2' does nothing for the directory"):
        check(load_config(config))
    with pytest.raises(UserError, match="revision 'v2' does nothing for the directory"):
        retrain.run_sync(config)
