"""The example's data: what the generator writes, with answers that follow from the words."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

from retrain.config.data import FileSourceConfig
from retrain.data.sources import load_tasks

FOLDER = Path(__file__).parents[1] / "examples" / "word_problems"


def problems() -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / "problems.jsonl").open(encoding="ascii")]


def test_the_file_is_what_the_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_problems", FOLDER / "make_problems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.make_problems() == problems()


def test_answers_follow_from_the_numbers_in_the_prompt() -> None:
    for problem in problems():
        a, b, c = map(int, re.findall(r"\d+", str(problem["prompt"])))
        assert 100 <= a <= 999 and 10 <= b <= 99 and 10 <= c <= 99
        expected = {"a*b+c": a * b + c, "(a-b)*c": (a - b) * c, "a*b-c": a * b - c}
        assert problem["answer"] == expected[str(problem["form"])] > 0


def test_prompts_are_short_varied_and_different() -> None:
    rows = problems()
    prompts = [str(row["prompt"]) for row in rows]
    assert len(set(prompts)) == len(rows) >= 240
    assert max(len(prompt.split()) for prompt in prompts) <= 22
    assert set(Counter(row["form"] for row in rows).values()) == {len(rows) // 3}


def test_the_holdout_makes_a_train_and_a_test_set() -> None:
    def source(part: str) -> set[str]:
        config = FileSourceConfig.model_validate(
            {
                "type": "file",
                "path": str(FOLDER / "problems.jsonl"),
                "id_column": "id",
                "holdout": {"fraction": 0.25, "part": part},
            }
        )
        return {task.id for task in load_tasks(config, seed=0).epoch(0)}

    train, test = source("train"), source("test")
    assert not train & test
    assert len(train) + len(test) == len(problems())
    assert 45 <= len(test) <= 105
