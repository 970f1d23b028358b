"""The search recipe: its world, its corpora, the real set-up, and the tiny run with its control."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from recipe_pages import ROOT, check_gain, check_what_trains, command, run_command
from retrain import load_config
from retrain.recipes.search.hotpot import passages as hotpot_passages
from retrain.recipes.search.world import (
    SHARES,
    THINGS,
    VERBS,
    Lookup,
    passages,
    tasks,
    traces,
    world,
)
from retrain.tools.retrieval import RetrievalTool
from retrain.tracking.rollouts import read_rollouts

RECIPE = ROOT / "src" / "retrain" / "recipes" / "search"
CORPUS = "retrain.recipes.search.world:passages"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_parts_have_no_name_in_common_and_no_name_means_two_things() -> None:
    facts = world()
    names: dict[str, set[str]] = {}
    for part in ("train", "test"):
        towns = set(facts.towns[part])
        things = {name for (town, _), name in facts.thing.items() if town in towns}
        assert {facts.place[who, verb] for who in facts.people[part] for verb in VERBS} <= towns
        names[part] = {*facts.people[part], *towns, *things}
        assert len(names[part]) == len(facts.people[part]) + len(towns) * (1 + len(THINGS))
    assert not names["train"] & names["test"]
    for row in (*tasks("train", 3000), *tasks("test", 400)):
        part = "train" if row["person"] in facts.people["train"] else "test"
        assert {row["person"], row["town"], row["answer"]} <= names[part]
    for row in traces(2000):
        assert not set(str(row["messages"]).replace("'", " ").split()) & names["test"]


def test_an_answer_takes_both_facts() -> None:
    facts = world()
    for row in tasks("test", 400):
        assert row["town"] == facts.place[row["person"], row["verb"]]
        assert row["answer"] == facts.thing[row["town"], row["kind"]]
        assert row["town"] not in row["prompt"]
    assert len({row["prompt"] for row in tasks("test", 400)}) == 400
    assert list(tasks("test", 50)) == list(tasks("test", 50))
    assert world(1).place != facts.place


def test_the_teacher_is_right_in_a_quarter_of_the_traces() -> None:
    facts = world()
    habits: Counter[str] = Counter()
    for row in traces(4000):
        _, *said, last = [message["content"] for message in row["messages"]]
        habits[row["habit"]] += 1
        assert len(said) == {"guesses": 0, "stops early": 2}.get(row["habit"], 4)
        if row["habit"] == "right":
            assert said[-1].endswith(f"is {last}")
            assert last in facts.thing.values()
    for habit, share in SHARES.items():
        assert habits[habit] / 4000 == pytest.approx(share, abs=0.03)


async def test_two_searches_find_what_the_traces_say(tmp_path: Path) -> None:
    session = RetrievalTool(CORPUS, top_k=1).session()
    for row in tasks("test", 200):
        first = await session.call({"query": f"where {row['person']} {row['verb']}"})
        assert first == f"Doc 1 {row['person']} {row['verb']} in {row['town']}"
        second = await session.call({"query": f"{row['kind']} of {row['town']}"})
        assert second == f"Doc 1 the {row['kind']} of {row['town']} is {row['answer']}"


def test_the_unseen_register_has_the_same_facts() -> None:
    row = next(tasks("test", 1))
    person, verb, town, kind = (row[key] for key in ("person", "verb", "town", "kind"))
    assert Lookup()(f"where {person} {verb}") == f"{person} {verb} in {town}"
    assert Lookup(terse=True)(f"{kind} of {town}") == f"{kind}: {row['answer']}"
    assert Lookup()(town) == "no such entry"


def test_a_corpus_is_made_of_hotpot_paragraphs(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    context = {"title": ["Oslo", "Rome"], "sentences": [["In Norway.", " By a fjord."], ["Old."]]}
    rows = [{"id": "5a", "question": "?", "answer": "!", "context": context}]
    split = datasets.Dataset.from_list(rows)
    saved = datasets.DatasetDict({"train": split, "validation": split})
    saved.save_to_disk(tmp_path / "hotpot")
    assert list(hotpot_passages(str(tmp_path / "hotpot"), name=None)) == [
        {"title": "Oslo", "text": "In Norway. By a fjord."},
        {"title": "Rome", "text": "Old."},
    ]


def test_the_real_set_up_is_the_protocol_of_search_r1() -> None:
    for name in ("search", "tiny"):
        config = load_config(RECIPE / f"{name}.yaml")
        environment = config.environment
        assert environment.type == "smolagent" and environment.tool_format.type == "tags"
        tags = environment.tool_format.tags()
        assert (tags.tool_start, tags.tool_end) == ("<search>", "</search>")
        assert (tags.response_start, tags.response_end) == ("<information>", "</information>")
        assert [tool.name for tool in environment.tool_list()] == ["retrieval"]
        assert config.algorithm.name == "grpo"
    settings = load_config(RECIPE / "search.yaml")
    assert set(settings.reward_setup.rollout_reward_configs) == {"em", "f1"}
    assert settings.evaluation is not None and settings.evaluation.success_reward == "em"


def test_the_control_is_random_in_rl_only() -> None:
    from retrain.config import resolve_stages

    path, overrides = command("search", "control")
    for _, kind, stage in resolve_stages(load_config(path, overrides)):
        function = stage.reward_setup.rollout_reward_configs["answer"].function
        assert function == ("random" if kind == "rl" else "squad_em")


def test_the_recipe_gains_more_than_its_control(tmp_path: Path) -> None:
    recipe = run_command("search", "recipe", tmp_path)
    control = run_command("search", "control", tmp_path)
    check_gain("search", recipe, control)
    rewards = recipe.curve("reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    assert recipe.evaluations["after", "T=1 without tool"].success <= 0.05
    for stage in ("unseen_tool", "unseen_words"):
        assert recipe.evaluations[stage, "T=1"].n == 400
    file = max((recipe.path / "rollouts").glob("rl-*.jsonl.gz"))
    check_what_trains(islice(read_rollouts(file), 40))


def test_passages_are_one_sentence_each() -> None:
    rows = list(passages())
    assert len(rows) == 1300 * 2 + 500 * 3 == len({row["text"] for row in rows})
    assert max(len(row["text"]) for row in rows) < 32
