"""Teachers on what the student sampled: gradients against plain formulas, in float64."""

from __future__ import annotations

import copy
import math
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from retrain.algorithms import reinforce, sampled_reverse_kl, top_forward_kl, top_reverse_kl
from retrain.learner import PolicyObjective, TorchLearner
from retrain.loops.guidance import Guidance, leave_out_untaught, share_untaught, taught
from retrain.types import InfrastructureError, Rollout, Sample
from test_learner import TEMPERATURE, Gradients, assert_same, exact, gradients, policy_samples
from tiny import VOCAB, tiny_gpt2, tiny_qwen3

COEFFICIENT = 0.7
NAN = float("nan")
GUIDED = PolicyObjective(
    loss=lambda logprobs, old, advantages, mask, sequences: reinforce(
        logprobs, old, advantages, mask
    ),
    teacher_coefficient=COEFFICIENT,
)
TokenLoss = Callable[[Tensor, Sample, int], Tensor | float]
"""(the student's log-probabilities [V] at t, sample, t) -> loss of token t."""


def with_words(samples: Sequence[Sample], seed: int = 3) -> list[Sample]:
    """A teacher speaks of four tokens in five."""
    generator = random.Random(seed)
    for one in samples:
        said = [
            generator.uniform(-9, -1) if generator.random() < 0.8 else NAN for _ in range(len(one))
        ]
        one.teacher_logprobs = array("d", said)
    return list(samples)


def with_tops(
    samples: Sequence[Sample], k: int, *, seed: int = 4, temperature: float = TEMPERATURE
) -> list[Sample]:
    """The likeliest `k` tokens of random distributions, of all tokens but one that trains."""
    generator = torch.Generator().manual_seed(seed)
    for one in samples:
        shape = (len(one), VOCAB)
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        top = logits.log_softmax(-1).topk(k)
        ids, logprobs = top.indices.int(), top.values.clone()
        silent = [t for t, trains in enumerate(one.loss_mask) if trains][:1] if seed == 4 else []
        ids[silent], logprobs[silent] = -1, NAN
        one.teacher_top_ids = array("i", ids.flatten().tolist())
        one.teacher_top_logprobs = array("d", logprobs.flatten().tolist())
        one.teacher_top_k, one.teacher_temperature = k, temperature
    return list(samples)


def by_hand(model: Any, samples: Sequence[Sample], loss: TokenLoss) -> tuple[float, Gradients]:
    """The mean over all trained tokens of the batch, from plain full logits of each sequence."""
    losses = []
    for one in samples:
        logits = model(input_ids=torch.tensor([list(one.token_ids)])).logits[0]
        for t, trains in enumerate(one.loss_mask):
            if trains:
                losses.append(torch.as_tensor(loss(logits[t - 1], one, t)))
    model.zero_grad()
    total = torch.stack([x.double() for x in losses]).mean()
    total.backward()  # type: ignore[no-untyped-call]
    return total.item(), gradients(model)


def found(
    model: Any, samples: Sequence[Sample], *, tokens: int = 10_000, share: bool = True
) -> tuple[dict[str, float], Gradients]:
    model.zero_grad()
    learner = TorchLearner(
        model,
        learning_rate=1e-3,
        temperature=TEMPERATURE,
        micro_batch_tokens=tokens,
        share_prefixes=share,
    )
    totals = learner.forward_backward(samples, GUIDED, skip_zero_advantages=False)
    return totals, gradients(model)


def sampled_loss(logits: Tensor, one: Sample, t: int) -> Tensor:
    logprob = (logits / TEMPERATURE).log_softmax(-1)[one.token_ids[t]]
    assert one.teacher_logprobs is not None
    said = one.teacher_logprobs[t]
    advantage = 0.0 if one.advantages is None else one.advantages[t]
    if not math.isnan(said):
        advantage -= COEFFICIENT * (logprob.item() - said)
    return -advantage * logprob


