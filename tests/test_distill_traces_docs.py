"""The section on traces of docs/distill.md says what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import retrain
from retrain.cli import app
from retrain.data.imports import FORMATS
from retrain.data.imports.report import MEANINGS
from retrain.types import MessageType
from runs import model_section
from test_docs import ROOT, blocks, parse, unpack

PAGE = "docs/distill.md"


def section() -> str:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    return text[text.index("## From traces") :].split("\n## ")[0]


def test_the_example_is_checked_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(unpack(PAGE, tmp_path))
    checked = CliRunner().invoke(app, ["check", "distill.yaml"])
    assert checked.exit_code == 0, checked.output
    [told] = [b.text for b in blocks(PAGE) if b.language == "text" and "traces from" in b.text]
    for line in told.splitlines():
        assert line.strip() in " ".join(checked.output.split(" ")), checked.output
    config = parse((tmp_path / "distill.yaml").read_text(encoding="utf-8"))
    config |= {"model": model_section(), "tracking": {"plots": False}}
    result = retrain.run_sync(config)
    report = json.loads((result.path / "distill_report.json").read_text())
    assert (report["kept"], report["dropped"]["threshold"]["count"]) == (2, 1)
    again = {**config, "sft": {"dataset": str(result.path / "traces.jsonl"), "batch_size": 1}}
    del again["distillation"]
    assert retrain.run_sync(again, only="sft").status == "completed"
    kept = retrain.data.load_traces(result.path / "traces.jsonl")
    called = [c.name for t in kept for m in t.messages for c in m.tool_calls]
    assert called == ["python"]
    assert sum(m.type is MessageType.MODEL for t in kept for m in t.messages) == 3


def test_the_tables_name_every_format_and_reason() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", section(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert names == ["format", *FORMATS, *MEANINGS]
