"""Generation from a live model, and the objects around it."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import retrain
from native import TOKENIZER, conversation, of_ids
from retrain import (
    GRPO,
    BoxedReward,
    Message,
    MessageType,
    ModelGenerate,
    QASolverEnv,
    Rollout,
    TagConfig,
    UserError,
)
from retrain.types import Source
from tiny import tiny_gpt2, tiny_qwen3

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Make = Callable[..., ModelGenerate]


@pytest.fixture
def make() -> Iterator[Make]:
    """`ModelGenerate`s that are closed afterwards."""
    made: list[ModelGenerate] = []

    def build(*arguments: Any, **settings: Any) -> ModelGenerate:
        made.append(ModelGenerate(*arguments, **settings))
        return made[-1]

    yield build
    for generate in made:
        generate.close()


@retrain.tool
def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: one
        b: the other
    """
    return a + b


def ask(question: str = "2 + 3?") -> Rollout:
    return conversation(question)


def sampled_part(rollout: Rollout) -> tuple[list[int], list[bool], list[float]]:
    """The one segment's ids, where they were sampled, and the engine's log-probabilities."""
    (segment,) = rollout.segments
    mask = [source == Source.SAMPLED for source in segment.source]
    logprobs = [p for p, sampled in zip(segment.logprobs, mask, strict=True) if sampled]
    return list(segment.token_ids), mask, logprobs


def assert_ledger_is_of(model: Any, rollout: Rollout, temperature: float = 1.0) -> None:
    ids, mask, logprobs = sampled_part(rollout)
    with torch.no_grad():
        expected = of_ids(model, ids, mask, temperature)
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("architecture", [tiny_gpt2, tiny_qwen3])
def test_the_ledger_holds_what_was_sampled(make: Make, architecture: Any) -> None:
    model, rollout = architecture(), ask()
    generate = make(model, TOKENIZER, max_new_tokens=6, temperature=0.7)
    message = generate.rollout_generate_response(rollout)
    assert (rollout.messages, rollout.segments) == (ask().messages, [])
    rollout.add_messages(message)
    ids, mask, _ = sampled_part(rollout)
    prompt = TOKENIZER.encode("User:\n2 + 3?\n\nAssistant:\n")
    assert message.turn is not None
    assert ids == prompt + list(message.turn.token_ids)
    assert mask == [False] * len(prompt) + [True] * len(message.turn.token_ids)
    assert message.content == TOKENIZER.decode(list(message.turn.token_ids)).removesuffix("<eos>")
    assert_ledger_is_of(model, rollout, 0.7)


def test_a_later_turn_goes_on_from_the_same_tokens(make: Make) -> None:
    model, rollout = tiny_gpt2(), ask()
    generate = make(model, TOKENIZER, max_new_tokens=5)
    for question in ("And 4 + 4?", None):
        before = list(rollout.full_token_ids()) if rollout.segments else []
        rollout.add_messages(generate.rollout_generate_response(rollout))
        assert list(rollout.full_token_ids())[: len(before)] == before
        if question is not None:
            rollout.add_messages(Message(question, MessageType.MESSAGE))
    assert rollout.num_forks == 0
    assert_ledger_is_of(model, rollout)
    grpo = GRPO(model, TOKENIZER)
    other = copy.deepcopy(rollout)
    grpo.calculate_loss([rollout, other], [1.0, 0.0], groups=[0, 0])
    assert grpo.metrics["tokens"] == 2 * sum(sampled_part(rollout)[1])


def test_a_batch_is_appended_to(make: Make) -> None:
    rollouts = [ask(), ask(), ask("Why?")]
    messages = make(tiny_gpt2(), TOKENIZER, max_new_tokens=4).batch_rollout_generate_response(
        rollouts
    )
    for rollout, message in zip(rollouts, messages, strict=True):
        assert rollout.messages[-1] is message
        assert_ledger_is_of(tiny_gpt2(), rollout)
    assert messages[0].content != messages[1].content


