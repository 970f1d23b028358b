"""The page on SFT: its configs run with a tiny model, its Python too, and it names real keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from retrain import load_config, run_sync
from retrain.config.imitation import TraceData
from retrain.config.load import merge
from runs import metrics_of
from test_docs import ROOT, TINY_MODEL, blocks, execute, parse, unpack

PAGE = "docs/sft.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's files; its model is one that is made here."""
    unpack(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    config = parse((tmp_path / "sft.yaml").read_text(encoding="utf-8"))
    load_config(config)
    tiny = parse(TINY_MODEL)
    small = {"tracking": {"plots": False}, "algorithm": tiny["algorithm"]}
    with (tmp_path / "sft.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump({**config, **small, "model": tiny["model"]}, file)
    return tmp_path


def parts() -> list[dict[str, Any]]:
    return [parse(b.text) for b in blocks(PAGE) if b.language == "yaml" and not b.file]


def test_the_pages_parts_run(folder: Path) -> None:
    config = parse((folder / "sft.yaml").read_text(encoding="utf-8"))
    streaming, acting, scoring = parts()
    short = merge(config, merge(streaming, {"sft": {"steps": 2, "epochs": 1}}))
    assert len(metrics_of(run_sync(short, only="sft").path, "sft")) == 2
    assert scoring["sft"]["holdout"] == 0.05
    scoring["sft"]["holdout"] = 0.6  # of four
    whole = merge(merge(config, acting), scoring)
    result = run_sync(whole)
    assert [e.stage for e in result.evaluations] == ["before", "before", "after", "after"]
    steps = [row["step"] for row in metrics_of(result.path, "sft")]
    assert [row["step"] for row in metrics_of(result.path, "sft-eval")] == steps
    assert [row["step"] for row in metrics_of(result.path, "sft-validation")] == [0, *steps]


def test_the_pages_python_runs(folder: Path) -> None:
    [code] = [block.text for block in blocks(PAGE) if block.mark == "run"]
    loss, checkpoint = execute(folder, code).split()[-2:]
    assert float(loss) > 0 and (folder / checkpoint).is_dir()


def test_the_page_names_every_key_of_its_own() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    own = TraceData.model_fields.keys() - TraceData.__mro__[2].model_fields.keys()  # type: ignore[attr-defined]
    assert [key for key in own if key not in text] == []
