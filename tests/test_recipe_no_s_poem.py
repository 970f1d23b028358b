"""The poem without the letter s: its rules, its set-up for a real model, and the tiny run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recipe_pages import ROOT, check_gain, run_command
from retrain import Message, MessageType, Rollout, load_config
from retrain.cli import app
from retrain.loops.build import build_calculator
from retrain.recipes.no_s_poem.grammar import DOGS, PLAIN, WITH_S, tasks, traces
from retrain.recipes.no_s_poem.poem import is_actually_a_poem, mentions_a_cat
from retrain.sandbox import MontySandbox

RECIPE = ROOT / "src" / "retrain" / "recipes" / "no_s_poem"
POEM, TINY = RECIPE / "poem.yaml", RECIPE / "tiny.yaml"
GOOD = """\
A happy cat in golden light,
A warm and merry, purring ball,
We laugh and play from noon to night,
A joyful friend, beloved by all."""
WITH_AN_S = """\
The cat sits in the sun,
It purrs and has some fun,
A happy little one,
When all the day is done."""
NO_CAT = GOOD.replace("cat", "dog")


def poem(text: str) -> Rollout:
    rollout = Rollout(stop_reason="answered")
    rollout.add_messages(
        Message("A poem, please.", MessageType.MESSAGE), Message(text, MessageType.MODEL)
    )
    return rollout


async def scored(text: str, path: Path = POEM) -> Rollout:
    rollout = poem(text)
    await build_calculator(load_config(path).reward_setup, MontySandbox()).score([rollout])
    return rollout


@pytest.mark.parametrize("path", [POEM, TINY], ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("text", "total"),
    [
        (GOOD, 0 + 10 * 26 / 26 + 5 * 3 / 3 + 1),
        (WITH_AN_S, -100 + 10 * 16 / 22 + 5 * 2 / 3 + 1),
        (NO_CAT, -110),
        ("A happy cat.", -110),
        ("A cat ball\n" * 4, -110),
        ("", -110),
    ],
)
async def test_poems_written_by_hand_get_what_the_rules_say(
    text: str, total: float, path: Path
) -> None:
    assert (await scored(text, path)).reward == pytest.approx(total, abs=1e-9)


async def test_a_poems_parts_say_where_its_reward_comes_from() -> None:
    parts = {part.name: part for part in (await scored(WITH_AN_S)).reward_parts}
    assert parts["words_without_s"].raw == pytest.approx(16 / 22)
    assert parts["words_without_s"].weight == 10
    assert parts["penalize_text_containing"].value == -100
    gated = (await scored(NO_CAT)).reward_parts
    assert [part.verifier for part in gated] == ["retrain.recipes.no_s_poem.poem:mentions_a_cat"]


@pytest.mark.parametrize("path", [POEM, TINY], ids=lambda path: path.stem)
def test_it_checks_without_a_hub_and_without_warnings(path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "failing it makes the total -110" in result.output
    assert "warning" not in result.output


def test_check_warns_when_a_poem_that_is_none_would_pay() -> None:
    arguments = ["check", str(POEM), "--set", "reward_setup.verifier_penalty=0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "pays 0, but passing can pay as little as -100" in result.output


def test_the_tiny_run_has_the_rules_of_the_real_one() -> None:
    assert load_config(TINY).reward_setup == load_config(POEM).reward_setup


def test_no_prompt_is_in_both_parts() -> None:
    train, test = ({row["prompt"] for row in tasks(part)} for part in ("train", "test"))
    assert (len(train), len(test)) == (144, 36)
    assert not train & test
    assert {row["messages"][0]["content"] for row in traces(1000)} <= train


def test_words_of_the_grammar_are_where_they_belong() -> None:
    assert not any("s" in words for words in itertools.chain(*PLAIN, DOGS))
    assert all("s" in words.lower() for words in itertools.chain(*WITH_S))


def test_the_teacher_is_seldom_right() -> None:
    """Four lines of three parts have no s with 0.8 ** 12, and 0.7 of the answers are cat poems."""
    told = [poem(row["messages"][1]["content"]) for row in traces(4000)]
    poems = [rollout for rollout in told if is_actually_a_poem(rollout)]
    cats = [rollout for rollout in poems if mentions_a_cat(rollout)]
    assert len(poems) / len(told) == pytest.approx(0.85, abs=0.03)
    assert len(cats) / len(told) == pytest.approx(0.7, abs=0.03)
    right = sum("s" not in rollout.completion.lower() for rollout in cats) / len(told)
    assert right == pytest.approx(0.7 * 0.8**12, abs=0.02)


def test_the_recipe_gains_more_than_its_control(tmp_path: Path) -> None:
    recipe = run_command("no_s_poem", "recipe", tmp_path)
    control = run_command("no_s_poem", "control", tmp_path)
    check_gain("no_s_poem", recipe, control)
    rewards = recipe.curve("reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 40
