"""Every refusal names the key, the value, what was expected, and the next step."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from retrain.config import TrainingConfig, load_config
from retrain.types import UserError


def config_with(path: str, value: object) -> dict[str, Any]:
    """A valid config with one value put at a dotted path."""
    data: dict[str, Any] = {
        "model": {"name_or_path": "some/model"},
        "prompt_source": {"type": "list", "prompts": ["a"]},
        "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
    }
    node = data
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return data


def refusal(path: str, value: object) -> str:
    with pytest.raises(UserError) as caught:
        load_config(config_with(path, value))
    return caught.value.cause


SMOLAGENT = {"type": "smolagent"}
EVALUATION = {"prompt_source": {"type": "list", "prompts": ["a"]}}
SFT = {"dataset": "a.jsonl"}
SCRATCH = {"tokenizer": {"corpus": "a:b"}}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("modle", {}, "unknown key modle; did you mean 'model'?"),
        ("model.name_or_pth", "x", "unknown key model.name_or_pth; did you mean 'name_or_path'?"),
        ("model.peft.rr", 1, "unknown key model.peft.rr; did you mean 'r'?"),
        (
            "algorithm.hyperparameters.lerning_rate",
            1,
            "unknown key algorithm.hyperparameters.lerning_rate; did you mean 'learning_rate'?",
        ),
        (
            "reward_setup.rollout_reward_configs.exact_match.wieght",
            1,
            "unknown key reward_setup.rollout_reward_configs.exact_match.wieght; "
            "did you mean 'weight'?",
        ),
        (
            "environment",
            {**SMOLAGENT, "tools": [{"name": "python", "parms": {}}]},
            "unknown key environment.tools.0.parms; did you mean 'params'?",
        ),
        (
            "environment",
            {**SMOLAGENT, "tool_format": {"type": "tags", "tool_strt": "a"}},
            "unknown key environment.tool_format.tool_strt; did you mean 'tool_start'?",
        ),
        (
            "environment",
            {"type": "dialogue", "user": {"type": "scripted", "replies": ["a"], "sistem": 1}},
            "unknown key environment.user.sistem; keys: replies, replies_column, type",
        ),
        (
            "evaluation",
            {**EVALUATION, "modes": [{"name": "a", "temprature": 1}]},
            "unknown key evaluation.modes.0.temprature; did you mean 'temperature'?",
        ),
        ("prompt_source.prompt_colum", "q", "unknown key prompt_source.prompt_colum; did you mean "
         "'prompt_column'?"),
        ("tracking.zzz", 1, "unknown key tracking.zzz; keys: artifacts, finish_timeout_s, plots, "
         "progress, rollouts, rollouts_logged, rollouts_logged_every, trackers, transcripts"),
    ],
)  # fmt: skip
def test_unknown_keys_at_every_depth(path: str, value: object, expected: str) -> None:
    assert refusal(path, value) == f"config: {expected}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("environment", {"max_steps": 3}, "environment.type is missing; one of: smolagent, qa, "
         "dialogue, agents, gymnasium, openenv, verifiers, external, python"),
        ("environment", {"type": "smolagents"}, "environment.type: there is no 'smolagents'; did "
         "you mean 'smolagent'?"),
        ("environment", {"type": "zzz"}, "environment.type: there is no 'zzz'; one of: smolagent, "
         "qa, dialogue, agents, gymnasium, openenv, verifiers, external, python"),
        ("environment", {**SMOLAGENT, "tool_format": {"type": "fence"}},
         "environment.tool_format.type: there is no 'fence'; did you mean 'fenced'?"),
        ("environment", {"type": "dialogue", "user": {}}, "environment.user.type is missing; one "
         "of: scripted, model, openai"),
        ("environment", 3, "environment: input should be a valid dictionary or object to extract "
         "fields from, got 3"),
        ("prompt_source.type", "lst", "prompt_source.type: there is no 'lst'; did you mean "
         "'list'?"),
    ],
)  # fmt: skip
def test_discriminated_unions(path: str, value: object, expected: str) -> None:
    assert refusal(path, value) == f"config: {expected}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("algorithm.hyperparameters.group_size", 1, "group_size 1 gives every rollout an advantage "
         "of zero"),
        ("algorithm.hyperparameters.top_p", 0.9, "top_p is refused for training"),
        ("algorithm.hyperparameters.top_k", 5, "use top_k in evaluation.modes"),
        ("algorithm.name", "ppoo", "algorithm 'ppoo' is not built; there are: grpo, dr_grpo"),
        ("algorithm.backend", "verl", "backend 'verl' is not built; the one there is: torch"),
        ("engine.type", "vlm", "engine.type: there is no 'vlm'; did you mean 'vllm'?"),
        ("engine.type", "openai", "engine: openai gives text only"),
        ("sandbox.type", "docker", "sandbox.type: input should be 'auto', 'jail', "),
        ("distillation", {}, "distillation.type is missing; one of: traces, on_policy, logits"),
        ("model.from_scratch", SCRATCH, "model: set exactly one of name_or_path and from_scratch"),
        ("model", {}, "model: set exactly one of name_or_path and from_scratch"),
        ("model", {"from_scratch": SCRATCH, "revision": "x"}, "model: revision needs name_or_path"),
        ("model", {"from_scratch": SCRATCH, "loader": "unsloth"}, "loader: unsloth needs "),
        ("model", {"from_scratch": {}}, "model.from_scratch.tokenizer is missing"),
        ("model", 3, "model: expected a mapping, got 3"),
        ("model.peft.dropout", 0.1, "model.peft.dropout: input should be less than or equal to 0"),
        ("model.torch_dtype", "int8", "input should be 'auto', 'float32' or 'bfloat16', got "
         "'int8'"),
        ("evaluation", {**EVALUATION, "modes": [{"name": "a"}, {"name": "a"}]},
         "evaluation: two evaluation modes have one name"),
        ("evaluation", {**EVALUATION, "modes": [{"name": "a/b"}]}, "evaluation.modes.0.name: "),
        ("evaluation", {**EVALUATION, "exclude": ["a"]}, "evaluation: exclude needs group_by"),
        ("evaluation", {}, "evaluation.prompt_source is missing"),
        ("sft", {"dataset": "a.jsonl", "params": {"n": 1}}, "sft: params needs dataset to be an "),
        ("sft", {**SFT, "epochs": 2, "steps": 5}, "sft: epochs 2 does nothing with steps 5, which"),
        ("sft", {**SFT, "warmup_steps": 5, "steps": 5}, "sft: warmup_steps is 5, but there are 5"),
        ("sft", {**SFT, "min_lr_ratio": 0}, "sft: min_lr_ratio 0 does nothing with schedule: con"),
        ("checkpoint.keep_last", 5, "checkpoint: keep_last 5 does nothing without every_steps"),
        ("checkpoint.merge_lora", True, "checkpoint.merge_lora does nothing without model.peft"),
        ("environment", {**SMOLAGENT, "describe_tools": True}, "environment: describe_tools: "
         "nothing to act on, since the environment has no tools"),
        ("environment", {**SMOLAGENT, "tool_timeout_s": 3, "max_steps": 2}, "max_steps and "
         "tool_timeout_s: nothing to act on"),
        ("environment", {**SMOLAGENT, "tool_format": {"type": "fenced"}}, "tool_format: nothing "),
        ("reward_setup.verifier_penalty", -1, "reward_setup: verifier_penalty -1 does nothing "
         "without verifiers"),
        ("reward_setup.rollout_reward_configs.exact_match.verifier_penalty", -1,
         "exact_match: verifier_penalty -1 does nothing without verifiers"),
        ("reward_setup.error_penalty", -1, "reward_setup: error_penalty -1 does nothing with "
         "on_error: stop; set on_error: penalty"),
        ("model", {"name_or_path": "m", "loader": "unsloth", "attn_implementation": "sdpa"},
         "attn_implementation does nothing with loader: unsloth"),
        ("model", {"from_scratch": SCRATCH, "torch_dtype": "auto"}, "torch_dtype: auto needs na"),
        ("environment", {"type": "dialogue", "user": {"type": "scripted"}},
         "environment.user: set exactly one of replies and replies_column"),
        ("environment", {**SMOLAGENT, "tool_format": {"type": "tags", "tool_start": " "}},
         "environment.tool_format: TagConfig.tool_start must not be empty"),
        ("experiment_name", "a/b", "experiment_name: string should match pattern"),
        ("seed", -1, "seed: input should be greater than or equal to 0, got -1"),
        ("seed", "x" * 500, "got 'xxx"),
    ],
)  # fmt: skip
def test_refusals(path: str, value: object, expected: str) -> None:
    cause = refusal(path, value)
    assert expected in cause
    assert len(cause) < 250


def test_a_value_that_is_neither_scalar_nor_section_is_explained_by_the_section() -> None:
    cause = refusal("environment", {**SMOLAGENT, "tools": [{"nme": "python"}]})
    assert cause.splitlines() == [
        "config: environment.tools.0.name is missing",
        "config: unknown key environment.tools.0.nme; did you mean 'name'?",
    ]
    cause = refusal("environment", {**SMOLAGENT, "tools": [3]})
    assert cause.splitlines() == [
        "config: environment.tools.0: input should be a valid string, got 3",
        "config: environment.tools.0: expected a mapping, got 3",
    ]


def test_all_errors_come_at_once_with_the_next_step() -> None:
    with pytest.raises(UserError) as caught:
        load_config({"model": {}, "seed": -1, "sed": 1})
    assert len(caught.value.cause.splitlines()) == 3
    assert caught.value.next_step == "See docs/config.md for every key."


@pytest.mark.parametrize("value", [object(), b"\xff", lambda: None])
def test_values_that_no_file_can_hold_are_refused(value: object) -> None:
    environment = {"type": "python", "path": "a:b", "params": {"x": value}}
    assert "a value cannot be written as YAML" in refusal("environment", environment)


def test_a_value_inside_itself_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert "in itself" in refusal("seed", loop)


def test_assignment_is_checked_too() -> None:
    config = load_config(config_with("seed", 1))
    config.seed = 4
    config.algorithm.hyperparameters.steps = 5
    assert (config.seed, config.algorithm.hyperparameters.steps) == (4, 5)
    with pytest.raises(ValidationError, match="seed"):
        config.seed = -1
    with pytest.raises(ValidationError, match="mini_batches"):
        config.algorithm.hyperparameters.mini_batches = 99
    assert isinstance(config, TrainingConfig)
