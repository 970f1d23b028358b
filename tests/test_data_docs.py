"""docs/data.md: its sources load, have the tasks that it says, and run."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from retrain import run_sync
from retrain.config import load_config
from retrain.config.data import CurriculumConfig, FilterConfig
from retrain.data import TaskSource, load_tasks
from retrain.loops.check import check
from runs import rl_config
from test_docs import Block, blocks, parse, unpack

PAGE = "docs/data.md"
SOURCES = [block for block in blocks(PAGE) if block.language == "yaml"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(unpack(PAGE, tmp_path))
    return tmp_path


def config(block: Block, folder: Path) -> dict[str, Any]:
    return rl_config(folder / "runs", environment={"type": "qa"}, **parse(block.text))


def source(block: Block) -> TaskSource:
    loaded = load_config(config(block, Path()))
    assert loaded.prompt_source is not None
    return load_tasks(loaded.prompt_source, seed=0)


@pytest.mark.parametrize("block", SOURCES, ids=lambda block: block.text.split()[2])
def test_each_source_is_checked_and_has_as_many_tasks_as_it_says(
    block: Block, folder: Path
) -> None:
    if "reasoning_gym" in block.text:
        pytest.importorskip("reasoning_gym")
    assert "first task" in check(load_config(config(block, folder)))
    said = block.mark.removeprefix("tasks: ")
    assert said in ("any", str(len(source(block)) if said != "any" else "any"))


def test_the_mixture_is_in_the_order_that_the_page_says(folder: Path) -> None:
    (mixture,) = (block for block in SOURCES if "mixture" in block.text)
    cursor = source(mixture).cursor("prompt_source")
    names = [(task.metadata["source"], epoch) for epoch, task in islice(cursor, 4)]
    assert names == [("products", 0), ("products", 0), ("sums", 0), ("products", 1)]


@pytest.mark.parametrize("name", ["mixture", "curriculum"])
def test_it_runs(name: str, folder: Path) -> None:
    (block,) = (block for block in SOURCES if f"{name}:" in block.text or f": {name}" in block.text)
    assert run_sync(config(block, folder)).status == "completed"


def test_every_condition_and_every_key_of_a_curriculum_is_told() -> None:
    text = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    told = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert {*CurriculumConfig.model_fields, *FilterConfig.model_fields} - told == {"params"}
