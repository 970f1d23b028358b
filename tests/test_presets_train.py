"""Every preset improves the demo's SFT start, from a fixed short budget of steps.

Success is that of one rollout at T=1 on each of 512 held-out tasks, before and after; the test is
McNemar's exact one on the tasks whose outcome changed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import retrain
from retrain.config.presets import PRESETS
from runs import metrics_of, rollouts_of

DEMO = Path(retrain.__file__).parent / "recipes" / "demo" / "demo.yaml"
STEPS = 12
FORMS = {"a*b+c": 1, "(a-b)*c": 1, "a*b-c": 1}


def demo(output_dir: Path, stages: list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """The demo with nothing chosen for its algorithm but size, optimizer and learning rate."""
    config: dict[str, Any] = YAML(typ="safe", pure=True).load(DEMO)
    config["evaluation"] = {
        "prompt_source": {
            "type": "python",
            "function": "retrain.recipes.demo.tasks:tasks",
            "params": {"part": "test", "n": 512, "forms": FORMS},
            "shuffle": False,
        },
        "modes": [{"name": "T=1", "temperature": 1.0}],
    }
    tracking = {"plots": False, "progress": "off", "transcripts": 0}
    return {
        **config,
        "output_dir": str(output_dir),
        "tracking": tracking,
        "stages": stages,
        **sections,
    }


def algorithm(name: str, **hyperparameters: Any) -> dict[str, Any]:
    chosen = {
        "steps": STEPS,
        "prompts_per_step": 16,
        "group_size": 8,
        "max_new_tokens": 16,
        "learning_rate": 2e-3,
        "optimizer": "muon",
    }
    return {"name": name, "hyperparameters": chosen | hyperparameters}


def successes(run: Path, stage: str) -> dict[str, bool]:
    """By task."""
    (rollouts,) = rollouts_of(run, f"{stage}-T_1").values()
    found = {str(r.task.id): r.reward == 1.0 for r in rollouts if r.task is not None}
    assert len(found) == 512
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> retrain.loops.run.RunResult:
    stages = [{"kind": "sft"}, {"kind": "eval", "name": "before"}]
    return retrain.run_sync(demo(tmp_path_factory.mktemp("sft"), stages))


def trained(start: Any, output_dir: Path, chosen: dict[str, Any]) -> Path:
    stages = [{"kind": "rl"}, {"kind": "eval", "name": "after"}]
    model = {"name_or_path": str(start.checkpoint)}
    config = demo(output_dir, stages, algorithm=chosen, model=model)
    return retrain.run_sync(config).path


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ppo"])
def test_a_short_budget_raises_success(name: str, start: Any, tmp_path: Path) -> None:
    run = trained(start, tmp_path, algorithm(name))
    before, after = successes(start.path, "before"), successes(run, "after")
    won = sum(after[task] and not before[task] for task in before)
    lost = sum(before[task] and not after[task] for task in before)
    changed = won + lost
    # the chance that so many of the changes are for the better, if each were a coin's toss
    p = sum(math.comb(changed, k) for k in range(won, changed + 1)) / 2**changed
    assert p < 1e-3, f"{sum(before.values())} -> {sum(after.values())} of 512"


def test_ppo_solves_the_demo(start: Any, tmp_path: Path) -> None:
    chosen = algorithm(
        "ppo", steps=40, schedule="linear", min_lr_ratio=0.1, critic={"learning_rate": 2e-3}
    )
    run = trained(start, tmp_path, chosen)
    assert sum(successes(run, "after").values()) >= 0.85 * 512
    variance = [row["explained_variance"] for row in metrics_of(run)]
    assert sum(variance[-10:]) / 10 > 0.05 > variance[0]
