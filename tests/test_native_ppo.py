"""PPO's loss, its critic, and what both remember, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from native import TOKENIZER, assert_same, conversation, gradients, token_logprobs
from retrain import PPO, Message, MessageType, Rollout, UserError
from tiny import tiny_gpt2, tiny_qwen3


def two() -> list[Rollout]:
    return [conversation("2 + 3?", "5"), conversation("2 + 3?", "six")]


@pytest.fixture
def model() -> Any:
    return tiny_gpt2().double()


def test_the_first_loss_is_what_a_critic_that_knows_nothing_gives(model: Any) -> None:
    """Values are 0 and gamma = lambda = 1, so each token's advantage and return is the reward."""
    ppo = PPO(model, TOKENIZER, normalize_advantages="none", value_coefficient=0.25)
    loss = ppo.calculate_loss(two(), [2.0, -1.0])
    right, wrong = (token_logprobs(model, "2 + 3?", text)[0] for text in ("5", "six"))
    # Two tokens of reward 2, four of -1: -(2 * 2 - 4) / 6 = 0; 0.5 * (2 * 4 + 4 * 1) / 6 = 1.
    assert ppo.metrics["policy_loss"] == pytest.approx(0.0, abs=1e-9)
    assert ppo.metrics["value_loss"] == pytest.approx(1.0)
    assert loss.item() == pytest.approx(0.25)
    found = gradients(model, loss)
    assert_same(found, gradients(model, -(2.0 * right.sum() - wrong.sum()) / 6))
    # d/db of 0.25 * 0.5 * mean((b - R)^2) is -0.25 * mean(R), and mean(R) is 0.
    bias = ppo.critic.head.bias.grad
    assert bias is not None
    assert bias.item() == pytest.approx(0.0, abs=1e-9)
    ppo.critic.zero_grad()
    PPO.calculate_loss(ppo, two(), [2.0, 2.0]).backward()
    assert ppo.critic.head.bias.grad.item() == pytest.approx(-0.5)


def test_rewards_of_turns_reach_back_over_the_users_words(model: Any) -> None:
    """gamma 1/2: the discount falls between trained tokens only."""
    texts = ("a?", "b", "c?", "d")
    ppo = PPO(model, TOKENIZER, normalize_advantages="none", gamma=0.5)
    loss = ppo.calculate_loss([conversation(*texts)], [[4.0, 8.0]])
    # Tokens b, <eos> (reward 4), d, <eos> (reward 8), from the back: 8, 4, 4 + 2, 3.
    logprobs, turns = token_logprobs(model, *texts)
    assert turns == [0, 0, 1, 1]
    expected = -(torch.tensor([3.0, 6.0, 4.0, 8.0]) * logprobs).mean()
    assert_same(gradients(model, loss), gradients(model, expected))


def test_lambda_trades_returns_for_values(model: Any) -> None:
    ppo = PPO(model, TOKENIZER, normalize_advantages="none", gae_lambda=0.0)
    with torch.no_grad():
        ppo.critic.head.bias.fill_(0.5)
    loss = ppo.calculate_loss([conversation("a?", "b")], [2.0])
    # One step ahead: 0 + 0.5 - 0.5, then 2 - 0.5.
    logprobs, _ = token_logprobs(model, "a?", "b")
    expected = -(torch.tensor([0.0, 1.5]) * logprobs).mean()
    assert_same(gradients(model, loss), gradients(model, expected))


def test_advantages_are_whitened_over_the_call(model: Any) -> None:
    loss = PPO(model, TOKENIZER).calculate_loss(two(), [2.0, -1.0])
    # Two tokens of 2 and four of -1: mean 0, unbiased variance 12 / 5.
    scale = (12 / 5 + 1e-8) ** -0.5
    right, wrong = (token_logprobs(model, "2 + 3?", text)[0] for text in ("5", "six"))
    expected = -scale * (2.0 * right.sum() - wrong.sum()) / 6
    assert_same(gradients(model, loss), gradients(model, expected))


def test_values_of_the_first_loss_are_kept_and_clip_the_later_ones(model: Any) -> None:
    ppo = PPO(model, TOKENIZER, value_clip=0.2, value_coefficient=1.0)
    rollouts = two()
    ppo.calculate_loss(rollouts, [1.0, 1.0])
    with torch.no_grad():
        ppo.critic.head.bias.fill_(0.7)
    ppo.calculate_loss(rollouts, [1.0, 1.0])
    # (0.7 - 1)^2 is smaller than (0.2 - 1)^2, the clipped error, which counts.
    assert ppo.metrics["value_loss"] == pytest.approx(0.5 * 0.64)
    assert ppo.metrics["value_clipped"] == 1.0
    ppo.forget()
    ppo.calculate_loss(rollouts, [1.0, 1.0])
    assert ppo.metrics["value_loss"] == pytest.approx(0.5 * 0.09)


