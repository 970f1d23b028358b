"""The learner's losses and gradients against plain formulas over full logits, in float64."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from retrain.algorithms import Aggregation, ppo_clip
from retrain.learner import PolicyObjective, TorchLearner, sft_loss
from retrain.types import Sample, UserError
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_qwen3

LOW, HIGH, TEMPERATURE = 0.2, 0.28, 0.7
Gradients = dict[str, torch.Tensor]
CLIPPED = PolicyObjective(
    loss=lambda logprobs, old, advantages, mask, sequences: ppo_clip(
        logprobs, old, advantages, mask, clip_low=LOW, clip_high=HIGH
    )
)


def exact(make: Any) -> Any:
    """A float64 model; RMS norms then work in float64 too, which transformers does in fp32."""
    model = make().double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm.__get__(module)
    return model


def _rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    normed: torch.Tensor = self.weight * (hidden * scale)
    return normed


def sample(
    length: int, rollout: str, advantage: float | None, seed: int, *, old: bool = False
) -> Sample:
    """Random tokens; about half of them train, and never the first."""
    generator = random.Random(seed)
    mask = [0] + [int(generator.random() < 0.5) for _ in range(length - 1)]
    mask[-1] = 1
    return Sample(
        token_ids=array("i", [generator.randrange(1, VOCAB) for _ in range(length)]),
        loss_mask=array("B", mask),
        rollout_id=rollout,
        group_id="g",
        objective="cross_entropy" if advantage is None else "policy",
        behavior_logprobs=array("f", [-1.0] * length),
        old_logprobs=array("d", [generator.uniform(-12, -2) for _ in mask]) if old else None,
        advantages=None if advantage is None else array("d", [advantage] * length),
    )


def policy_samples() -> list[Sample]:
    """Rollout a has two segments."""
    return [
        sample(9, "a", 1.5, 1),
        sample(6, "a", 1.5, 2),
        sample(14, "b", -0.4, 3),
        sample(5, "c", -1.1, 4),
        sample(11, "d", 0.7, 5),
    ]


def near(model: Any, samples: Sequence[Sample]) -> list[Sample]:
    """Old log-probabilities such that ratios lie on both sides of both bounds."""
    generator = random.Random(7)
    for one in samples:
        with torch.no_grad():
            logprobs = plain_logprobs(model, one)
        moved = [x + generator.uniform(-0.6, 0.6) for x in logprobs.tolist()]
        one.old_logprobs = array("d", [0.0, *moved])
    return list(samples)


def plain_logprobs(model: Any, one: Sample) -> torch.Tensor:
    """Of tokens 1 to T-1, from the model's own full logits of this sequence alone."""
    ids = torch.tensor([list(one.token_ids)])
    logprobs = (model(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None]).squeeze(1)


def plain_loss(model: Any, samples: Sequence[Sample], how: Aggregation) -> torch.Tensor:
    """The published formulas, one token at a time."""
    per_rollout: dict[str, list[torch.Tensor]] = {}
    for one in samples:
        for t, logprob in enumerate(plain_logprobs(model, one), start=1):
            if not one.loss_mask[t]:
                continue
            if one.advantages is None:
                token_loss = -logprob
            else:
                old = logprob.detach() if one.old_logprobs is None else one.old_logprobs[t]
                ratio, advantage = torch.exp(logprob - old), one.advantages[t]
                clipped = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
                token_loss = -torch.min(ratio * advantage, clipped * advantage)
            per_rollout.setdefault(one.rollout_id, []).append(token_loss)
    rollouts = [torch.stack(losses) for losses in per_rollout.values()]
    if how == "token_mean":
        return torch.cat(rollouts).mean()
    return torch.stack([losses.mean() for losses in rollouts]).mean()


def expected(model: Any, samples: Sequence[Sample], how: Aggregation) -> tuple[float, Gradients]:
    model.zero_grad()
    loss = plain_loss(model, samples, how)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), gradients(model)


def gradients(model: Any) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def learner(model: Any, tokens: int = 10_000, temperature: float = TEMPERATURE) -> TorchLearner:
    return TorchLearner(
        model, learning_rate=1e-3, micro_batch_tokens=tokens, temperature=temperature
    )


def found(
    model: Any,
    samples: Sequence[Sample],
    how: Aggregation = "token_mean",
    *,
    tokens: int = 10_000,
) -> tuple[dict[str, float], Gradients]:
    model.zero_grad()
    supervised = samples[0].objective == "cross_entropy"
    loss = sft_loss if supervised else CLIPPED
    totals = learner(model, tokens).forward_backward(samples, loss, how)
    return totals, gradients(model)


def assert_same(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys() and max(g.abs().max() for g in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_qwen3], ids=lambda m: m.__name__)
def test_grpo_loss_and_gradient_are_those_of_the_formula(make: Any, how: Aggregation) -> None:
    model = exact(make)
    samples = near(model, policy_samples())
    loss, reference = expected(model, samples, how)
    totals, own = found(model, samples, how)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9) and abs(loss) > 1e-3
    assert 0 < totals["clipped_low"] + totals["clipped_high"] < totals["tokens"]
    assert_same(own, reference)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