def top_loss(logits: Tensor, one: Sample, t: int) -> Tensor | float:
    """The KL between the two distributions, each with one bucket for what the teacher left out."""
    k = one.teacher_top_k
    assert one.teacher_top_ids is not None and one.teacher_top_logprobs is not None
    ids = list(one.teacher_top_ids[t * k : (t + 1) * k])
    logprob = (logits / TEMPERATURE).log_softmax(-1)
    task = 0.0 if one.advantages is None else -one.advantages[t] * logprob[one.token_ids[t]]
    if ids[0] < 0:
        return task
    said = torch.tensor(
        list(one.teacher_top_logprobs[t * k : (t + 1) * k]), dtype=torch.float64
    ).exp()
    own = logprob.exp()
    rest = [i for i in range(len(own)) if i not in ids]
    p = torch.cat((own[ids], own[rest].sum().view(1)))
    q = torch.cat((said, (1 - said.sum()).view(1)))
    if not rest:
        p, q = p[:-1], q[:-1]
    return task + COEFFICIENT * (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("rewarded", [True, False])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3], ids=lambda m: m.__name__)
def test_each_token_answers_for_its_own_log_ratio(make: Any, rewarded: bool) -> None:
    model, samples = exact(make), with_words(policy_samples())
    if not rewarded:
        for one in samples:
            one.advantages = None
    loss, reference = by_hand(model, samples, sampled_loss)
    totals, own = found(model, samples)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9) and abs(loss) > 1e-3
    assert_same(own, reference)
    tokens = [
        (one, t) for one in samples for t, trains in enumerate(one.loss_mask)
        if trains and not math.isnan((one.teacher_logprobs or ())[t])
    ]  # fmt: skip
    assert totals["teacher_tokens"] == len(tokens) < totals["tokens"]


@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("rewarded", [True, False])
def test_the_kl_over_the_likeliest_tokens_and_the_rest(k: int, rewarded: bool) -> None:
    model, samples = exact(tiny_gpt2), with_tops(policy_samples(), k)
    if not rewarded:
        for one in samples:
            one.advantages = None
    loss, reference = by_hand(model, samples, top_loss)
    totals, own = found(model, samples)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9) and abs(loss) > 1e-3
    assert_same(own, reference)


@pytest.mark.parametrize("give", [with_words, lambda samples: with_tops(samples, 6)])
@pytest.mark.parametrize(("tokens", "share"), [(1, True), (20, False), (10_000, False)])
def test_the_cut_and_the_packing_do_not_change_the_gradient(
    give: Callable[[Sequence[Sample]], list[Sample]], tokens: int, share: bool
) -> None:
    samples = give(policy_samples())
    samples[1].token_ids[:5] = samples[0].token_ids[:5]
    samples[2].token_ids[:5] = samples[0].token_ids[:5]
    model = exact(tiny_qwen3)
    whole, reference = found(model, samples)
    cut, own = found(model, samples[::-1], tokens=tokens, share=share)
    assert_same(own, reference)
    for name in ("loss", "tokens", "teacher_kl", "teacher_tokens"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-9)


def test_a_token_without_a_word_adds_nothing() -> None:
    """Left out of what trains, it does not even count in the mean; NaN, it has no gradient."""
    model, samples = exact(tiny_gpt2), with_words(policy_samples())
    for one in samples:
        one.advantages = None
    silent = copy.deepcopy(samples)
    leave_out_untaught(silent)
    heard, all_ = (sum(sum(one.loss_mask) for one in part) for part in (silent, samples))
    assert heard < all_ and share_untaught(samples) == pytest.approx(1 - heard / all_)
    _, own = found(model, samples)
    _, left_out = found(model, silent)
    assert_same({n: g * all_ / heard for n, g in own.items()}, left_out)


def test_where_the_teacher_is_the_student_nothing_is_to_be_learnt() -> None:
    model, samples = exact(tiny_gpt2), policy_samples()
    learner = TorchLearner(model, learning_rate=1e-3, temperature=TEMPERATURE)
    learner.attach_old_logprobs(samples)
    for one in samples:
        one.teacher_logprobs, one.old_logprobs, one.advantages = one.old_logprobs, None, None
    totals, own = found(model, samples)
    assert totals["teacher_kl"] == pytest.approx(0, abs=1e-9)
    assert max(float(g.abs().max()) for g in own.values()) < 1e-9


def test_later_updates_measure_from_where_the_first_began() -> None:
    """The advantage keeps the log-probability of the start; the ratio alone moves."""
    said, old = torch.tensor([[0.0, -1.0, NAN]]), torch.tensor([[0.0, -2.5, -3.0]])
    mask = torch.tensor([[False, True, True]])
    assert sampled_reverse_kl(old, said, mask).tolist() == [[0.0, -1.5, 0.0]]
    impossible = torch.tensor([[0.0, -torch.inf, -1.0]])
    assert sampled_reverse_kl(old, impossible, mask).tolist() == [[0.0, 97.5, -2.0]]


