"""What a file gives and what a preset fills in are kept apart, over stages and when written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from retrain.config import dump_yaml, load_config, resolve_stages
from retrain.config.algorithm import AlgorithmConfig, Hyperparameters
from retrain.config.presets import DECIDING
from runs import hyperparameters, rl_config
from test_presets import algorithm, choices, each_preset


def test_a_preset_makes_no_choice_that_could_not_act() -> None:
    """In a step's only update the ratio is 1: bounds are for files that ask for more updates."""
    found = algorithm("dapo", mini_batches=1).hyperparameters
    assert (found.clip_low, found.clip_high) == (None, None)
    assert algorithm("dapo", mini_batches=1, epochs=2).hyperparameters.clip == (0.2, 0.28)
    assert {key: Hyperparameters.model_fields[key].default for key in DECIDING} == DECIDING


@pytest.mark.parametrize("written_down", [False, True])
@pytest.mark.parametrize(
    ("section", "overlay", "expected"),
    [
        ({"name": "dapo", "hyperparameters": {"mini_batches": 2, "clip_high": 0.28}},
         {"name": "cispo", "hyperparameters": {"loss": "ppo_clip"}},
         {"clip": (0.2, 0.28), "aggregation": "token_mean"}),
        ({"name": "rloo", "hyperparameters": {"aggregation": "sequence_sum"}}, {"name": "grpo"},
         {"aggregation": "sequence_sum", "mini_batches": 1}),
        ({"name": "grpo", "hyperparameters": {"epochs": 1}}, {"name": "dapo"},
         {"epochs": 1, "clip": (0.2, 0.28), "mini_batches": 2}),
        ({"name": "dapo", "hyperparameters": {"mini_batches": 1}},
         {"hyperparameters": {"mini_batches": 4}}, {"clip": (0.2, 0.28), "mini_batches": 4}),
        ({"name": "dapo"}, {"hyperparameters": {"mini_batches": 1}}, {"clip": (0.2, 0.2)}),
        ({"name": "dapo", "hyperparameters": {"clip_high": 0.28}},
         {"hyperparameters": {"loss": "gmpo"}}, {"clip": (0.4, 0.28)}),
        ({"name": "dapo"}, {"hyperparameters": {"loss": "gmpo"}}, {"clip": (0.4, 0.4)}),
    ],
)  # fmt: skip
def test_a_stage_keeps_what_the_file_gave(
    section: dict[str, Any], overlay: dict[str, Any], expected: dict[str, Any], written_down: bool
) -> None:
    """Also where that is what the preset of the file says anyway, and the stage's does not."""
    stages = [{"kind": "rl", "algorithm": overlay}]
    config = load_config(rl_config(Path("runs"), algorithm=section, stages=stages))
    if written_down:
        config = load_config(YAML(typ="safe", pure=True).load(dump_yaml(load_config(config))))
    ((_, _, stage),) = resolve_stages(config)
    found = choices(stage.algorithm.hyperparameters)
    assert {key: found[key] for key in expected} == expected


def test_settings_made_in_python_are_kept_over_their_preset() -> None:
    section = AlgorithmConfig(name="dapo", hyperparameters=Hyperparameters(epochs=3))
    again = AlgorithmConfig.model_validate(section.choices())
    assert again == section and again.hyperparameters.clip == (0.2, 0.2)


@each_preset
def test_what_is_written_down_is_an_equal_config(name: str, tmp_path: Path) -> None:
    section = {"name": name, "hyperparameters": hyperparameters(entropy_coefficient=0.1)}
    config = load_config(rl_config(tmp_path, algorithm=section))
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert [stage for *_, stage in resolve_stages(again)] == [
        stage for *_, stage in resolve_stages(config)
    ]
    assert resolve_stages(config)[0][2].algorithm == config.algorithm
