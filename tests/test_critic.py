"""The critic: what it says of which token, what its loss does, and that it is kept."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import retrain
from retrain.config.algorithm import Hyperparameters
from retrain.config.model import ModelConfig
from retrain.learner import Critic
from retrain.loops.update import PolicyUpdate, build_objective, build_update
from retrain.models import load_policy
from retrain.types import Rollout, Sample, UserError
from runs import hyperparameters, metrics_of, rl_config, rollouts_of
from test_forward import tiny_lora
from test_learner import Gradients, assert_same, exact, gradients
from test_update import (
    copies,
    group,
    of_tokens,
    policy_gradient,
    shaken,
    three_groups,
    unheard,
    updating,
)
from tiny import tiny_gpt2, tiny_llama, tiny_qwen3

BACKBONES = pytest.mark.parametrize("backbone", ["own", "shared"])


def with_critic(model: Any, *, head: float = 0.3, **settings: Any) -> PolicyUpdate:
    """GAE, not whitened, with a critic whose head knows something already."""
    critic = settings.pop("critic", {})
    chosen = {"advantage": "gae", "normalize_advantages": "none", "critic": critic, **settings}
    update = updating(model, **chosen)
    shaken(critic_of(update).head, head)
    return update


def critic_of(update: PolicyUpdate) -> Critic:
    assert update.learner.critic is not None
    return update.learner.critic


def plain_values(critic: Critic, model: Any, one: Sample) -> Tensor:
    """[T]; that of token t is read one token earlier, so that of the first does not exist."""
    backbone = model if critic.backbone is None else critic.backbone
    ids = torch.tensor([list(one.token_ids)])
    hidden = backbone(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    values = hidden @ critic.head.weight[0] + critic.head.bias
    return torch.cat((torch.full_like(values[:1], torch.nan), values[:-1]))


@BACKBONES
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3], ids=lambda make: make.__name__)
@pytest.mark.parametrize("tokens", [10_000, 20])
def test_values_are_those_of_the_states_before_the_tokens(
    make: Any, backbone: Any, tokens: int
) -> None:
    model = exact(make)
    update = with_critic(model, critic={"backbone": backbone}, micro_batch_tokens=tokens)
    if backbone == "own":
        shaken(critic_of(update).backbone)  # no longer the policy's states
    samples = update.samples(three_groups())
    for one in samples:
        with torch.no_grad():
            plain = plain_values(critic_of(update), model, one)
        assert one.values is not None
        for t, trains in enumerate(one.loss_mask):
            assert not trains or one.values[t] == pytest.approx(plain[t].item(), abs=1e-9)
    assert len({v for one in samples for v in one.values or ()}) > 20


def test_a_new_critic_expects_nothing() -> None:
    samples = with_critic(tiny_gpt2(), head=0.0).samples([group("x", 1, 2)])
    assert all(set(one.values or ()) == {0.0} for one in samples)
    for one in samples:
        expected = {0.0, 1.0 if one.rollout_id == "x/0" else 2.0}
        assert set(one.advantages or ()) == set(one.returns or ()) == expected


def test_discount_and_lambda_act_from_token_to_token() -> None:
    """Where values are 0, a token k before the last has (gamma * lambda)^k of the reward."""
    update = with_critic(tiny_gpt2(), head=0.0, gamma=0.9, critic={"gae_lambda": 0.5})
    samples = update.samples([group("x", 1, 2)])
    tokens = [a for one in samples if one.rollout_id == "x/1" for a in one.advantages or () if a]
    assert tokens == pytest.approx([2 * 0.45**k for k in (5, 4, 3, 2, 1, 0)], abs=1e-9)


CLIP, COEFFICIENT = 0.3, 0.7
FAR = [(0.5, 1.0), (0.5, -1.0), (-0.5, 1.0), (-0.5, -1.0), (0.25, 1.0), (-0.1, 2.0)]
"""Present values less the old ones, and returns less the present values."""


def far_apart(critic: Critic, model: Any, samples: Sequence[Sample]) -> None:
    """Old values and returns on all sides of the present values."""
    for one in samples:
        with torch.no_grad():
            values = plain_values(critic, model, one).tolist()
        apart = [FAR[t % len(FAR)] for t in range(len(one))]
        one.values = array("d", [v - moved for v, (moved, _) in zip(values, apart, strict=True)])
        one.returns = array("d", [v + left for v, (_, left) in zip(values, apart, strict=True)])


def plain_value_loss(critic: Critic, model: Any, samples: Sequence[Sample]) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2), mean over rollouts of means."""
    of_rollout: dict[str, list[Tensor]] = {}
    for one in samples:
        assert one.values is not None and one.returns is not None
        values = plain_values(critic, model, one)
        for t, trains in enumerate(one.loss_mask):
            if trains:
                moved = torch.clamp(values[t] - one.values[t], -CLIP, CLIP)
                errors = (values[t] - one.returns[t], one.values[t] + moved - one.returns[t])
                worst = torch.maximum(*(error**2 for error in errors))
                of_rollout.setdefault(one.rollout_id, []).append(0.5 * worst)
    return torch.stack([torch.stack(x).mean() for x in of_rollout.values()]).mean()


