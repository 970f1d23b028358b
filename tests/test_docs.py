"""The snippets of the pages: files are written and used, commands are run.

In the documents `<!-- file: NAME -->` before a block names the file that it is, and
`<!-- run -->` marks Python that is executed beside those files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from retrain import load_config, run_sync
from retrain.cli import app
from retrain.config.algorithm import AlgorithmConfig
from retrain.config.load import merge
from retrain.config.model import ModelConfig
from retrain.config.presets import PRESETS
from retrain.config.rewards import RewardSetup
from retrain.importing import import_object
from retrain.loops.build import build_calculator
from retrain.loops.check import check
from retrain.loops.resume import AT_A_COST, FREE
from retrain.loops.world import build_sandbox
from retrain.models import load_policy
from retrain.rewards import REWARDS, resolve_reward
from retrain.sandbox import MontySandbox
from retrain.tools import resolve_tools
from runs import rl_config, rollouts_of

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
TINY_MODEL = """
model:
  from_scratch:
    config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
             num_key_value_heads: 2, head_dim: 16, intermediate_size: 64,
             max_position_embeddings: 1024}
    tokenizer: {vocab_size: 300, corpus: "corpus.py:texts"}
algorithm:
  hyperparameters: {steps: 1, prompts_per_step: 1, group_size: 2, max_new_tokens: 8}
"""


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m["mark"] or "", m["language"], m["text"]) for m in BLOCK.finditer(text)]


def unpack(page: str, folder: Path) -> Path:
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    (folder / "corpus.py").write_text("def texts():\n    return ['What is 2 + 2?'] * 3\n")
    return folder


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("docs/guide.md", tmp_path_factory.mktemp("guide"))


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return unpack("README.md", tmp_path)


def parse(text: str) -> dict[str, Any]:
    data = YAML(typ="safe", pure=True).load(text)
    assert isinstance(data, dict)
    return data


def execute(folder: Path, code: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whole_configs_of_the_guide_load(guide: Path) -> None:
    whole = [b for b in blocks("docs/guide.md") if b.language == "yaml" and b.file]
    assert len(whole) == 6
    for block in whole:
        load_config(parse(block.text))


def test_parts_of_configs_fit_the_guides_task(guide: Path) -> None:
    base = parse((guide / "task.yaml").read_text(encoding="utf-8"))
    parts = [b for b in blocks("docs/guide.md") if b.language == "yaml" and not b.file]
    assert len(parts) == 6
    for block in parts:
        load_config(merge(base, parse(block.text)))


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_check_commands_succeed_without_warnings(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unpack(page, tmp_path))
    text = "\n".join(b.text for b in blocks(page) if b.language == "bash")
    commands = re.findall(r"^retrain (check .*?)(?:  #.*|  .*)?$", text, re.MULTILINE)
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, f"{command}\n{result.output}"
        assert "warning:" not in result.output


@pytest.mark.parametrize("name", ["task", "rewarded", "tools", "guess", "dialogue", "sft"])
def test_configs_of_the_guide_run_with_a_tiny_model(
    name: str, guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(guide)
    config = parse((guide / f"{name}.yaml").read_text(encoding="utf-8"))
    config = {**merge(config, parse(TINY_MODEL)), "output_dir": str(tmp_path)}
    config["model"] = parse(TINY_MODEL)["model"]
    config["tracking"] = {"plots": False}
    result = run_sync(config)
    assert result.status == "completed"
    assert result.checkpoint is not None and result.checkpoint.is_dir()


def test_marked_python_of_the_guide_runs(guide: Path) -> None:
    marked = [b for b in blocks("docs/guide.md") if b.mark == "run"]
    assert marked
    for block in marked:
        execute(guide, block.text)


def test_python_of_the_readme_trains(readme: Path) -> None:
    config = parse((readme / "task.yaml").read_text(encoding="utf-8"))
    tiny = parse(TINY_MODEL)
    with (readme / "task.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump({**config, **tiny}, file)
    output = execute(readme, (readme / "train.py").read_text(encoding="utf-8"))
    path, checkpoint, reward = output.split()[-3:]
    assert (readme / path / "metrics.jsonl").is_file()
    assert checkpoint == f"{path}/checkpoints/rl"
    assert 0 < float(reward) <= 1.1


def test_the_readmes_own_loop_trains(readme: Path) -> None:
    model = parse(TINY_MODEL)["model"]
    model["from_scratch"]["tokenizer"]["corpus"] = "runs:corpus"
    policy = load_policy(ModelConfig.model_validate(model))
    policy.model.save_pretrained(readme / "model")  # type: ignore[operator]
    policy.tokenizer.save_pretrained(readme / "model")
    code = (readme / "own_loop.py").read_text(encoding="utf-8")
    for written, tried in {
        "lr=1e-6": "lr=1e-2",
        "max_new_tokens=256": "max_new_tokens=8",
        "BoxedReward()\n": "lambda rollouts, answers: range(8)\n",
        "AutoModelForCausalLM.from_pretrained(directory)": "kept",
    }.items():
        assert written in code
        code = code.replace(written, tried)
    code += """