def test_the_first_update_is_the_plain_policy_gradient(how: Aggregation) -> None:
    model, samples = exact(tiny_gpt2), policy_samples()
    loss, reference = expected(model, samples, how)
    totals, own = found(model, samples, how)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9)
    assert totals["ratio"] == totals["tokens"] == sum(sum(s.loss_mask) for s in samples)
    assert_same(own, reference)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3], ids=lambda m: m.__name__)
def test_sft_loss_and_gradient_are_those_of_the_formula(make: Any) -> None:
    model = exact(make)
    samples = [sample(n, str(n), None, n) for n in (5, 12, 8)]
    loss, reference = expected(model, samples, "token_mean")
    totals, own = found(model, samples)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9)
    assert_same(own, reference)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("tokens", [1, 20, 30])
def test_the_cut_and_the_order_do_not_change_the_gradient(tokens: int, how: Aggregation) -> None:
    model = exact(tiny_gpt2)
    samples = near(model, policy_samples())
    whole, reference = found(model, samples, how)
    cut, own = found(model, samples[::-1], how, tokens=tokens)
    assert_same(own, reference)
    for name in ("loss", "tokens", "clipped_low", "clipped_high", "ratio", "approx_kl", "entropy"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-9)


def test_padding_does_not_change_a_samples_gradient() -> None:
    """With a neighbour 40 tokens longer whose weight is zero in all but one token."""
    model = exact(tiny_gpt2)
    short, long = sample(6, "a", 1.0, 1), sample(46, "b", 1e-300, 2)
    _, padded = found(model, [short, long], "sequence_mean")
    _, alone = found(model, [short], "sequence_mean")
    assert_same({n: 2 * g for n, g in padded.items()}, alone)


def test_samples_without_advantage_count_but_are_not_run() -> None:
    model = exact(tiny_gpt2)
    samples = [sample(6, "a", 1.0, 1), sample(9, "b", 0.0, 2), sample(7, "c", -1.0, 3)]
    rows: list[int] = []
    found(model, samples)  # so that the probe of the architecture is not counted
    hook = model.transformer.wte.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].numel())
    )
    totals, own = found(model, samples)
    hook.remove()
    # two rows, as wide as the longer one less its last token
    assert sum(rows) == 2 * (7 - 1)
    assert totals["tokens"] == sum(samples[0].loss_mask) + sum(samples[2].loss_mask)
    _, reference = expected(model, samples, "token_mean")
    assert_same(own, reference)


def test_a_batch_without_any_advantage_leaves_no_gradient() -> None:
    model = exact(tiny_gpt2)
    totals, own = found(model, [sample(6, "a", 0.0, 1), sample(9, "b", 0.0, 2)])
    assert totals["tokens"] == 0 and not own


def test_old_logprobs_are_the_learners_own() -> None:
    model, samples = exact(tiny_gpt2), policy_samples()
    learner(model, 20).attach_old_logprobs(samples)
    for one in samples:
        with torch.no_grad():
            plain = [0.0, *plain_logprobs(model, one).tolist()]
        assert one.old_logprobs is not None
        for mask, old, reference in zip(one.loss_mask, one.old_logprobs, plain, strict=True):
            assert not mask or old == pytest.approx(reference, abs=1e-9)


def test_the_gap_is_the_distance_to_the_engine() -> None:
    model, samples = exact(tiny_gpt2), policy_samples()
    with torch.no_grad():
        gaps = [
            abs(logprob.item() + 1.0)
            for one in samples
            for trains, logprob in zip(one.loss_mask[1:], plain_logprobs(model, one), strict=True)
            if trains
        ]
    totals, _ = found(model, samples, tokens=20)
    assert totals["gap_max"] == pytest.approx(max(gaps), rel=1e-6)
    assert totals["gap_mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)


def test_a_step_is_adamws_on_the_clipped_gradient() -> None:
    model = exact(tiny_gpt2)
    samples = [sample(9, "a", 3.0, 1), sample(7, "b", -3.0, 2)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = TorchLearner(model, learning_rate=0.01, max_grad_norm=1e-3, temperature=TEMPERATURE)
    trainer.forward_backward(samples, CLIPPED)
    reference = gradients(model)
    norm = torch.sqrt(sum(g.pow(2).sum() for g in reference.values()))  # type: ignore[arg-type]
    stepped = trainer.optim_step()
    assert stepped["grad_norm"] == pytest.approx(norm.item(), abs=1e-9) and norm > 1e-3
    assert stepped["learning_rate"] == 0.01 and trainer.updates == 1
    # the first step of Adam: lr * g / (|g| + eps) of the clipped gradient
    for name, parameter in model.named_parameters():
        clipped = reference[name] * 1e-3 / (norm + 1e-6)
        moved = 0.01 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(parameter, before[name] - moved, atol=1e-9, rtol=0)
        assert parameter.grad is None


def test_gradient_checkpointing_acts_and_changes_nothing() -> None:
    model, samples = exact(tiny_qwen3), policy_samples()
    _, reference = found(model, samples)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, own = found(model, samples)
    hook.remove()
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert_same(own, reference)


def test_a_loss_that_is_not_finite_stops_and_names_rollouts() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan after 0 updates \(rollouts a\)"):
        found(model, [sample(6, "a", 1.0, 1)])


def test_a_frozen_model_is_refused() -> None:
    model = tiny_gpt2().requires_grad_(False)
    with pytest.raises(UserError, match="no parameter that trains"):
        learner(model)
