"""The toy walk-through: the same recipe at several cost coefficients, beside every fixed choice and
a control with random rewards.

    python -m retrain.recipes.router_r1.walkthrough --alphas 0 0.3 0.7 --output-dir runs

It trains on `tiny.yaml`: the cold start once, then RL from there for each coefficient.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retrain.config import load_config
from retrain.data import load_tasks
from retrain.models import load_policy
from retrain.recipes.router_r1.fixed import Outcome, fixed_choices, outcome, table
from retrain.recipes.router_r1.reward import rollout_cost
from retrain.tracking.rollouts import read_rollouts
from retrain.types import Rollout

RECIPE = "recipe:router_r1/tiny.yaml"
REWARD = "reward_setup.rollout_reward_configs.router"
ALPHAS = (0.0, 0.3, 0.7)
CONTROL = "random rewards"
MARGIN_FIXED = 0.15
"""What the learned routing has to be worth more than every fixed choice; fixed beforehand."""
MARGIN_CONTROL = 0.30
"""What its success has to be above that of random rewards; fixed beforehand."""


@dataclass(frozen=True)
class Walkthrough:
    alphas: Sequence[float]
    fixed: Sequence[Outcome]
    """Always the same expert."""
    learned: dict[float, Outcome]
    control: Outcome | None

    def best_fixed(self, alpha: float) -> float:
        return max(one.worth[alpha] for one in self.fixed)

    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        first, *others = self.alphas
        broken = [
            f"α = {alpha:g}: worth {self.learned[alpha].worth[alpha]:.3f}, which is not "
            f"{MARGIN_FIXED:g} above the best fixed choice, {self.best_fixed(alpha):.3f}"
            for alpha in self.alphas
            if self.learned[alpha].worth[alpha] - self.best_fixed(alpha) <= MARGIN_FIXED
        ]
        gained = self.learned[first].success
        if self.control is not None and gained - self.control.success <= MARGIN_CONTROL:
            broken.append(f"random rewards came to {self.control.success:.3f}, not far from it")
        for before, alpha in zip(self.alphas, others, strict=False):
            cost, dearer = self.learned[alpha].cost, self.learned[before].cost
            if cost >= dearer:
                broken.append(f"α = {alpha:g} costs {cost:.1f}, α = {before:g} {dearer:.1f}")
        return broken

    def report(self) -> str:
        everyone = [*self.fixed, *self.learned.values()]
        if self.control is not None:
            everyone.append(self.control)
        gains = [
            f"α = {alpha:g}: {self.learned[alpha].worth[alpha]:.3f}, the best fixed choice "
            f"{self.best_fixed(alpha):.3f}"
            for alpha in self.alphas
        ]
        kept = self.broken() or ["Every promise was kept."]
        return "\n".join([table(everyone, self.alphas), "", *gains, "", *kept])


def walk(
    alphas: Sequence[float] = ALPHAS,
    *,
    output_dir: str = "runs",
    control: bool = True,
    overrides: Sequence[str] = (),
) -> Walkthrough:
    """Train, measure, compare.

    Args:
        overrides: further `dotted.key=value` of the recipe, for every run.
    """
    base = [f"output_dir={output_dir}", *overrides]
    fixed = measure_fixed(base)
    scale = [rollout_cost(one) for rollouts in fixed.values() for one in rollouts]
    start = _train([*base, "experiment_name=router-r1-start", "stages=[{kind: sft}]"])
    after = [
        *base,
        f"model={{name_or_path: {start / 'checkpoints' / 'sft'}}}",
        "sft=null",
        "stages=[{kind: rl}, {kind: eval, name: after}]",
    ]
    learned = {}
    for alpha in alphas:
        run = _train(
            [*after, f"experiment_name=router-r1-{alpha:g}", f"{REWARD}.params.alpha={alpha}"]
        )
        learned[alpha] = outcome(f"learned, α = {alpha:g}", evaluated(run), scale, alphas)
    drifted = None
    if control:
        switch = [f"{REWARD}.function=random", f"{REWARD}.params={{}}"]
        run = _train([*after, "experiment_name=router-r1-random", *switch])
        drifted = outcome(CONTROL, evaluated(run), scale, alphas)
    outcomes = [outcome(f"always {name}", r, scale, alphas) for name, r in fixed.items()]
    return Walkthrough(alphas, outcomes, learned, drifted)


def measure_fixed(overrides: Sequence[str] = ()) -> dict[str, list[Rollout]]:
    """Each expert's rollouts on the recipe's held-out tasks, through its environment and server."""
    from retrain.loops.world import build_environment, build_renderer, build_sandbox

    config = load_config(RECIPE, list(overrides))
    assert config.evaluation is not None
    renderer = build_renderer(config, load_policy(config.model, seed=config.seed))
    assert renderer.tool_format is not None
    environment = build_environment(config, renderer, build_sandbox(config))
    tasks = list(load_tasks(config.evaluation.prompt_source, seed=config.seed).epoch(0))
    return asyncio.run(fixed_choices(environment, renderer.tool_format, tasks))


def evaluated(run: Path, stage: str = "after", mode: str = "T_1") -> list[Rollout]:
    """The rollouts of an evaluation that a run directory holds."""
    (file,) = (run / "rollouts").glob(f"{stage}-{mode}-*.jsonl.gz")
    return list(read_rollouts(file))


def _train(overrides: Sequence[str]) -> Path:
    from retrain.loops.run import run_sync

    return run_sync(RECIPE, overrides=overrides).path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--output-dir", default="runs")
    parser.add_argument("--no-control", action="store_true", help="leave random rewards out")
    parser.add_argument("--set", action="append", default=[], help="dotted.key=value")
    given = parser.parse_args(arguments)
    walked = walk(
        given.alphas,
        output_dir=given.output_dir,
        control=not given.no_control,
        overrides=given.set,
    )
    print(walked.report())


if __name__ == "__main__":
    main()
