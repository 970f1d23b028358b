"""The command line: options reach the run, errors are short, exit codes differ."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import retrain
from conftest import LISTEN_TO_CTRL_C
from retrain.cli import app
from retrain.config import TrainingConfig, load_config
from retrain.loops.interrupt import Interrupted
from retrain.types import UserError

CONFIG = """\
experiment_name: poem
model: {name_or_path: some/model}
prompt_source: {type: list, prompts: [a]}
reward_setup: {rollout_reward_configs: {exact_match: {}}}
evaluation: {prompt_source: {type: list, prompts: [b]}}
sft: {dataset: traces.jsonl}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "poem.yaml"
    path.write_text(CONFIG)
    return str(path)


class Recorder:
    """Stands where the loops are, so that the command line is tested without a model."""

    def __init__(self) -> None:
        self.configs: list[TrainingConfig] = []
        self.only: list[str | None] = []
        self.resume: list[str | None] = []
        self.error: BaseException | None = None

    async def run(
        self, config: TrainingConfig, *, only: str | None = None, resume: str | None = None
    ) -> None:
        self.configs.append(config)
        self.only.append(only)
        self.resume.append(resume)
        if self.error is not None:
            raise self.error

    def check(self, config: TrainingConfig) -> str:
        self.configs.append(config)
        return f"would run {config.experiment_name}"


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for name in ("run", "check"):
        module: Any = ModuleType(f"retrain.loops.{name}")
        setattr(module, name, getattr(recorder, name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("retrain.cli._set_up_logging", lambda level: None)
    return recorder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def shell(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"{code}\nfrom retrain.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("command", "only"), [("run", None), ("sft", "sft"), ("eval", "eval")])
def test_commands_run_their_stages(
    command: str, only: str | None, config: str, loops: Recorder
) -> None:
    result = invoke(
        command, config, "--set", "seed=3", "--set", "experiment_name=x", "--output-dir", "a: b"
    )
    assert result.exit_code == 0, result.output
    assert loops.only == [only]
    (loaded,) = loops.configs
    assert (loaded.seed, loaded.experiment_name, loaded.output_dir) == (3, "x", "a: b")


def test_a_command_needs_only_the_sections_of_its_stages(tmp_path: Path, loops: Recorder) -> None:
    path = tmp_path / "eval.yaml"
    source = "{prompt_source: {type: list, prompts: [b]}}"
    path.write_text(f"model: {{name_or_path: some/model}}\nevaluation: {source}\n")
    assert invoke("eval", str(path)).exit_code == 0
    result = invoke("run", str(path))
    assert (
        result.exit_code == 2 and "a stage of kind rl needs section prompt_source" in result.stderr
    )


def test_the_dedicated_option_wins_over_set(config: str, loops: Recorder) -> None:
    assert invoke("run", config, "--output-dir", "b", "--set", "output_dir=a").exit_code == 0
    assert loops.configs[0].output_dir == "b"


def test_check_prints_what_would_happen(config: str, loops: Recorder) -> None:
    result = invoke("check", config, "--set", "experiment_name=x")
    assert (result.exit_code, result.stdout) == (0, "would run x\n")


def test_demo_runs_the_packaged_recipe(loops: Recorder, tmp_path: Path) -> None:
    result = invoke("demo", "--seed", "7", "--output-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    (loaded,) = loops.configs
    assert (loaded.seed, loaded.output_dir) == (7, str(tmp_path))
    assert loaded.model.from_scratch is not None


def test_a_users_error_is_its_cause_and_next_step(config: str, loops: Recorder) -> None:
    result = invoke("run", config, "--set", "sed=1")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: {config}: unknown key sed; did you mean 'seed'?\n"
        "  See docs/config.md for every key.\n"
    )
    assert loops.configs == []


def test_other_errors_are_one_line_and_a_hint(config: str, loops: Recorder) -> None:
    loops.error = ValueError("two\nlines")
    result = invoke("run", config)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: ValueError: two lines\n  Run again with --debug for the traceback.\n"
    )
    loops.error = ZeroDivisionError()
    assert invoke("run", config).stderr.startswith("error: ZeroDivisionError\n")


@pytest.mark.parametrize(("error", "code"), [(ValueError("boom"), 1), (UserError("boom"), 2)])
def test_debug_shows_the_traceback(
    error: Exception, code: int, config: str, loops: Recorder
) -> None:
    loops.error = error
    result = invoke("run", config, "--debug")
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "raise self.error" in result.stderr and "Run again" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("boom")


def test_the_users_error_is_found_in_a_group(config: str, loops: Recorder) -> None:
    inner = ExceptionGroup("inner", [ValueError("noise"), UserError("your reward", "Fix it.")])
    loops.error = ExceptionGroup("tasks", [ValueError("noise"), inner])
    result = invoke("run", config)
    assert (result.exit_code, result.stderr) == (2, "error: your reward\n  Fix it.\n")
    loops.error = BaseExceptionGroup("tasks", [ValueError("noise"), KeyboardInterrupt()])
    assert invoke("run", config).exit_code == 130
    loops.error = ExceptionGroup("tasks", [KeyError("k")])
    assert invoke("run", config).stderr.startswith("error: KeyError: 'k'\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--resume",), "latest"),
        (("--resume", "--set", "seed=1"), "latest"),
        (("--resume", "auto"), "auto"),
        (("--resume=runs/poem-003",), "runs/poem-003"),
    ],
)
def test_resume_may_stand_alone(
    arguments: tuple[str, ...], expected: str | None, config: str, loops: Recorder
) -> None:
    for command in (("run", config), ("sft", config), ("demo",)):
        assert invoke(*command, *arguments).exit_code == 0
        assert loops.resume[-1] == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_stopped_says_how_it_goes_on(
    number: int, code: int, config: str, loops: Recorder
) -> None:
    stopped = Interrupted(number)
    stopped.checkpoint = "runs/poem-001/checkpoints/rl-000004"
    loops.error = stopped
    result = invoke("run", config)
    assert result.exit_code == code
    assert result.stderr == (
        "interrupted; saved: runs/poem-001/checkpoints/rl-000004\n"
        "  Go on with the same command and --resume.\n"
    )
    stopped.checkpoint = None
    assert invoke("eval", config).stderr == "interrupted; there was nothing to save yet\n"


