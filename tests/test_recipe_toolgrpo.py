"""ToolGRPO: its four rewards, its tasks, the published set-up, the tiny run and its control."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest

from recipe_pages import ROOT, Ran, check_gain, command, page, run_command
from retrain import Message, MessageType, Rollout, Task, load_config
from retrain.recipes.toolgrpo.rewards import correct, integer, python, structure
from retrain.recipes.toolgrpo.tasks import tasks, traces
from retrain.recipes.toolgrpo.tools import Calculator
from retrain.tools.base import ModelError

RECIPE = ROOT / "src" / "retrain" / "recipes" / "toolgrpo"


def rollout(*turns: str, answer: object = "42", ok: int = 0, failed: int = 0) -> Rollout:
    """MODEL turns; a text that starts with `->` is a tool's result."""
    made = Rollout(task=Task("t", (), answer=answer))
    for text in turns:
        if text.startswith("->"):
            made.add_messages(Message(text[2:], MessageType.TOOL))
        else:
            made.add_messages(Message(text, MessageType.MODEL))
    counts = {"tool_calls/ok": float(ok), "tool_calls/model_error": float(failed)}
    made.metrics |= {name: count for name, count in counts.items() if count}
    return made


CALL = "```python\n6*7\n```\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # (rollout, (correct, integer, structure, python))
        (rollout(CALL, "->42", r"\boxed{42}", ok=1), (1, 1, 3, 1.1)),
        (rollout(CALL, "->42", r"So \boxed{42}.", ok=1), (1, 1, 3, 1.1)),
        (rollout(r"\boxed{42}"), (1, 1, 3, 0)),
        (rollout(CALL, "->42", r"\boxed{41}", ok=1), (0, 1, 3, 0.6)),
        (rollout(CALL, "->NameError: x", r"\boxed{42}", failed=1), (1, 1, 3, 0.1)),
        (rollout(CALL, "->14\n42", r"\boxed{42} or so", ok=1), (1, 1, 2, 1.1)),
        (rollout(CALL, "->142", r"\boxed{42}", ok=1), (1, 1, 3, 0.6)),
        (rollout(r"Is it \boxed{1}? No, \boxed{42}"), (1, 1, 1, 0)),
        (rollout(r"\boxed{42} " + CALL, "->42", r"\boxed{42}", ok=1), (1, 1, 2, 1.1)),
        (rollout(CALL, "->42", r"\boxed{x}", ok=1), (0, 0, 3, 0.6)),
        (rollout(CALL, "->42", "42", ok=1), (0, 0, 0, 0.6)),
        (rollout(CALL, "->42", r"\boxed{42", ok=1), (0, 0, 0, 0.6)),
        (rollout(r"\boxed{042}", answer=42), (1, 1, 3, 0)),
        (rollout(), (0, 0, 0, 0)),
    ],
)
def test_the_four_rewards(given: Rollout, expected: tuple[float, ...]) -> None:
    found = tuple(reward(given) for reward in (correct, integer, structure, python))
    assert found == pytest.approx(expected)


def test_a_perfect_rollout_earns_4_975() -> None:
    """3 x 1 + 0.5 x 1 + 0.125 x 3 + 1.1."""
    setup = load_config(RECIPE / "aime.yaml").reward_setup.rollout_reward_configs
    best = {"correct": 1, "integer": 1, "structure": 3, "python": 1.1}
    assert sum(setup[name].weight * raw for name, raw in best.items()) == pytest.approx(4.975)
    tiny = load_config(RECIPE / "tiny.yaml").reward_setup.rollout_reward_configs
    assert {name: tiny[name].weight for name in tiny} == {name: setup[name].weight for name in best}


def test_aime_is_the_published_set_up() -> None:
    config = load_config(RECIPE / "aime.yaml")
    settings, adapter = config.algorithm.hyperparameters, config.model.peft
    assert config.model.name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert adapter is not None and config.engine.type == "torch"
    assert (adapter.r, adapter.alpha, adapter.dropout) == (128, 128, 0.0)
    assert adapter.target_modules == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert (settings.learning_rate, settings.weight_decay, settings.max_grad_norm) == (
        2e-5, 0.01, 1.0,
    )  # fmt: skip
    assert settings.warmup_steps == round(0.1 * settings.steps)
    assert settings.train_turns == "all" and settings.group_size == 8
    assert settings.prompts_per_step * settings.steps == pytest.approx(2 * 933, abs=4)
    assert config.sandbox.timeout_s == 5 and config.engine.context_limit == 2048
    assert config.environment.type == "smolagent" and config.environment.max_steps > 2
    form = config.environment.tool_format
    assert (form.type, form.language, form.output) == ("fenced", "python", "output")
    source, held_out = config.prompt_source, config.evaluation
    assert source is not None and source.type == "hf_dataset" and held_out is not None
    assert (source.path, source.prompt_column, source.answer_column) == (
        "gneubig/aime-1983-2024", "Question", "Answer",
    )  # fmt: skip
    assert held_out.prompt_source.type == "hf_dataset"
    assert (held_out.prompt_source.path, held_out.prompt_source.name) == (
        "opencompass/AIME2025", "AIME2025-I",
    )  # fmt: skip
    assert held_out.every_steps == config.checkpoint.every_steps == 50


