"""docs/config.md says what the code says, and says something about every key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from retrain.config.root import TrainingConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, list[str]]:
    """Key -> type, default, meaning, as the page has them."""
    found: dict[str, list[str]] = {}
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            key, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found[key.strip("`")] = cells
    return found


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.reference() == PAGE, "run python scripts/config_reference.py"


def test_every_leaf_has_a_row_with_a_meaning(script: ModuleType) -> None:
    table = rows()
    leaves = set(script.leaves(TrainingConfig))
    assert len(leaves) > 150
    for leaf in leaves:
        key = re.sub(r"^environment\.(user|agents\.<name>\.player)\.model\.", "model.", leaf)
        key = re.sub(r"^distillation\.teachers\[\]\.model\.", "model.", key)
        key = key.replace("evaluation.prompt_source.", "prompt_source.")
        key = key.replace("distillation.tasks.", "prompt_source.")
        key = key.replace("prompt_source.sources[].source.", "prompt_source.")
        if not key.endswith(".type") or key in table:
            assert table[key][2], f"{leaf} has no meaning: give the field a docstring"


def test_types_and_defaults_read_as_they_are_written_in_a_file() -> None:
    table = rows()
    assert table["algorithm.hyperparameters.betas"][:2] == ["list of 2 numbers", "`[0.9, 0.95]`"]
    assert table["algorithm.hyperparameters.learning_rate"][:2] == ["number, > 0", "1e-5"]
    assert table["model.name_or_path"][:2] == ["text \\| null", "null"]
    assert table["prompt_source.prompts"][1] == "required"
    assert table["tracking.progress"][0] == "`auto` \\| `on` \\| `off`"
    assert "reward_setup.step_reward_configs.<name>.weight" in table
