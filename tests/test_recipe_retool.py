"""ReTool: its reward, its cold start, the published set-up, and the tiny run with its control."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest

from recipe_pages import ROOT, check_gain, check_what_trains, run_command
from retrain import Message, MessageType, Rollout, Task, load_config
from retrain.loops.world import build_environment, build_renderer, build_sandbox
from retrain.models import load_policy
from retrain.recipes.demo.tasks import tasks
from retrain.recipes.retool.rewards import outcome
from retrain.recipes.retool.tasks import traces
from retrain.tools import ToolRunner
from retrain.tracking.rollouts import read_rollouts
from retrain.types import ToolCall

RECIPE = ROOT / "src" / "retrain" / "recipes" / "retool"
BOTH = [RECIPE / "retool.yaml", RECIPE / "tiny.yaml"]


def said(text: str, answer: object = "42") -> Rollout:
    rollout = Rollout(task=Task("t", (), answer=answer))
    rollout.add_messages(Message(text, MessageType.MODEL))
    return rollout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"<answer>\boxed{42}</answer>", 1),
        (r"I think <answer>it is \boxed{42.0}.</answer>", 1),
        (r"<answer>\boxed{41}</answer> no, <answer>\boxed{42}</answer>", 1),
        (r"<answer>\boxed{42}</answer> no, <answer>\boxed{41}</answer>", -1),
        (r"<answer>\boxed{4}</answer>", -1),
        (r"\boxed{42}", -1),
        ("<answer>42</answer>", -1),
        (r"<answer>\boxed{42}", -1),
        (r"<answer></answer>\boxed{42}", -1),
        ("", -1),
    ],
)
async def test_the_reward_is_one_or_minus_one(text: str, value: float) -> None:
    assert await outcome(said(text)) == value


async def test_equal_mathematics_counts_where_it_is_asked_for() -> None:
    root = said(r"<answer>\boxed{\sqrt{8}}</answer>", answer=r"2\sqrt{2}")
    assert await outcome(root) == -1
    assert await outcome(root, judge="math") == 1
    assert await outcome(said(r"<answer>\boxed{43}</answer>"), judge="math") == -1
    with pytest.raises(ValueError, match="no answer"):
        await outcome(said("x", answer=None))


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.stem)
def test_protocol_and_executor_are_the_published_ones(path: Path) -> None:
    config = load_config(path)
    environment = config.environment
    assert environment.type == "smolagent" and environment.tool_format.type == "tags"
    tags = environment.tool_format.tags()
    assert (tags.tool_start, tags.tool_end) == ("<code>", "</code>")
    assert (tags.response_start, tags.response_end) == ("<interpreter>", "</interpreter>")
    assert config.sandbox.timeout_s == 5 and environment.max_output_chars == 400
    assert list(config.reward_setup.rollout_reward_configs) == ["outcome"]
    assert config.algorithm.hyperparameters.kl is None
    assert [stage.kind for stage in config.stages or ()][:3] == ["sft", "eval", "rl"]


async def test_output_is_cut_to_400_characters_and_errors_to_their_last_line() -> None:
    config = load_config(RECIPE / "tiny.yaml")
    sandbox = build_sandbox(config)
    renderer = build_renderer(config, load_policy(config.model, seed=0))
    environment = build_environment(config, renderer, sandbox)
    runner = ToolRunner(environment.tools, max_output_chars=environment.max_output_chars)
    async with runner:
        calls = [ToolCall("python", {"code": c}) for c in ("print('ab' * 500)", "x = 1\nx // 0")]
        long, failed = await runner.run(calls)
    marker = "\n... [600 characters left out] ...\n"
    assert long.text == "ab" * 100 + marker + "ab" * 100
    assert failed.text == "ZeroDivisionError: division by zero"
    await sandbox.close()


def test_traces_are_the_demos_with_answers_in_boxes() -> None:
    for row in islice(traces(300), 300):
        *before, last = [message["content"] for message in row["messages"]]
        found = re.fullmatch(r"<answer>\\boxed\{(-?\d+)\}</answer>", last)
        assert found is not None
        assert len(before) == 1 or (before[1].startswith("<code>") and before[2] == found[1])
    held_out = {row["prompt"] for row in tasks("test", 500)}
    assert not held_out & {row["messages"][0]["content"] for row in traces(3000)}


def test_the_recipe_gains_more_than_its_control(tmp_path: Path) -> None:
    recipe = run_command("retool", "recipe", tmp_path)
    control = run_command("retool", "control", tmp_path)
    check_gain("retool", recipe, control)
    rewards = recipe.curve("reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.4
    assert recipe.evaluations["after", "T=1 without tool"].success <= 0.05
    for stage in ("unseen_tool", "unseen_words"):
        assert recipe.evaluations[stage, "T=1"].n == 400
    file = min((recipe.path / "rollouts").glob("rl-*.jsonl.gz"))
    check_what_trains(islice(read_rollouts(file), 40))