def test_ctrl_c_is_one_line(config: str) -> None:
    code = (
        "import asyncio, sys, types\n"
        "module = types.ModuleType('retrain.loops.run')\n"
        "async def run(config, *, only=None, resume=None):\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "module.run = run\n"
        "sys.modules['retrain.loops.run'] = module\n"
        "from retrain.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{LISTEN_TO_CTRL_C}{code}", "run", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_a_missing_config_in_a_real_process(tmp_path: Path) -> None:
    done = shell("check", str(tmp_path / "nothing.yaml"))
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: config file .*nothing\.yaml does not exist\n  Check the path\.\n", done.stderr
    )


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'numpy', 'pydantic', 'matplotlib')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = shell("--help", code=code)
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0 and done.stderr == "[]\n"
    for command in ("run", "check", "demo", "sft", "distill", "gateway", "eval"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert min(seconds) < 2.0


def test_version_is_that_of_the_package() -> None:
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    version = tomllib.loads(pyproject.read_text())["project"]["version"]
    assert retrain.__version__ == version
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"retrain {version}\n")


def test_without_a_command_help_is_shown() -> None:
    result = invoke()
    assert result.exit_code == 2 and "Usage" in result.output
    assert invoke("rnu").exit_code == 2


@pytest.mark.parametrize(("level", "shown"), [("warning", ["b"]), ("info", ["a", "b"])])
def test_logging_follows_the_config(level: str, shown: list[str], config: str) -> None:
    code = (
        "import logging, sys, types, warnings, os\n"
        "module = types.ModuleType('retrain.loops.run')\n"
        "async def run(config, *, only=None, resume=None):\n"
        "    logging.getLogger('retrain.x').info('a')\n"
        "    logging.getLogger('retrain.x').warning('b')\n"
        "    logging.getLogger('transformers').warning('chatter')\n"
        "    assert os.environ['HF_HUB_DISABLE_PROGRESS_BARS'] == '1'\n"
        "module.run = run\n"
        "sys.modules['retrain.loops.run'] = module"
    )
    done = shell("run", config, "--set", f"logging_level={level}", code=code)
    assert done.returncode == 0, done.stderr
    assert [line[-1] for line in done.stderr.splitlines()] == shown
    assert all(" retrain.x: " in line for line in done.stderr.splitlines())


def test_public_names_are_lazy_and_complete() -> None:
    code = (
        "import sys, retrain\n"
        "assert set(retrain.__all__) <= set(dir(retrain))\n"
        "retrain.Rollout, retrain.UserError, retrain.load_config, retrain.TrainingConfig\n"
        "assert retrain.Message('hi', retrain.MessageType.MESSAGE).content == 'hi'\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "for name in retrain.__all__: getattr(retrain, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'rum'"):
        retrain.rum  # noqa: B018
    assert os.path.dirname(retrain.__file__).endswith("retrain")


def test_recipes_are_listed_printed_and_run_by_name(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0 and "demo/demo\n" in listed.output
    printed = CliRunner().invoke(app, ["recipes", "demo"])
    copy = tmp_path / "mine.yaml"
    copy.write_text(printed.output)
    assert load_config(copy) == load_config("recipe:demo/demo.yaml") == load_config("recipe:demo")
    unknown = CliRunner().invoke(app, ["check", "recipe:dmo"])
    assert unknown.exit_code == 2 and "no recipe 'dmo'" in unknown.output