def plain_policy_loss(model: Any, samples: Sequence[Sample]) -> Tensor:
    of_rollout: dict[str, list[Tensor]] = {}
    for one in samples:
        table = of_tokens(model, one)
        losses = [policy_gradient(table[t], one, t) for t, on in enumerate(one.loss_mask) if on]
        of_rollout.setdefault(one.rollout_id, []).extend(losses)
    return torch.stack([torch.stack(x).mean() for x in of_rollout.values()]).mean()


@BACKBONES
@pytest.mark.parametrize("train_policy", [True, False], ids=["training", "warm-up"])
def test_the_value_loss_has_the_gradient_of_the_formula(backbone: Any, train_policy: bool) -> None:
    """A shared backbone gets it beside the policy's, except in a warm-up; an own one alone."""
    model = exact(tiny_qwen3)
    settings = {"backbone": backbone, "value_clip": CLIP, "loss_coefficient": COEFFICIENT}
    update = with_critic(model, critic=settings, micro_batch_tokens=25, epochs=2)
    critic = critic_of(update)
    samples = update.samples(three_groups())
    far_apart(critic, model, samples)

    def both() -> tuple[Gradients, Gradients]:
        found = gradients(model), gradients(critic)
        model.zero_grad()
        critic.zero_grad()
        return found

    totals = update.learner.forward_backward(
        samples, build_objective(update.settings), "sequence_mean",
        skip_zero_advantages=False, train_policy=train_policy,
    )  # fmt: skip
    of_model, of_critic = both()
    (COEFFICIENT * plain_value_loss(critic, model, samples)).backward()  # type: ignore[no-untyped-call]
    by_values, expected = both()
    assert_same(of_critic, expected)
    assert totals["value_clipped"] > 0
    plain_policy_loss(model, samples).backward()  # type: ignore[no-untyped-call]
    by_policy, _ = both()
    if not train_policy:
        assert not of_model
    elif backbone == "own":
        assert not by_values
        assert_same(of_model, by_policy)
    else:
        assert_same(of_model, {name: g + by_values[name] for name, g in by_policy.items()})


def test_a_clipped_value_has_no_gradient_on_either_side() -> None:
    """Beyond the clip and the farther from the return for it: the error is that of a constant."""
    model = exact(tiny_gpt2)
    update = with_critic(model, critic={"value_clip": 0.2, "backbone": "shared"})
    critic = critic_of(update)
    for moved, left in ((0.5, 1.0), (-0.5, -1.0), (0.5, -1.0), (-0.5, 1.0)):
        samples = update.samples([group("x", 1, 2)])
        for one in samples:
            with torch.no_grad():
                values = plain_values(critic, model, one).tolist()
            one.values = array("d", [value - moved for value in values])
            one.returns = array("d", [value + left for value in values])
            critic.zero_grad()
        update.learner.forward_backward(
            samples, build_objective(update.settings), skip_zero_advantages=False
        )
        bias = critic.head.bias.grad
        assert bias is not None
        # d/db of 0.5 * 0.5 * (V - R)^2 is -0.5 * left; where V went towards the return, the
        # clipped value is farther off, and constant
        expected = 0.0 if moved * left > 0 else -0.5 * left
        assert bias.item() == pytest.approx(expected, abs=1e-9)


