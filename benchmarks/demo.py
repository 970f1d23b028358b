"""The demo on several seeds: success before and after, with intervals, and wall time.

    python benchmarks/demo.py [--seeds 0 1 2]

Prints, for each seed, what docs and tests promise of the demo, and exits with 1 where a promise
is broken. The time is not judged: it depends on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib.resources import files

import retrain
from retrain.tracking.report import EvaluationResult

TAUGHT_WRONG, UNTAUGHT = "a*b-c", "a**3"


def share(result: EvaluationResult, group: str) -> float:
    n, successes = result.by_group[group]
    return successes / n


def broken_promises(by_key: dict[tuple[str, str], EvaluationResult]) -> list[str]:
    """What the demo promises, checked on its evaluations by (stage, mode)."""
    before, after = by_key["before", "T=1"], by_key["after", "T=1"]
    greedy = by_key["after", "greedy"]
    promises = {
        "T=1 on at least 512 tasks": before.n >= 512,
        "T=1 before between 0.2 and 0.5": 0.2 <= before.success <= 0.5,
        "T=1 after at least 0.88": after.success >= 0.88,
        "greedy after at least 0.95": greedy.success >= 0.95,
        "greedy before near 0 where the teacher is wrong": (
            share(by_key["before", "greedy"], TAUGHT_WRONG) <= 0.05
        ),
        "T=1 after at least 0.8 where the teacher is wrong": share(after, TAUGHT_WRONG) >= 0.8,
        "near 0 without a teacher": share(before, UNTAUGHT) <= 0.02
        and share(after, UNTAUGHT) <= 0.02,
        "near 0 without the tool": by_key["after", "T=1 without tool"].success <= 0.05,
    }
    return [promise for promise, kept in promises.items() if not kept]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    failed = False
    demo = str(files("retrain") / "recipes" / "demo" / "demo.yaml")
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as directory:
            overrides = [f"seed={seed}", f"output_dir={directory}", "tracking.progress=off"]
            started = time.perf_counter()
            result = retrain.run_sync(demo, overrides=overrides)
            seconds = time.perf_counter() - started
        broken = broken_promises({(r.stage, r.mode): r for r in result.evaluations})
        failed |= bool(broken)
        print(f"seed {seed}: {seconds:.1f} s; {'; '.join(broken) or 'every promise kept'}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