kept = AutoModelForCausalLM.from_pretrained("model")
before = {name: p.detach().clone() for name, p in kept.named_parameters()}
train("model", [("2 + 3?", "5"), ("4 + 4?", "8")])
print(all((p != before[name]).any() for name, p in kept.named_parameters()))
"""
    assert execute(readme, code) == "True\n"


def test_the_page_on_algorithms_says_what_presets_are() -> None:
    for block in blocks("docs/algorithms.md"):
        AlgorithmConfig.model_validate(parse(block.text)["algorithm"])
    text = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| `(\w+)` \|", text, re.MULTILINE)
    assert [name for name, *_ in rows] == list(PRESETS)
    for name, _, divided, loss, aggregation in rows:
        settings = AlgorithmConfig(name=name).hyperparameters
        assert aggregation == settings.aggregation
        assert f"`{settings.loss}`" in loss
        words = {"group": "group's std", "batch": "batch", "none": "nothing"}
        assert divided == words[settings.normalize_advantages]


def test_the_readmes_own_reward_tool_and_environment_are_found(readme: Path) -> None:
    resolve_reward("my_task.py:polite", "rollout")
    assert list(resolve_tools("my_task.py:population")[0].parameters["properties"]) == ["city"]
    config = parse((readme / "task.yaml").read_text(encoding="utf-8"))
    config["environment"] = {"type": "python", "path": "my_task.py:SayYes"}
    load_config(config)
    assert isinstance(import_object("my_task.py:SayYes", "environment"), type)


def test_the_page_on_resuming_says_what_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reward with a state runs and is saved; its keys are those that may change."""
    monkeypatch.chdir(tmp_path)
    unpack("docs/resuming.md", tmp_path)
    config = merge(parse(TINY_MODEL), {"prompt_source": {"type": "list", "prompts": ["1?", "2?"]}})
    config["algorithm"]["hyperparameters"] |= {"steps": 2, "group_size": 3}
    reward = {"function": "recent.py:AboveRecentMean", "params": {"size": 4}}
    config["reward_setup"] = {"rollout_reward_configs": {"above": reward}}
    checkpoint = run_sync(config).checkpoint
    assert checkpoint is not None
    state = json.loads((checkpoint / "resume" / "state.json").read_text())
    assert len(state["rewards"]["above"]["seen"]) == 4
    text = (ROOT / "docs/resuming.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \|$", text[text.index("may change") :], re.MULTILINE)
    told = [re.findall(r"`([^`]+)`", row) for row in rows]
    for keys, patterns in zip(told, (FREE, AT_A_COST), strict=True):
        named = [key.replace(".*", ".x").replace("sft.x", "sft.steps") for key in keys]
        for key in named:
            full = f"algorithm.hyperparameters.{key}" if "." not in key else key
            assert any(re.fullmatch(p, k) for p in patterns for k in (key, full)), key
        for pattern in patterns:
            parts = [f"algorithm.hyperparameters.{k}" for k in named] + named
            assert any(re.fullmatch(pattern, part) for part in parts), pattern


def test_the_page_on_sandboxes_says_what_is_so(tmp_path: Path) -> None:
    page = blocks("docs/sandbox.md")
    configs = [block for block in page if block.language == "yaml"]
    assert len(configs) == 2
    for block in configs:
        build_sandbox(load_config(parse(block.text)))
    [example] = [block for block in page if block.language == "python"]
    assert execute(tmp_path, example.text) == "42\nerror\n"
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert re.search(r"^auto: (jail|monty)$", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "examples").rglob("*.md"))),
    ],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_config_on_the_page_about_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unpack("docs/tools.md", tmp_path))
    config = load_config("tools.yaml")
    assert "tool price(thing): What a thing costs." in check(config)
    assert config.environment.tools_column == "tools"


def test_the_configs_and_the_protocol_on_the_page_about_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack("docs/agents.md", tmp_path)
    monkeypatch.chdir(folder)
    assert "agent critic: policy, does not train" in check(load_config("debate.yaml"))
    assert "agent lead: policy, trains; calls calculator" in check(load_config("team.yaml"))
    quiz = {"type": "agents", "path": "quiz.py:Quiz", "agents": {"host": {}, "guest": {}}}
    config = rl_config(folder, environment=quiz, reward_setup={})
    result = run_sync(config)
    agents = [rollout.agent for rollout in rollouts_of(result.path)[1]]
    assert agents[:5] == ["host", *["guest"] * 4]


def test_the_config_on_the_page_about_the_gateway(tmp_path: Path) -> None:
    config = load_config(unpack("docs/gateway.md", tmp_path) / "gateway.yaml", runs=False)
    assert config.gateway is not None and config.gateway.upstream is not None
    assert f"http://127.0.0.1:{config.gateway.port}" in (ROOT / "docs/gateway.md").read_text()


def test_the_page_about_rewards_is_what_the_script_writes() -> None:
    path = ROOT / "scripts" / "reward_reference.py"
    spec = importlib.util.spec_from_file_location("reward_reference", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert script.page() == text, "run python scripts/reward_reference.py"


def test_examples_on_the_page_about_rewards_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    examples = [parse(found) for found in re.findall(r"Example: `([^\n]+)`$", text, re.MULTILINE)]
    assert {name for example in examples for name in example} == set(REWARDS)
    for example in examples:
        kind = "group" if "pairwise_judge" in example else "rollout"
        setup = RewardSetup.model_validate({f"{kind}_reward_configs": example})
        build_calculator(setup, MontySandbox())
    for block in blocks("docs/rewards.md"):
        build_calculator(RewardSetup.model_validate(parse(block.text)["reward_setup"]), None)  # type: ignore[arg-type]
