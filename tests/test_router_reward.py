"""Router-R1's reward, rule by rule, with values worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.config.load import load_config
from retrain.loops.build import build_calculator
from retrain.recipes.router_r1.names import pool_name, published_name
from retrain.recipes.router_r1.reward import (
    RouterReward,
    Score,
    best_f1,
    check_format,
    cost_score,
    exact_match,
    last_answer,
    response_text,
    router_em,
    router_f1,
    router_reward,
)
from retrain.sandbox import MontySandbox
from retrain.types import Message, MessageType, Rollout, Task, UserError

CALL = "<search>Qwen2.5-7B-Instruct:Where was Goethe born?</search>"
TOLD = "\n\n<information>In Frankfurt.</information>\n\n"
ANSWER = "<answer>Frankfurt</answer>"
GOOD = f"<think>I do not know.</think>{CALL}{TOLD}<think>Now I do.</think>{ANSWER}"


def search(body: str) -> str:
    return f"<think>a</think><search>{body}</search>{TOLD}{ANSWER}"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>a</think>{ANSWER}",
        f"\n  <think>a</think> words between tags {ANSWER}\t\n",
        f"<think>a</think>{CALL}{CALL}{TOLD}{TOLD}{ANSWER}",
        f"<think>a</think>{TOLD}{CALL}{ANSWER}",  # their order is not looked at
        "<think>a</think><answer></answer>",
        f"<think> .... </think>{ANSWER}",
        f"<think>a < b, <b>c</b>, </thinking></think>{ANSWER}",
        search("  LLAMA with 70B, please : Who is he?  "),
        search("Qwen:\nWho\nis he?"),
        search("gemma:llm name and your query"),
        search("qwen2.5:What is Qwen2?"),  # not the name that was written
    ],
)
def test_a_format_that_is_kept(text: str) -> None:
    assert check_format(text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Frankfurt",
        "<think>a<answer>b",
        ANSWER,  # no thinking
        f"<think>a</think>{CALL}{TOLD}",  # no answer
        f"<think>a</think>{ANSWER}{ANSWER}",
        f"{ANSWER}<think>a</think>",
        f"So: <think>a</think>{ANSWER}",
        f"<think>a</think>{ANSWER} It is.",
        f"<think></think>{ANSWER}",
        f"<think> \n</think>{ANSWER}",
        f"<think> ... </think>{ANSWER}",
        f"<think>a</think><think>...</think>{ANSWER}",
        f"<think>a</think>{CALL}{ANSWER}",  # nothing came back
        f"<think>a</think>{TOLD}{ANSWER}",
        f"<think>a</think><search>{ANSWER}",
        f"<think>a</think></information>{ANSWER}",
        f"<think>a</think><think>{ANSWER}",
        f"<think>a <answer>b</answer></think>{ANSWER}",
        f"<think>a</think><search>qwen:<information>b</information></search>{TOLD}{ANSWER}",
        "<think>a</think><answer><think>b</think></answer>",
        f"<think>a<search></think></search>{ANSWER}",
        f"<Think>a</Think>{ANSWER}",
        search("Qwen2.5-7B-Instruct"),
        search("Qwen2.5-7B-Instruct:"),
        search("Qwen2.5-7B-Instruct: \n "),
        search("Qwen2.5-7B-Instruct:At what time: 10:00?"),
        search("qwen:Your-Query"),
        search("qwen:What does LLM-NAME mean?"),
        search("LLM-Name:Where?"),
        search("qwen:What is Qwen?"),
        search("qwen :ask QWEN2.5"),
        search(":Where was he born?"),
        search("GPT-4:Where was he born?"),
        search("llama:Where was he born?"),
    ],
)
def test_a_format_that_is_broken(text: str) -> None:
    assert check_format(text) == -1.0
    assert router_reward(text, "Frankfurt", 5.0, alpha=0.9).reward == -1.0


def test_names_are_found_in_what_is_written() -> None:
    for written, model in (
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        (" the QWEN llama ", "Qwen2.5-7B-Instruct"),
        ("LLaMA-3.1-70B", "LLaMA-3.1-70B-Instruct"),
        ("llama 8b or 70b", "LLaMA-3.1-70B-Instruct"),
        ("llama3-chatqa-1.5-8b", "LLaMA3-ChatQA-1.5-8B"),
        ("meta/llama-3.1-8b", "LLaMA-3.1-8B-Instruct"),
        ("creative llama 70b", "Palmyra-Creative-122B"),
        ("Mixtral", "Mixtral-8x22B-Instruct"),
        ("mistral-7b", "Mistral-7B-Instruct"),
        ("gemma", "Gemma-2-27B-it"),
        ("llama-3.1-405b", None),
        ("gpt-4", None),
        ("", None),
    ):
        assert published_name(written) == model
    assert pool_name(" ATLAS", ["abacus", "Atlas"]) == "Atlas"
    assert pool_name("atlas 2", ["abacus", "Atlas"]) is None
    assert check_format(search("atlas:Who?"), ["Atlas"]) == 0.0
    assert check_format(search("qwen:Who?"), ["Atlas"]) == -1.0


def test_the_last_answer_counts_and_its_edges_do_not() -> None:
    assert last_answer("<answer>a</answer> <answer>\n b </answer>") == "b"
    assert last_answer("<answer>a<answer>b</answer>") == "a<answer>b"
    assert last_answer("<answer></answer>") == ""
    assert last_answer("<answer>a") is None
    assert last_answer("</answer><answer>") is None


def test_exact_match_is_that_of_squad_and_any_gold_will_do() -> None:
    assert exact_match("The  U.S.A.", ["France", "usa"]) == 1.0
    assert exact_match("an Apple", ["apple"]) == 1.0
    assert exact_match("Theapple", ["apple"]) == 0.0
    assert exact_match("well-known", ["wellknown"]) == 1.0
    assert exact_match("the", ["?!"]) == 1.0  # both are nothing
    assert exact_match("a", []) == 0.0


def test_f1_counts_words_once_each() -> None:
    assert best_f1("Johann Goethe", ["Johann Wolfgang von Goethe"]) == 2 * 1.0 * 0.5 / 1.5
    assert best_f1("new new york", ["new york"]) == pytest.approx(0.8, abs=1e-15)
    assert best_f1("york", ["new york", "york"]) == 1.0
    assert best_f1("yes", ["yes"]) == 1.0
    assert best_f1("yes it is", ["yes"]) == 0.0
    assert best_f1("no", ["no way"]) == 0.0
    assert best_f1("no answer", ["noanswer it is"]) == 0.0
    assert best_f1("noanswer", ["noanswer"]) == 1.0
    assert best_f1("the", ["a"]) == 0.0  # nothing shared, although the exact match is 1
    assert best_f1("x", []) == 0.0
    precision, recall = 2 / 3, 2 / 7
    expected = (2 * precision * recall) / (precision + recall)
    assert best_f1("x y z", ["x y c d e f g"]) == expected


def test_cost_is_the_place_between_the_percentiles_of_the_roots() -> None:
    # Roots 0, 1, 2, 3, 4: p5 is at place 0.2 and p95 at 3.8, so they are 0.2 and 3.8.
    assert cost_score(4.0, [0.0, 1.0, 9.0, 16.0]) == pytest.approx(1 - 1.8 / 3.6, abs=1e-15)
    assert cost_score(9.0, [0.0, 1.0, 4.0, 16.0]) == pytest.approx(1 - 2.8 / 3.6, abs=1e-15)
    assert cost_score(0.0, [1.0, 4.0, 9.0, 16.0]) == 1.0
    assert cost_score(16.0, [0.0, 1.0, 4.0, 9.0]) == 0.0
    # Two costs, roots 1 and 3: p5 = 1.1 and p95 = 2.9.
    assert cost_score(9.0, [1.0]) == 0.0 and cost_score(1.0, [9.0]) == 1.0


def test_cost_is_a_half_where_there_is_nothing_to_compare() -> None:
    assert cost_score(3.0) == 0.5
    assert cost_score(3.0, [3.0] * 50) == 0.5
    assert cost_score(0.0, [0.0]) == 0.5
    # Of a thousand and one, one that differs is beyond the percentiles.
    assert cost_score(3.0, [*[3.0] * 999, 9.0]) == 0.5


def test_only_the_window_counts_and_the_cost_is_in_it() -> None:
    early = [100.0] * 10
    assert cost_score(4.0, [*early, 0.0, 1.0, 9.0, 16.0], window=5) == cost_score(
        4.0, [0.0, 1.0, 9.0, 16.0]
    )
    assert cost_score(4.0, [0.0, 9.0], window=1) == 0.5
    assert cost_score(1.0, [9.0] * 5 + [1.0] * 999) == 0.5
    assert cost_score(1.0, [9.0] * 50 + [1.0] * 949) == cost_score(1.0, [9.0] * 999 + [1.0] * 949)


def test_a_stream_of_costs_has_the_values_of_a_buffer_that_is_filled_first() -> None:
    """The published order: the cost enters, the oldest leaves, then the percentiles are taken."""
    costs = np.random.default_rng(0).gamma(2.0, 40.0, size=1300).tolist()
    for at in (0, 1, 2, 17, 998, 999, 1000, 1001, 1299):
        buffer = np.sqrt(costs[max(0, at - 999) : at + 1])
        low, high = np.quantile(buffer, 0.05), np.quantile(buffer, 0.95)
        place = (math.sqrt(costs[at]) - low) / (high - low) if high > low else 0.5
        assert cost_score(costs[at], costs[:at]) == 1.0 - min(max(place, 0.0), 1.0)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match="a cost is a number of at least 0"):
        cost_score(cost, [1.0])


def test_the_parts_add_up_as_published() -> None:
    history = [0.0, 1.0, 9.0, 16.0]
    cheap = cost_score(4.0, history)
    right = router_reward(GOOD, ["Frankfurt"], 4.0, alpha=0.6, history=history)
    assert right == Score(0.0, 1.0, 1.0, cheap, 1.0 * (1.0 - 0.6) + cheap * 0.6)
    wrong = router_reward(GOOD, "Weimar", 4.0, alpha=0.6, history=history)
    assert wrong == Score(0.0, 0.0, 0.0, cheap, 0.0)  # cheap or not
    broken = router_reward(GOOD + "!", "Frankfurt", 0.0, alpha=0.6, history=history)
    assert broken == Score(-1.0, 1.0, 1.0, 1.0, -1.0)  # right and free, and no use
    assert router_reward(GOOD, "Frankfurt", 16.0, alpha=1.0, history=history[:3]).reward == 0.0
    assert router_reward(GOOD, "Frankfurt", 16.0, history=history[:3]).reward == 1.0


def test_f1_takes_the_place_of_the_exact_match() -> None:
    gold = "Frankfurt am Main"
    em = router_reward(GOOD, gold, alpha=0.5)
    assert (em.em, em.f1, em.reward) == (0.0, 0.5, 0.0)
    assert router_reward(GOOD, gold, alpha=0.5, metric="f1").reward == 0.5 * 0.5 + 0.5 * 0.5


words = st.sampled_from(
    "<think> </think> <search> </search> <information> </information> <answer> </answer> qwen : a "
    "... LLM-Name <think>a</think> <answer>b</answer> \n  <search>qwen:b</search> "
    "<information>c</information>".split(" ")
)
texts = st.one_of(st.text(max_size=60), st.lists(words, max_size=14).map("".join))


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(st.text(max_size=10), max_size=3), st.floats(0, 1e6), st.floats(0, 1))
def test_any_text_has_a_reward_in_range(
    text: str, golds: list[str], cost: float, alpha: float
) -> None:
    for metric in ("em", "f1"):
        score = router_reward(text, golds, cost, alpha=alpha, history=[1.0, 2.0], metric=metric)
        assert score.reward == -1.0 if score.format < 0 else 0.0 <= score.reward <= 1.0
        assert 0.0 <= score.cheapness <= 1.0
        assert score.em in (0.0, 1.0) and 0.0 <= score.f1 <= 1.0 + 1e-12
    if score.format == 0.0:
        assert text.count("<answer>") == 1 and text.strip().startswith("<think>")
        assert score == router_reward(f" {text}\n", golds, cost, alpha=alpha,
                                      history=[1.0, 2.0], metric="f1")  # fmt: skip


def rollout(*said: str, cost: float = 0.0, answer: Any = "Frankfurt") -> Rollout:
    """A rollout of MODEL messages with information between them."""
    made = Rollout(task=Task("t", (), answer), metrics={"pool/cost": cost})
    made.add_messages(Message("Where was <answer>he</answer> born?", MessageType.MESSAGE))
    for index, text in enumerate(said):
        if index:
            made.add_messages(Message("In Frankfurt.", MessageType.TOOL))
        made.add_messages(Message(text, MessageType.MODEL))
    return made


def test_the_response_is_read_as_one_text_without_the_prompt() -> None:
    asked = rollout(f"<think>I do not know.</think>{CALL}", f"<think>Now I do.</think>{ANSWER}")
    assert response_text(asked) == GOOD
    assert RouterReward().score(asked).reward == 1.0
    assert router_em(asked) == 1.0 and router_f1(rollout("Frankfurt")) == 0.0
    assert router_em(rollout(ANSWER, answer=["Weimar", "Frankfurt"])) == 1.0


def test_the_window_moves_between_steps_only_and_a_checkpoint_holds_it() -> None:
    text = f"<think>a</think>{ANSWER}"
    reward = RouterReward(alpha=1.0, window=4)
    step = [rollout(text, cost=cost) for cost in (0.0, 1.0, 9.0, 16.0)]
    assert [reward(one) for one in step] == [0.5] * 4  # nothing to compare with yet
    reward.end_step(step)
    dear = rollout(text, cost=4.0)
    # The oldest leaves: roots 1, 3, 4 and its own 2; p5 = 1.15, p95 = 3.85.
    assert reward(dear) == pytest.approx(1 - 0.85 / 2.7, abs=1e-15)
    assert reward(dear) == reward(dear)
    state = reward.state_dict()
    assert state == {"costs": [0.0, 1.0, 9.0, 16.0]}
    again = RouterReward(alpha=1.0, window=4)
    again.load_state_dict(state)
    assert again(dear) == reward(dear)


async def test_the_calculator_takes_it_as_the_recipe_names_it() -> None:
    setup = load_config("src/retrain/recipes/router_r1/tiny.yaml").reward_setup
    calculator = build_calculator(setup, MontySandbox())
    right = rollout("<think>sum</think><search>scout:1+2</search>", "<answer>3</answer>",
                    cost=1.0, answer="3")  # fmt: skip
    await calculator.score([right])
    assert right.reward == 1.0
    assert {part.name: part.raw for part in right.reward_parts} == {"router": 1.0, "em": 1.0}
    calculator.end_step([right])
    assert calculator.state() == {"router": {"costs": [1.0]}}


@pytest.mark.parametrize("params", [{"alpha": 1.5}, {"metric": "bleu"}, {"window": 0}])
def test_parameters_that_cannot_be_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="RouterReward"):
        RouterReward(**params)