def test_a_message_enters_its_own_rollout_once(make: Make) -> None:
    generate = make(tiny_gpt2(), TOKENIZER, max_new_tokens=4)
    rollout, other = ask(), ask("Why?")
    message = generate.rollout_generate_response(rollout)
    with pytest.raises(ValueError, match="answers rollout"):
        other.add_messages(message)
    rollout.add_messages(message)
    with pytest.raises(ValueError, match="it was added before"):
        rollout.add_messages(message)
    (more,) = generate.batch_rollout_generate_response([other])
    with pytest.raises(ValueError, match="it was added before"):
        other.add_messages(more)
    assert len(rollout.segments) == len(other.segments) == 1


def test_one_rollout_twice_is_refused(make: Make) -> None:
    rollout = ask()
    generate = make(tiny_gpt2(), TOKENIZER, max_new_tokens=4)
    with pytest.raises(UserError, match=r"rollouts\[0\] and rollouts\[2\] are the same object"):
        generate.batch_rollout_generate_response([rollout, ask(), rollout])
    assert len(rollout.messages) == 1


def test_numbers_come_from_the_seed_and_are_new_in_every_call(make: Make) -> None:
    def three(seed: int) -> list[str]:
        generate = make(tiny_gpt2(), TOKENIZER, max_new_tokens=8, seed=seed)
        return [generate.rollout_generate_response(ask()).content for _ in range(3)]

    first = three(0)
    assert len(set(first)) == 3
    assert three(0) == first
    assert not set(three(1)) & set(first)


def test_greedy_is_the_best_token_each_time(make: Make) -> None:
    model, rollout = tiny_qwen3(), ask()
    make(model, TOKENIZER, max_new_tokens=4, temperature=0.0).batch_rollout_generate_response(
        [rollout]
    )
    ids, mask, _ = sampled_part(rollout)
    best = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
    assert [i for i, m in zip(ids[1:], mask[1:], strict=True) if m] == [
        i for i, m in zip(best, mask[1:], strict=True) if m
    ]


def change_by_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.05)
    optimizer.step()


def change_behind_autograd(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


@pytest.mark.parametrize("change", [change_by_optimizer, change_behind_autograd])
def test_the_next_call_sees_new_weights(make: Make, change: Callable[[Any], None]) -> None:
    model = tiny_gpt2()
    generate = make(model, TOKENIZER, max_new_tokens=4)
    generate.batch_rollout_generate_response([ask()])
    change(model)
    rollout = ask()
    generate.batch_rollout_generate_response([rollout])
    assert_ledger_is_of(model, rollout)
    assert set(rollout.segments[0].versions) == {-1, 2}


def test_the_models_mode_is_as_before(make: Make) -> None:
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    make(model, TOKENIZER, max_new_tokens=2).rollout_generate_response(ask())
    assert model.training
    assert not model.transformer.h[0].training


async def test_it_works_where_a_loop_already_runs(make: Make) -> None:
    message = make(tiny_gpt2(), TOKENIZER, max_new_tokens=2).rollout_generate_response(ask())
    assert message.turn is not None


def test_a_chat_template_is_used_where_there_is_one(make: Make) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = CHAT
    message = make(tiny_qwen3(), tokenizer, max_new_tokens=2).rollout_generate_response(ask())
    assert message.turn is not None
    prompt = TOKENIZER.encode("<user>2 + 3?<eos><assistant>")
    assert message.turn.prompt.token_ids == prompt


def test_generation_stops_at_the_end_of_a_call(make: Make) -> None:
    settings = {"max_new_tokens": 12, "seed": 4}
    text = make(tiny_gpt2(), TOKENIZER, **settings).rollout_generate_response(ask()).content
    start, end = next(
        (a, b) for a, b in zip(text, text[2:], strict=False) if a != b and (a + b).isascii()
    )
    at = text.index(start)
    tags = TagConfig(start, end, "<out>", "</out>")
    message = make(tiny_gpt2(), TOKENIZER, tag_config=tags, **settings).rollout_generate_response(
        ask()
    )
    assert message.content == text[: text.index(end) + 1]
    assert bool(message.tool_calls) == (at < text.index(end))


def test_a_question_that_fills_the_context_is_refused(make: Make) -> None:
    generate = make(tiny_gpt2(), TOKENIZER)
    with pytest.raises(UserError, match=r"of rollouts\[1\].* context limit is 256"):
        generate.batch_rollout_generate_response([ask(), ask("x" * 300)])


def test_tools_need_a_template_or_tags(make: Make) -> None:
    with pytest.raises(UserError, match="no chat template that takes tools"):
        make(tiny_gpt2(), TOKENIZER, tools=[add])
    generate = make(tiny_gpt2(), TOKENIZER, max_new_tokens=2, tools=[add], tag_config=TagConfig())
    assert generate.rollout_generate_response(ask()).turn is not None


def test_a_closed_one_says_so(make: Make) -> None:
    generate = make(tiny_gpt2(), TOKENIZER)
    generate.close()
    with pytest.raises(UserError, match="is closed"):
        generate.rollout_generate_response(ask())


def test_threads_end_with_the_object() -> None:
    before = set(threading.enumerate())
    generate = ModelGenerate(tiny_gpt2(), TOKENIZER, max_new_tokens=2)
    generate.rollout_generate_response(ask())
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} >= {"retrain-native", "decode"}
    del generate
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_a_loop_of_sampling_and_learning_raises_the_reward(make: Make) -> None:
    """The reward is the share of tokens below 128."""
    model = tiny_qwen3()
    generate, grpo = make(model, TOKENIZER, max_new_tokens=6), GRPO(model, TOKENIZER)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history: list[float] = []
    for _ in range(25):
        rollouts = [QASolverEnv().setup("Say it.") for _ in range(16)]
        generate.batch_rollout_generate_response(rollouts)
        rewards = []
        for rollout in rollouts:
            ids, mask, _ = sampled_part(rollout)
            low = [token < 128 for token, sampled in zip(ids, mask, strict=True) if sampled]
            rewards.append(sum(low) / len(low))
        optimizer.zero_grad()
        grpo.calculate_loss(rollouts, rewards).backward()
        optimizer.step()
        history.append(sum(rewards) / len(rewards))
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.25