def test_no_operands_are_in_both_parts() -> None:
    train, test = (list(tasks(part, 1000)) for part in ("train", "test"))
    assert len({row["prompt"] for row in train}) == len({row["prompt"] for row in test}) == 1000
    held_out = {(row["a"], row["b"]) for row in test}
    assert not held_out & {(row["a"], row["b"]) for row in train}
    taught = {row["messages"][0]["content"] for row in traces(3000)}
    assert not taught & {row["prompt"] for row in test}


def test_answers_follow_from_the_prompts() -> None:
    fails = 0
    for row in tasks("test", 600):
        x, y, *z = map(int, re.findall(r"\d+", row["prompt"]))
        if row["form"] == "chain":
            expected = x * y // 2 if x * y % 2 == 0 else x * y * 3
        else:
            remainder = y % z[0]
            fails += remainder == 0
            expected = x // remainder if remainder else 0
        assert row["answer"] == str(expected)
    assert 80 <= fails <= 140, "a third of 300 divisions"


def test_only_the_calls_of_the_teacher_are_wrong() -> None:
    """Two calls of a chain are each right in 0.4 of the cases, so both are in 0.16."""
    right: dict[str, list[bool]] = {"chain": [], "guard": []}
    for row in islice(traces(4000), 4000):
        *_, result, last = [message["content"] for message in row["messages"]]
        assert last == f"\\boxed{{{result if result.isdigit() else 0}}}"
        right[row["form"]].append(last == f"\\boxed{{{row['answer']}}}")
    share = {form: sum(of) / len(of) for form, of in right.items()}
    assert share["chain"] == pytest.approx(0.16, abs=0.03)
    assert 0.4 <= share["guard"] < 0.55, "0.4, and some results that agree by chance"


async def test_the_unseen_calculator() -> None:
    calculator, in_words = Calculator(), Calculator(words=True)
    assert await calculator("12*(3+4)") == "84"
    assert await in_words("17//5%2-1") == "result = 0"
    for expression, message in (
        ("7//(4%2)", "cannot divide by nothing"),
        ("2**9", "unknown operation"),
        ("f(1)", "cannot compute that"),
        ("1.5+2", "cannot compute that"),
        ("1+", "cannot read that"),
        ("+".join("1" * 60), "cannot compute that"),
        ("*".join(["9" * 70] * 3), "too large"),
    ):
        with pytest.raises(ModelError, match=message):
            await calculator(expression)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_command("toolgrpo", "recipe", tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_command("toolgrpo", "failures", tmp_path_factory.mktemp("failures"))


def test_the_recipe_gains_more_than_its_control(recipe: Ran, tmp_path: Path) -> None:
    control = run_command("toolgrpo", "control", tmp_path)
    check_gain("toolgrpo", recipe, control)


def test_the_reward_rises_and_calls_chain(recipe: Ran) -> None:
    rewards = recipe.curve("reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5
    before, after = (recipe.evaluations[stage, "T=1"].by_group for stage in ("before", "after"))
    for form, (n, successes) in after.items():
        assert successes / n >= before[form][1] / before[form][0] + 0.2, form
    assert recipe.evaluations["after", "T=1 without tool"].success <= 0.1
    for stage in ("unseen_tool", "unseen_words"):
        assert recipe.evaluations[stage, "T=1"].n == 400


def test_with_its_failures_switched_on_it_gains_less_than_half(recipe: Ran, failures: Ran) -> None:
    assert failures.gain < recipe.gain / 2
    share = [t / (n * m) for t, n, m in zip(
        failures.curve("tokens/trained"), failures.curve("rollouts"),
        failures.curve("response_tokens/mean"), strict=False)]  # fmt: skip
    assert max(share) < 0.5, "call tokens do not train"


def test_the_failures_are_those_that_were_published() -> None:
    path, overrides = command("toolgrpo", "failures")
    settings = load_config(path, overrides).algorithm.hyperparameters
    cured = load_config(path).algorithm.hyperparameters
    assert (settings.train_turns, settings.group_size) == ("last", 2)
    assert settings.normalize_advantages == "group"
    rollouts = cured.prompts_per_step * cured.group_size
    assert settings.prompts_per_step * settings.group_size == rollouts
    before, now = cured.model_dump(), settings.model_dump()
    changed = {key for key, value in now.items() if value != before[key]}
    assert changed == {"train_turns", "group_size", "prompts_per_step"}


def test_the_page_names_the_monitors_of_each_trouble() -> None:
    for monitor in ("tool_calls", "zero_variance", "reward_drop"):
        assert f"when_training_goes_wrong.md#{monitor}" in page("toolgrpo")