def test_the_divergences_by_hand() -> None:
    """Teacher (0.5, 0.3 | 0.2), student (0.4, 0.4 | 0.2)."""
    said = torch.tensor([0.5, 0.3], dtype=torch.float64).log()
    own = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()
    forward = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    backward = 0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert top_forward_kl(own, said).item() == pytest.approx(forward, abs=1e-12)
    assert top_reverse_kl(own, said).item() == pytest.approx(backward, abs=1e-12)
    alone = torch.tensor([0.9999, 0.0001]).log()
    sure = torch.tensor([0.0])
    assert top_forward_kl(alone, sure).item() == pytest.approx(-math.log(0.9999), rel=1e-3)
    assert math.isfinite(top_reverse_kl(alone, sure).item())


class Scripted:
    """Teachers that give every token -1, and fail for rollouts of these ids."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.temperatures: list[float] = []

    async def prepare(self, temperature: float) -> None:
        return None

    async def attach(
        self, rollouts: Sequence[Rollout], samples: Sequence[Sample], temperature: float
    ) -> dict[str, float]:
        self.temperatures.append(temperature)
        for rollout in rollouts:
            if rollout.id in self.failing:
                rollout.mask("engine", "down")
        for one in samples:
            word = NAN if one.rollout_id in self.failing else -1.0
            one.teacher_logprobs = array("d", [NAN, *[word] * (len(one) - 1)])
        if all(rollout.error for rollout in rollouts):
            raise InfrastructureError("down")
        return {"teacher/failed": float(len(self.failing))}

    async def attach_top(
        self,
        samples: Sequence[Sample],
        k: int,
        temperature: float,
        *,
        rollouts: Sequence[Rollout] = (),
    ) -> None:
        self.temperatures.append(temperature)
        for one in samples:
            one.teacher_top_ids = array("i", [0, VOCAB] * len(one))
            one.teacher_top_logprobs = array("f", [-1.0, -2.0] * len(one))
            one.teacher_top_k = k

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("task_reward", [0.0, 0.5])
async def test_a_rollout_that_no_teacher_could_read_is_left_out(task_reward: float) -> None:
    samples = policy_samples()
    rollouts = [Rollout(id=name) for name in "abcd"]
    guidance = Guidance(Scripted("b"), 1.0, task_reward, top_k=None, vocab_size=VOCAB)
    kept, metrics = await guidance.teach(rollouts, samples, 0.7)
    assert [one.rollout_id for one in kept] == ["a", "a", "c", "d"]
    lost, trained = sum(samples[2].loss_mask), sum(sum(one.loss_mask) for one in policy_samples())
    assert metrics["teacher/no_signal"] == pytest.approx(lost / trained)
    nobody = Guidance(Scripted(*"abcd"), 1.0, task_reward, top_k=None, vocab_size=VOCAB)
    assert await nobody.teach([Rollout(id=n) for n in "abcd"], policy_samples(), 1.0) == ([], {})


async def test_tokens_that_the_policy_does_not_have_count_among_the_rest() -> None:
    teachers = Scripted()
    guidance = Guidance(teachers, 1.0, 0.0, top_k=2, vocab_size=VOCAB)
    (one,), _ = await guidance.teach([Rollout(id="a")], policy_samples()[:1], 0.7)
    assert one.teacher_top_ids is not None and set(one.teacher_top_ids) == {0, -1}
    assert one.teacher_temperature == 0.7 and teachers.temperatures == [0.7]
    assert taught(one).all()
    model = exact(tiny_gpt2)
    loss, reference = by_hand(model, [one], _first_alone)
    totals, own = found(model, [one])
    assert totals["loss"] == pytest.approx(loss, abs=1e-6)  # the teacher's are fp32
    assert own.keys() == reference.keys()


def _first_alone(logits: Tensor, one: Sample, t: int) -> Tensor:
    logprob = (logits / TEMPERATURE).log_softmax(-1)
    p, q = logprob[0].exp(), math.exp(-1.0)
    kl = p * (p.log() - math.log(q)) + (1 - p) * ((1 - p).log() - math.log(1 - q))
    assert one.advantages is not None
    return COEFFICIENT * kl - one.advantages[t] * logprob[one.token_ids[t]]