@pytest.mark.parametrize("backbone", ["own", "shared"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3])
def test_the_critic_learns_what_prompts_are_worth(make: Any, backbone: Any) -> None:
    model = make()
    ppo = PPO(model, TOKENIZER, backbone=backbone, value_clip=None)
    optimizer = torch.optim.Adam([*model.parameters(), *ppo.critic.parameters()], lr=1e-2)
    rollouts = [conversation("good?", "5"), conversation("bad?", "5")]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        ppo.calculate_loss(rollouts, [1.0, -1.0]).backward()
        optimizer.step()
        losses.append(ppo.metrics["value_loss"])
    assert losses[0] == pytest.approx(0.5, abs=1e-6)
    assert losses[-1] < 0.02


@pytest.mark.parametrize(("backbone", "reached"), [("own", False), ("shared", True)])
def test_only_a_shared_backbone_lets_the_value_loss_reach_the_policy(
    model: Any, backbone: Any, reached: bool
) -> None:
    ppo = PPO(model, TOKENIZER, backbone=backbone, normalize_advantages="none")
    with torch.no_grad():
        ppo.critic.head.weight.normal_(0, 0.1)
        ppo.critic.head.bias.fill_(0.0)
    rollouts = two()
    ppo.calculate_loss(rollouts, [0.0, 0.0])
    policy, value = gradients(model, ppo.calculate_loss(rollouts, [0.0, 0.0])), 0.0
    ppo._value_coefficient = 0.0
    without = gradients(model, ppo.calculate_loss(rollouts, [0.0, 0.0]))
    value = max(float((policy[name] - without[name]).abs().max()) for name in policy)
    assert (value > 1e-6) == reached


def test_the_critic_has_its_own_parameters(model: Any) -> None:
    ours = {id(p) for p in model.parameters()}
    own = PPO(model, TOKENIZER).critic
    assert not ours & {id(p) for p in own.parameters()}
    shared = PPO(model, TOKENIZER, backbone="shared").critic
    assert sum(p.numel() for p in shared.parameters()) == 32 + 1


def test_a_lora_policy_trains_its_adapters_and_the_head() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_qwen3(), LoraConfig(r=2, target_modules=["q_proj"]))
    ppo = PPO(model, TOKENIZER, kl_coefficient=0.1)
    ppo.calculate_loss(two(), [1.0, 0.0]).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all("lora_B" in name for name in moved)
    assert ppo.critic.head.weight.grad is not None
    assert ppo.critic.head.weight.grad.any()


def test_masked_rollouts_do_not_train_the_critic(model: Any) -> None:
    ppo = PPO(model, TOKENIZER)
    lost = conversation("2 + 3?", "lost", error="gone")
    ppo.calculate_loss([*two(), lost], [1.0, 0.0, 100.0])
    tokens, value = ppo.metrics["tokens"], ppo.metrics["value_loss"]
    assert (tokens, value) == (6.0, pytest.approx(0.5 * 2 / 6))
    with pytest.warns(UserWarning, match="no rollout of this call trains"):
        ppo.calculate_loss([lost], [1.0]).backward()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"backbone": "none"}, "backbone is 'none'"),
        ({"normalize_advantages": "group"}, "normalize_advantages is 'group'"),
        ({"value_coefficient": 0.0}, "value_coefficient is 0.0"),
        ({"value_clip": 0.0}, "value_clip is 0.0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gae_lambda": -0.1}, "gae_lambda is -0.1"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        PPO(tiny_gpt2(), TOKENIZER, **settings)


def test_a_single_rollout_is_enough(model: Any) -> None:
    rollout = Rollout()
    rollout.add_messages(Message("2 + 3?", MessageType.MESSAGE), Message("5", MessageType.MODEL))
    ppo = PPO(model, TOKENIZER, normalize_advantages="none")
    found = gradients(model, ppo.calculate_loss([rollout], [1.0]))
    assert_same(found, gradients(model, -token_logprobs(model, "2 + 3?", "5")[0].mean()))