def boxed(text: str, answer: Any = None) -> Rollout:
    rollout = QASolverEnv().setup("What is 6 * 7?", answer)
    rollout.add_messages(Message(text, MessageType.MODEL))
    return rollout


def test_boxed_answers_are_compared_with_the_ground_truths() -> None:
    rollouts = [boxed(r"So \boxed{42}."), boxed(r"\boxed{41}"), boxed("42")]
    assert BoxedReward()(rollouts, ["42", 42, 42]) == [1.0, 0.0, 0.0]
    assert BoxedReward()(rollouts, [["7", "42"], 41, 42]) == [1.0, 1.0, 0.0]
    assert all(rollout.task is not None and rollout.task.answer is None for rollout in rollouts)


def test_boxed_answers_come_from_the_task_by_default() -> None:
    assert BoxedReward()([boxed(r"\boxed{42}", 42), boxed(r"\boxed{41}", 42)]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"rollouts\[0\] has no answer"):
        BoxedReward()([boxed(r"\boxed{42}")])
    with pytest.raises(UserError, match="2 ground truths for 1 rollouts"):
        BoxedReward()([boxed(r"\boxed{42}")], [1, 2])


def test_the_scope_of_boxed_answers() -> None:
    rollout = boxed(r"\boxed{42}", 42)
    rollout.add_messages(Message("Sure?", MessageType.MESSAGE), Message("Yes.", MessageType.MODEL))
    assert BoxedReward()([rollout]) == [0.0]
    assert BoxedReward(scope="all")([rollout]) == [1.0]


def test_a_question_is_set_up_as_a_conversation() -> None:
    rollout = QASolverEnv("Be brief.").setup("2 + 3?", 5)
    assert rollout.messages == [
        Message("Be brief.", MessageType.SYSTEM),
        Message("2 + 3?", MessageType.MESSAGE),
    ]
    assert rollout.task is not None
    assert (rollout.task.answer, rollout.task.prompt) == (5, tuple(rollout.messages))
    assert QASolverEnv().setup("2 + 3?").messages == [Message("2 + 3?", MessageType.MESSAGE)]


def test_attempts_at_one_question_are_one_group() -> None:
    env = QASolverEnv()
    first, again, other = env.setup("a?", 1), env.setup("a?", 1), env.setup("b?", 1)
    assert first.group_id is not None
    assert first.group_id == again.group_id != other.group_id
    assert first.id != again.id
