"""GRPO's loss and gradient against plain formulas over full logits."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from native import TOKENIZER, assert_same, conversation, gradients, of_ids, sampled, token_logprobs
from retrain import GRPO, Message, MessageType, Rollout, TagConfig, UserError
from tiny import seeded, tiny_gpt2, tiny_qwen3

HALF = 0.5 / (math.sqrt(0.5) + 1e-6)
"""The advantage of the better of two, (1 - 1/2) / (std + 1e-6), std being sqrt(1/2)."""
UNLABELLED = "ignore:the rollouts have no group_id"


@pytest.fixture
def model() -> Iterator[Any]:
    yield tiny_gpt2().double()


def two() -> list[Rollout]:
    return [conversation("2 + 3?", "5"), conversation("2 + 3?", "six")]


def of_two(model: Any, first: float, second: float) -> torch.Tensor:
    """Sequence-mean loss of `two` at a ratio of 1, with these advantages."""
    right, _ = token_logprobs(model, "2 + 3?", "5")
    wrong, _ = token_logprobs(model, "2 + 3?", "six")
    return -(first * right.mean() + second * wrong.mean()) / 2


@pytest.mark.filterwarnings(UNLABELLED)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3])
def test_the_quick_start_has_the_gradient_of_the_formula(make: Any) -> None:
    model = make()
    r1, r2 = Rollout(), Rollout()
    r1.add_messages(Message("2 + 3?", MessageType.MESSAGE), Message("5", MessageType.MODEL))
    r2.add_messages(Message("2 + 3?", MessageType.MESSAGE), Message("six", MessageType.MODEL))
    GRPO(model, TOKENIZER, eps=0.2).calculate_loss([r1, r2], [1.0, 0.0]).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same(found, gradients(model, of_two(model, HALF, -HALF)), tolerance=1e-4)
    assert r1.segments == []


@pytest.mark.filterwarnings(UNLABELLED)
def test_several_turns_train_their_own_words_only(model: Any) -> None:
    long, short = ("a?", "b", "c?", "d e"), ("a?", "x")
    rollouts = [conversation(*long), conversation(*short)]
    loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0])
    first, _ = token_logprobs(model, *long)
    second, _ = token_logprobs(model, *short)
    assert len(first) == 2 + 4
    expected = -(HALF * first.mean() - HALF * second.mean()) / 2
    assert_same(gradients(model, loss), gradients(model, expected))


@pytest.mark.filterwarnings(UNLABELLED)
def test_the_first_loss_has_a_ratio_of_one_and_later_ones_clip(model: Any) -> None:
    rollouts, grpo = two(), GRPO(model, TOKENIZER, eps=0.1, eps_high=0.3)
    olds = [token_logprobs(model, "2 + 3?", text)[0].detach() for text in ("5", "six")]
    loss = grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert grpo.metrics["ratio"] == 1.0
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss.backward()
    optimizer.step()

    expected = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for old, text, advantage in zip(olds, ("5", "six"), (HALF, -HALF), strict=True):
        ratio = (token_logprobs(model, "2 + 3?", text)[0] - old).exp()
        bounded = ratio.clamp(0.9, 1.3)
        expected = expected - torch.minimum(ratio * advantage, bounded * advantage).mean() / 2
        clipped += int((ratio > 1.3).sum() if advantage > 0 else (ratio < 0.9).sum())
    again = grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert clipped > 0
    shares = grpo.metrics["clipped_low"] + grpo.metrics["clipped_high"]
    assert shares * grpo.metrics["tokens"] == pytest.approx(clipped)
    assert again.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(gradients(model, again), gradients(model, expected))


@pytest.mark.filterwarnings(UNLABELLED)
def test_forget_starts_a_new_iteration(model: Any) -> None:
    rollouts, grpo = two(), GRPO(model, TOKENIZER)
    grpo.calculate_loss(rollouts, [1.0, 0.0])
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.1)
    grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert grpo.metrics["ratio"] != pytest.approx(1.0, abs=1e-3)
    grpo.forget()
    grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert grpo.metrics["ratio"] == 1.0


@pytest.mark.filterwarnings(UNLABELLED)
def test_a_rollout_that_changed_is_seen_anew_and_one_that_is_gone_is_dropped(model: Any) -> None:
    rollouts, grpo = two(), GRPO(model, TOKENIZER)
    grpo.calculate_loss(rollouts, [1.0, 0.0])
    tokens = grpo.metrics["tokens"]
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.1)
    rollouts[0].messages[1] = Message("55", MessageType.MODEL)
    rollouts[1].add_messages(Message("No.", MessageType.MESSAGE), Message("5", MessageType.MODEL))
    grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert grpo.metrics["ratio"] == 1.0
    assert grpo.metrics["tokens"] == tokens + 1 + 2
    assert len(grpo._builder.memory) == 2
    del rollouts[0]
    gc.collect()
    assert len(grpo._builder.memory) == 1


@pytest.mark.parametrize("reward", [float("nan"), None, 50.0])
def test_masked_and_frozen_rollouts_change_nothing(model: Any, reward: Any) -> None:
    extra = [
        conversation("2 + 3?", "lost", error="the sandbox was gone"),
        conversation("2 + 3?", "frozen", trainable=False),
        Rollout(error="before the first word"),
    ]
    loss = GRPO(model, TOKENIZER).calculate_loss(
        [*two(), *extra], [1.0, 0.0, *[reward] * 3], groups=[0] * 5
    )
    expected = of_two(model, HALF, -HALF)
    assert_same(gradients(model, loss), gradients(model, expected))


def test_agents_of_a_group_are_compared_with_their_own_kind(model: Any) -> None:
    def agents(name: str, **fields: Any) -> list[Rollout]:
        return [
            conversation("2 + 3?", text, agent=name, group_id="g", **fields)
            for text in ("5", "six")
        ]

    rollouts = agents("solver") + agents("critic")
    loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0, 10.0, 30.0])
    # The critic's second is the better one, by as many deviations; its mean is of no concern.
    expected = (of_two(model, HALF, -HALF) + of_two(model, -HALF, HALF)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert all(not g.any() or g.abs().max() < 1e-6 for g in gradients(model, loss).values())

    rollouts = agents("solver") + agents("critic", trainable=False)
    loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0, 10.0, 30.0])
    assert_same(gradients(model, loss), gradients(model, of_two(model, HALF, -HALF)))


def test_groups_come_from_the_argument_then_from_the_rollouts(model: Any) -> None:
    texts = ("5", "six", "5", "six")
    rewards = torch.tensor([1.0, 0.0, 7.0, 9.0])

    def found(groups: Any, *ids: str | None) -> dict[str, torch.Tensor]:
        rollouts = [conversation("2 + 3?", t, group_id=i) for t, i in zip(texts, ids, strict=True)]
        grpo = GRPO(model, TOKENIZER, normalize_advantages="none")
        return gradients(model, grpo.calculate_loss(rollouts, rewards, groups))

    # Without a standard deviation the groups have advantages +-1/2 and -+1.
    expected = gradients(model, of_two(model, 0.5, -0.5) / 2 + of_two(model, -1, 1) / 2)
    assert_same(found(None, "a", "a", "b", "b"), expected)
    assert_same(found(torch.tensor([0, 0, 1, 1]), *["same"] * 4), expected)


def test_without_groups_all_are_one_and_a_warning_says_so_once(model: Any) -> None:
    grpo = GRPO(model, TOKENIZER)
    rollouts = two()
    with pytest.warns(UserWarning, match="no group_id, so all of a call are one group") as caught:
        grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grpo.calculate_loss(rollouts, [1.0, 0.0])
        GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0], groups=["q", "q"])


def test_nothing_to_learn_is_a_loss_of_zero_with_a_reason(model: Any) -> None:
    rollouts = two()
    with pytest.warns(UserWarning, match="every group has one rollout"):
        loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0], groups=[0, 1])
    loss.backward()
    assert loss.item() == 0.0
    for rollout in rollouts:
        rollout.trainable = False
    with pytest.warns(UserWarning, match="no rollout of this call trains"):
        GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0]).backward()


def test_copies_of_one_rollout_are_attempts_of_their_own(model: Any) -> None:
    rollouts = two()
    rollouts[1].id = rollouts[0].id
    loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [1.0, 0.0], groups=[0, 0])
    assert_same(gradients(model, loss), gradients(model, of_two(model, HALF, -HALF)))


def test_rewards_by_turn_give_turns_their_own_advantages(model: Any) -> None:
    texts = [("a?", "b", "c?", "d"), ("a?", "x", "c?", "y")]
    rollouts = [conversation(*t, group_id="g") for t in texts]
    loss = GRPO(model, TOKENIZER).calculate_loss(rollouts, [[1.0, 0.0], [0.0, 0.0]])
    # mean 1/4, unbiased std 1/2: normalised 1.5, -0.5 | -0.5, -0.5; own and later ones summed.
    scale = 0.5 / (0.5 + 1e-6)
    by_turn = [[1.0 * scale, -0.5 * scale], [-1.0 * scale, -0.5 * scale]]
    expected = torch.zeros((), dtype=torch.float64)
    for text, values in zip(texts, by_turn, strict=True):
        logprobs, turns = token_logprobs(model, *text)
        credit = torch.tensor([values[t] for t in turns], dtype=torch.float64)
        expected = expected - (credit * logprobs).mean() / 2
    assert_same(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize(
    ("settings", "advantages", "weights"),
    [
        # Four tokens in "six<eos>", two in "5<eos>".
        ({"aggregation": "token_mean"}, (HALF, -HALF), (1 / 6, 1 / 6)),
        ({"aggregation": "sequence_sum"}, (HALF, -HALF), (1 / 2, 1 / 2)),
        ({"aggregation": "constant", "aggregation_length": 10}, (HALF, -HALF), (0.05, 0.05)),
        ({"normalize_advantages": "none"}, (0.5, -0.5), (1 / 4, 1 / 8)),
        # Whitened over tokens: mean (2 * 1/2 - 4 * 1/2) / 6 = -1/6; deviations 2/3 and -1/3,
        # unbiased variance (2 * 4/9 + 4 * 1/9) / 5 = 4/15.
        (
            {"normalize_advantages": "batch"},
            (2 / 3 / math.sqrt(4 / 15 + 1e-8), -1 / 3 / math.sqrt(4 / 15 + 1e-8)),
            (1 / 4, 1 / 8),
        ),
        ({"advantage": "rloo", "normalize_advantages": "none"}, (1.0, -1.0), (1 / 4, 1 / 8)),
        # The baseline is 2 * 1 / 6.
        ({"advantage": "opo", "normalize_advantages": "none"}, (2 / 3, -1 / 3), (1 / 4, 1 / 8)),
    ],
)
def test_choices_of_advantage_and_aggregation(
    model: Any,
    settings: dict[str, Any],
    advantages: tuple[float, float],
    weights: tuple[float, float],
) -> None:
    grpo = GRPO(model, TOKENIZER, **settings)
    loss = grpo.calculate_loss(two(), [1.0, 0.0], groups=[0, 0])
    right, wrong = (token_logprobs(model, "2 + 3?", text)[0] for text in ("5", "six"))
    expected = -(advantages[0] * weights[0] * right.sum())
    expected = expected - advantages[1] * weights[1] * wrong.sum()
    assert_same(gradients(model, loss), gradients(model, expected))


def test_the_penalty_is_k3_from_the_reference(model: Any) -> None:
    other = tiny_gpt2(seed=1).double()
    loss = GRPO(model, TOKENIZER, kl_coefficient=0.5, reference=other).calculate_loss(
        two(), [1.0, 0.0], groups=[0, 0]
    )
    expected = of_two(model, HALF, -HALF)
    for text in ("5", "six"):
        logprobs, _ = token_logprobs(model, "2 + 3?", text)
        away = token_logprobs(other, "2 + 3?", text)[0].detach() - logprobs
        expected = expected + 0.5 * (away.exp() - away - 1).mean() / 2
    assert_same(gradients(model, loss), gradients(model, expected))
    assert all(parameter.grad is None for parameter in other.parameters())


def test_the_reference_is_the_policy_as_it_was_when_none_is_given(model: Any) -> None:
    grpo = GRPO(model, TOKENIZER, kl_coefficient=0.5)
    rollouts = two()
    grpo.calculate_loss(rollouts, [1.0, 1.0], groups=[0, 0])
    assert grpo.metrics["kl"] == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.1)
    loss = grpo.calculate_loss(rollouts, [1.0, 1.0], groups=[0, 0])
    assert grpo.metrics["kl"] > 1e-4
    assert any(g.any() for g in gradients(model, loss).values())


def test_the_entropy_bonus_has_a_gradient(model: Any) -> None:
    grpo = GRPO(model, TOKENIZER, entropy_coefficient=0.1, temperature=0.7)
    rollouts = [conversation("2 + 3?", "5", group_id="g")] * 2
    loss = grpo.calculate_loss(rollouts, [1.0, 1.0])
    ids = TOKENIZER.encode("User:\n2 + 3?\n\nAssistant:\n5<eos>")
    logits = model(input_ids=torch.tensor([ids])).logits[0, -3:-1] / 0.7
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert grpo.metrics["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert_same(gradients(model, loss), gradients(model, -0.1 * entropy))


@pytest.mark.parametrize(
    ("kind", "level", "weights"),
    [
        ("tis", "token", (math.exp(0.5), 2.0, math.exp(-0.3))),
        ("mis", "token", (math.exp(0.5), 0.0, math.exp(-0.3))),
        ("tis", "sequence", (math.exp(0.5), 2.0, 2.0)),
    ],
)
def test_the_correction_weighs_learner_over_engine(
    model: Any, kind: Any, level: Any, weights: tuple[float, ...]
) -> None:
    prompt, one, other = [1, 2, 3], [4], [5, 6]
    with torch.no_grad():
        first = of_ids(model, prompt + one, [False] * 3 + [True])
        second = of_ids(model, prompt + other, [False] * 3 + [True] * 2)
    rollouts = [
        sampled(prompt, one, (first - 0.5).tolist(), group_id="g"),
        sampled(prompt, other, (second - torch.tensor([1.4, -0.3])).tolist(), group_id="g"),
        conversation("2 + 3?", "5", group_id="h"),
        conversation("2 + 3?", "six", group_id="h"),
    ]
    grpo = GRPO(model, TOKENIZER, correction=kind, correction_level=level)
    loss = grpo.calculate_loss(rollouts, [1.0, 0.0, 1.0, 0.0])
    first = of_ids(model, prompt + one, [False] * 3 + [True])
    second = of_ids(model, prompt + other, [False] * 3 + [True] * 2)
    corrected = torch.tensor(weights[1:], dtype=torch.float64) * second
    sampled_loss = -(HALF * weights[0] * first.mean() - HALF * corrected.mean()) / 2
    expected = (sampled_loss + of_two(model, HALF, -HALF)) / 2
    # An engine's log-probabilities are kept in single precision.
    assert_same(gradients(model, loss), gradients(model, expected), 1e-6)


def test_words_that_nobody_sampled_do_not_train_beside_sampled_ones(model: Any) -> None:
    rollouts = []
    for token in (4, 5):
        rollout = sampled([1, 2, 3], [token], [-1.0], group_id="g")
        rollout.messages.insert(0, Message("an example", MessageType.MODEL))
        rollout.segments[0].turns[0] = type(rollout.segments[0].turns[0])(2, 3, 4, "length")
        rollouts.append(rollout)
    grpo = GRPO(model, TOKENIZER)
    loss = grpo.calculate_loss(rollouts, [1.0, 0.0])
    assert grpo.metrics["tokens"] == 2
    a, b = (of_ids(model, [1, 2, 3, t], [False] * 3 + [True]) for t in (4, 5))
    assert_same(gradients(model, loss), gradients(model, -HALF * (a - b).sum() / 2))


def with_dropout(checkpointing: bool = False, p: float = 0.5) -> Any:
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = seeded(GPT2LMHeadModel, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def test_dropout_takes_no_part_and_the_mode_stays() -> None:
    model = with_dropout()
    loss = GRPO(model, TOKENIZER).calculate_loss(two(), [1.0, 0.0], groups=[0, 0])
    assert all(module.training for module in model.modules())
    found = gradients(model, loss)
    model.eval()
    assert_same(found, gradients(model, of_two(model, HALF, -HALF)), 1e-4)


def test_gradient_checkpointing_gives_the_same_gradient_and_refuses_dropout() -> None:
    model = with_dropout(checkpointing=True, p=0.0).eval()
    loss = GRPO(model, TOKENIZER).calculate_loss(two(), [1.0, 0.0], groups=[0, 0])
    assert not any(module.training for module in model.modules())
    assert_same(gradients(model, loss), gradients(model, of_two(model, HALF, -HALF)), 1e-4)
    with pytest.raises(UserError, match="gradient checkpointing on and dropout in"):
        GRPO(with_dropout(checkpointing=True), TOKENIZER).calculate_loss(
            two(), [1.0, 0.0], groups=[0, 0]
        )


def test_hand_written_calls_are_rendered_between_the_users_tags(model: Any) -> None:
    rollout = conversation("2 + 3?", "<run>2+3</run>", group_id="g")
    rollout.add_messages(Message("5", MessageType.TOOL), Message("five", MessageType.MODEL))
    tags = TagConfig("<run>", "</run>", "<out>", "</out>")
    grpo = GRPO(model, TOKENIZER, tag_config=tags, normalize_advantages="none")
    loss = grpo.calculate_loss([rollout, conversation("2 + 3?", "5", group_id="g")], [1.0, 0.0])
    before, call, result, answer = (
        TOKENIZER.encode(text)
        for text in (
            "User:\n2 + 3?\n\nAssistant:\n",
            "<run>2+3</run>",
            "<out>5</out>",
            "five<eos>",
        )
    )
    ids = before + call + result + answer
    mask = [False] * len(before) + [True] * len(call) + [False] * len(result) + [True] * 5
    other, _ = token_logprobs(model, "2 + 3?", "5")
    expected = -(0.5 * of_ids(model, ids, mask).mean() - 0.5 * other.mean()) / 2
    assert_same(gradients(model, loss), gradients(model, expected))