@BACKBONES
async def test_warm_up_moves_the_critic_only(backbone: Any) -> None:
    model = tiny_gpt2()
    critic = {"warmup_steps": 1, "backbone": backbone}
    update = updating(
        model, advantage="gae", normalize_advantages="batch", critic=critic, weight_decay=0.1
    )
    assert update.learner.critic is not None
    changes: list[int] = []

    def heard() -> None:
        changes.append(1)

    for step in (1, 2):
        before = [copy.deepcopy(m.state_dict()) for m in (model, update.learner.critic)]
        samples = update.samples(three_groups())
        metrics = update.learn(samples, step, heard)
        moved = [
            any(not torch.equal(old[name], new) for name, new in m.state_dict().items())
            for old, m in zip(before, (model, update.learner.critic), strict=True)
        ]
        assert moved == [step == 2, True] and len(changes) == step - 1
        assert metrics["critic_grad_norm"] > 0 and (metrics["grad_norm"] > 0) == (step == 2)


def named_groups() -> list[list[Rollout]]:
    """Two prompts, of which only one is worth anything: 1, whatever is said."""
    return [group("x", 1, 1, 1), group("y", 0, 0, 0)]


@BACKBONES
async def test_the_critic_learns_what_prompts_are_worth(backbone: Any) -> None:
    """From -1, that of a critic that says 0 of returns that are 1 as often as 0, to nearly 1."""
    update = with_critic(
        tiny_gpt2(), head=0.0, learning_rate=1e-4,
        critic={"backbone": backbone, "learning_rate": 0.03, "value_clip": None},
    )  # fmt: skip
    found = []
    for step in range(1, 31):
        metrics = update.learn(update.samples(named_groups()), step, unheard)
        found.append(metrics["explained_variance"])
    assert found[0] == pytest.approx(-1.0, abs=1e-6)
    assert found[-1] > 0.9 and metrics["value_loss"] < 0.02


@pytest.mark.parametrize("rate", [0.02, None])
async def test_the_critic_has_a_learning_rate_of_its_own(rate: float | None) -> None:
    update = with_critic(
        exact(tiny_gpt2), head=0.0, learning_rate=0.001, critic={"learning_rate": rate}
    )
    samples = update.samples([group("x", 1, 2)])
    metrics = update.learn(samples, 1, unheard)
    used = rate or 0.001
    assert (metrics["learning_rate"], metrics["critic_learning_rate"]) == (0.001, used)
    # the first step of Adam is the learning rate, towards the returns
    assert critic_of(update).head.bias.item() == pytest.approx(used, rel=1e-5)


def test_what_trains_of_the_policy_trains_of_the_critics_copy() -> None:
    lora = Critic(tiny_lora())
    trains = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trains
    assert all("lora_" in name or name.startswith("head.") for name in trains)
    untied, tied = (Critic(make()) for make in (tiny_llama, tiny_qwen3))
    assert {n for n, p in untied.named_parameters() if not p.requires_grad} == {
        "backbone.lm_head.weight"
    }
    assert all(p.requires_grad for p in tied.parameters())
    assert [n for n, _ in Critic(tiny_llama(), own_backbone=False).named_parameters()] == [
        "head.weight",
        "head.bias",
    ]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PolicyUpdate, dict[str, Tensor]]]:
    """What the RL stages of the runs that follow train with, and their critics' first weights."""
    built: list[tuple[PolicyUpdate, dict[str, Tensor]]] = []

    def build(*args: Any, **settings: Any) -> PolicyUpdate:
        update = build_update(*args, **settings)
        built.append((update, copy.deepcopy(critic_of(update).state_dict())))
        return update

    monkeypatch.setattr("retrain.loops.rl.build_update", build)
    return built


