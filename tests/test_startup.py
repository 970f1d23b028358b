"""`import retrain`, reading a config and `retrain --help` stay fast: no torch, no transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers")

IMPORT = "import retrain"
READ_CONFIG = "import retrain.config"
HELP = """
from retrain.cli import main
sys.argv = ["retrain", "--help"]
try:
    sys.exit(main())
except SystemExit as exit:
    assert not exit.code, exit.code
"""


def run_and_list_modules(code: str) -> tuple[str, set[str]]:
    """Run code in a fresh interpreter: what it printed, and the top-level modules it loaded."""
    script = f"import sys\n{code}\nimport json\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed, _, modules = done.stdout.rstrip().rpartition("\n")
    return printed, {name.partition(".")[0] for name in json.loads(modules)}


@pytest.mark.parametrize("code", [IMPORT, READ_CONFIG, HELP], ids=["import", "config", "help"])
def test_start_loads_nothing_heavy(code: str) -> None:
    _, modules = run_and_list_modules(code)
    assert "retrain" in modules
    assert modules.isdisjoint(HEAVY)


def test_help_prints_the_commands() -> None:
    printed, _ = run_and_list_modules(HELP)
    assert "Usage" in printed
    assert "demo" in printed


def test_the_check_sees_a_heavy_import() -> None:
    _, modules = run_and_list_modules("import retrain.types, torch")
    assert not modules.isdisjoint(HEAVY)