def ppo(**settings: Any) -> dict[str, Any]:
    return {"name": "ppo", "hyperparameters": hyperparameters(**settings)}


@BACKBONES
def test_a_run_saves_its_critic_and_another_goes_on_with_it(
    backbone: Any, tmp_path: Path, updates: list[tuple[PolicyUpdate, dict[str, Tensor]]]
) -> None:
    critic: dict[str, Any] = {"backbone": backbone, "learning_rate": 0.01}
    first = retrain.run_sync(
        rl_config(tmp_path, algorithm=ppo(critic=critic), checkpoint={"every_steps": 1})
    )
    assert first.checkpoint is not None
    inside = Path("critic", "critic.safetensors")
    learned = critic_of(updates[0][0])
    saved = load_file(first.checkpoint / inside)
    assert saved.keys() == dict(learned.named_parameters()).keys()
    assert saved["head.weight"].any() and torch.equal(saved["head.weight"], learned.head.weight)
    on_the_way = load_file(first.path / "checkpoints" / "rl-000001" / inside)
    assert not torch.equal(on_the_way["head.weight"], saved["head.weight"])

    critic["from_checkpoint"] = str(first.checkpoint)
    policy = load_policy(ModelConfig(name_or_path=str(first.checkpoint)))
    settings = Hyperparameters(advantage="gae", normalize_advantages="batch", critic=critic)
    again = build_update(settings, policy, seed=0)
    one = again.samples([rollouts_of(first.path)[2]])
    other = copies(one)
    updates[0][0].learner.attach_values(other)
    assert [list(s.values or ()) for s in one] == [list(s.values or ()) for s in other]
    assert any(any(s.values or ()) for s in one)

    model = {"name_or_path": str(first.checkpoint)}
    second = retrain.run_sync(rl_config(tmp_path, model=model, algorithm=ppo(critic=critic)))
    assert torch.equal(updates[1][1]["head.weight"], saved["head.weight"])
    assert all(row["value_loss"] >= 0 for row in metrics_of(second.path))


def test_a_critic_that_is_not_there_or_of_another_make_is_refused(tmp_path: Path) -> None:
    first = retrain.run_sync(rl_config(tmp_path, algorithm=ppo(steps=1)))
    assert first.checkpoint is not None
    runs = sorted(tmp_path.iterdir())
    missing = ppo(critic={"from_checkpoint": str(tmp_path)})
    with pytest.raises(UserError, match=r"critic\.from_checkpoint: .* has no critic/critic\.safe"):
        retrain.run_sync(rl_config(tmp_path, algorithm=missing))
    assert sorted(tmp_path.iterdir()) == runs, "nothing was started"

    policy = load_policy(ModelConfig(name_or_path=str(first.checkpoint)))
    critic = {"from_checkpoint": str(first.checkpoint)}
    how: dict[str, Any] = {"advantage": "gae", "normalize_advantages": "none"}
    other = Hyperparameters(**how, critic={**critic, "backbone": "shared"})
    with pytest.raises(UserError, match="is of another make than this one") as failure:
        build_update(other, policy, seed=0)
    assert "critic.backbone" in failure.value.next_step
    (first.checkpoint / "critic" / "critic.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"critic\.safetensors cannot be read"):
        build_update(Hyperparameters(**how, critic=critic), policy, seed=0)


def test_a_second_stage_goes_on_with_the_critic_of_the_first(
    tmp_path: Path, updates: list[Any]
) -> None:
    kinds = [{"kind": "rl", "name": name} for name in ("a", "b", "c")]
    kinds[2]["algorithm"] = {"hyperparameters": {"critic": {"backbone": "shared"}}}  # type: ignore[assignment]
    retrain.run_sync(rl_config(tmp_path, algorithm=ppo(steps=1), stages=kinds))
    first, second, third = (critic_of(update) for update, _ in updates)
    assert second is first and third is not first
    assert updates[1][1]["head.weight"].any() and not updates[2][1]["head.weight"].any()
