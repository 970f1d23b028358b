"""Teachers' stored distributions as targets: gradients in float64, the cache, whole runs."""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrain import run_sync
from retrain.config.load import load_config
from retrain.learner import LogitsObjective, TorchLearner, collate, sft_loss
from retrain.loops.check import check
from retrain.loops.stored import FILE, StoredTops
from retrain.models.scores import scores
from retrain.types import InfrastructureError, Sample, UserError
from runs import metrics_of, model_section, rl_config
from test_distill_on_policy import by_hand, with_tops
from test_learner import Gradients, assert_same, exact, gradients, sample
from tiny import VOCAB, tiny_gpt2, tiny_qwen3

TEACHER = {"type": "model", "model": model_section(num_hidden_layers=3)}


def traces() -> list[Sample]:
    return [sample(n, str(n), None, n) for n in (9, 14, 5)]


def found(
    model: Any, samples: Sequence[Sample], share: float = 0.0, *, tokens: int = 10_000
) -> tuple[dict[str, float], Gradients]:
    model.zero_grad()
    learner = TorchLearner(model, learning_rate=1e-3, micro_batch_tokens=tokens)
    totals = learner.forward_backward(samples, LogitsObjective(share))
    return totals, gradients(model)


def forward_kl(logits: Tensor, one: Sample, t: int, share: float = 0.0) -> Tensor:
    """Of the teacher's distribution with one bucket for what it left out."""
    k = one.teacher_top_k
    assert one.teacher_top_ids is not None and one.teacher_top_logprobs is not None
    ids = list(one.teacher_top_ids[t * k : (t + 1) * k])
    hard = -share * logits.log_softmax(-1)[one.token_ids[t]]
    if ids[0] < 0:
        return hard
    said = list(one.teacher_top_logprobs[t * k : (t + 1) * k])
    q = torch.tensor(said, dtype=torch.float64).exp()
    p = (logits / one.teacher_temperature).softmax(-1)
    rest = [i for i in range(len(p)) if i not in ids]
    own = p[ids]
    if rest:
        own = torch.cat((own, p[rest].sum().view(1)))
        q = torch.cat((q, (1 - q.sum()).view(1)))
    return hard + (1 - share) * (q * (q.log() - own.log())).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 7, VOCAB])
def test_loss_and_gradient_are_those_of_the_formula(
    k: int, share: float, temperature: float
) -> None:
    model = exact(tiny_gpt2)
    samples = with_tops(traces(), k, temperature=temperature)
    loss, reference = by_hand(model, samples, lambda *at: forward_kl(*at, share))
    totals, own = found(model, samples, share)
    assert totals["loss"] == pytest.approx(loss, abs=1e-9) and loss > 1e-2
    assert totals["teacher_tokens"] == totals["tokens"] - len(samples)  # one of each is silent
    assert_same(own, reference)


def test_all_tokens_are_the_full_divergence() -> None:
    """And fewer never exceed it: merging tokens loses distance."""
    model, whole = exact(tiny_gpt2), with_tops(traces(), VOCAB, seed=5)
    loss, _ = found(model, whole)
    expected, _ = by_hand(model, whole, _full)
    assert loss["loss"] == pytest.approx(expected, abs=1e-9)
    parts = [found(model, with_tops(traces(), k, seed=5))[0]["loss"] for k in (1, 10, 100)]
    assert all(a < b for a, b in itertools.pairwise([0.0, *parts, expected]))


def _full(logits: Tensor, one: Sample, t: int) -> Tensor:
    q = torch.zeros(VOCAB, dtype=torch.float64)
    at = slice(t * VOCAB, (t + 1) * VOCAB)
    assert one.teacher_top_ids is not None and one.teacher_top_logprobs is not None
    said = torch.tensor(list(one.teacher_top_logprobs[at]), dtype=torch.float64)
    q[list(one.teacher_top_ids[at])] = said.exp()
    log_p = (logits / one.teacher_temperature).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, q, reduction="sum")


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_cut_does_not_change_the_gradient(tokens: int) -> None:
    model, samples = exact(tiny_qwen3), with_tops(traces(), 6)
    whole, reference = found(model, samples, 0.25)
    cut, own = found(model, samples[::-1], 0.25, tokens=tokens)
    assert_same(own, reference)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-9)


def test_samples_with_fewer_candidates_share_a_batch() -> None:
    model = exact(tiny_gpt2)
    first, second, bare = traces()
    with_tops([first], 3, seed=5)
    with_tops([second], 8, seed=6)
    bare.teacher_temperature = first.teacher_temperature
    mixed = [first, second, bare]
    total, _ = found(model, mixed)
    counts = [sum(one.loss_mask) for one in mixed]
    alone = [found(model, [one])[0]["loss"] * n for one, n in zip(mixed, counts, strict=True)]
    assert alone[2] == 0 and total["loss"] == pytest.approx(sum(alone) / sum(counts), abs=1e-9)
    second.teacher_temperature = 3.0
    with pytest.raises(ValueError, match="one temperature"):
        collate(mixed, [1.0] * 3)


def test_candidates_in_chunks_are_those_at_once() -> None:
    model, (one, *_) = exact(tiny_qwen3), traces()
    batch = collate(with_tops([one], 5, seed=5), [1.0])
    assert batch.teacher_top_ids is not None
    ids = batch.teacher_top_ids[batch.mask]

    def given(chunk: int) -> tuple[Tensor, Gradients]:
        model.zero_grad()
        scored = scores(
            model, batch.token_ids, batch.lengths, batch.mask,
            candidates=ids, candidate_temperature=2.0, logits_per_chunk=chunk,
        )  # fmt: skip
        assert scored.candidates is not None
        scored.candidates.square().sum().backward()  # type: ignore[no-untyped-call]
        return scored.candidates.detach(), gradients(model)

    (whole, reference), (cut, own) = given(10**6), given(2 * VOCAB)
    torch.testing.assert_close(whole, cut, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(len(ids)).double())
    assert_same(own, reference)


def test_without_teachers_a_batch_has_nothing_of_them() -> None:
    batch = collate(traces(), [1.0] * 3)
    assert batch.teacher_logprobs is batch.teacher_top_ids is batch.teacher_top_logprobs is None
    model, samples = exact(tiny_gpt2), traces()
    totals = TorchLearner(model, learning_rate=1e-3).forward_backward(samples, sft_loss)
    assert "teacher_kl" not in totals


class Counting:
    """Teachers that speak of all samples but those of `silent` rollouts, and count the asked."""

    def __init__(self, *silent: str, fails: bool = False) -> None:
        self.silent, self.fails = silent, fails
        self.asked: list[str] = []

    async def prepare(self, temperature: float) -> None:
        return None

    async def attach(self, *_: Any) -> dict[str, float]:
        raise AssertionError

    async def attach_top(
        self, samples: Sequence[Sample], k: int, temperature: float, **_: Any
    ) -> None:
        if self.fails:
            raise InfrastructureError("out of reach")
        self.asked += [one.rollout_id for one in samples]
        for one in samples:
            with_tops([one], k, seed=5, temperature=temperature)
            if one.rollout_id in self.silent:
                one.teacher_top_ids = array("i", [-1]) * (k * len(one))

    async def close(self) -> None:
        return None


def stored(teachers: Counting, path: Path, **changed: Any) -> StoredTops:
    given = {
        "identity": "t",
        "k": 4,
        "temperature": 2.0,
        "vocab_size": VOCAB,
        "keep_untaught": False,
    }
    return StoredTops(teachers, path=path, **{**given, **changed})


async def test_what_was_said_once_is_not_asked_again(tmp_path: Path) -> None:
    teachers, file = Counting("14"), tmp_path / "a" / "said.sqlite"
    first, again = traces(), [*traces(), *traces()]
    await stored(teachers, file).attach(first)
    assert teachers.asked == ["9", "14", "5"]
    await stored(teachers, file).attach(again)
    assert teachers.asked[3:] == ["14"]  # nothing was said of it: it may be asked once more
    for one, other in zip(first * 2, again, strict=True):
        trained = [t for t, trains in enumerate(one.loss_mask) if trains]
        assert one.loss_mask == other.loss_mask and one.teacher_temperature == 2.0
        assert one.teacher_top_ids == other.teacher_top_ids
        assert bool(trained) == (one.rollout_id != "14")
    _, ours = found(exact(tiny_gpt2), first)
    _, same = found(exact(tiny_gpt2), again[:3])
    assert_same(ours, same)
    for other in ({"k": 5}, {"temperature": 1.0}, {"identity": "u"}):
        asked = len(teachers.asked)
        await stored(teachers, file, **other).attach(traces())
        assert len(teachers.asked) == asked + 3


async def test_tokens_without_a_word_train_on_where_labels_do(tmp_path: Path) -> None:
    kept = stored(Counting("14"), tmp_path / "said.sqlite", keep_untaught=True)
    samples, before = traces(), [copy.copy(one.loss_mask) for one in traces()]
    await kept.attach(samples)
    assert [one.loss_mask for one in samples] == before


@pytest.mark.parametrize("teachers", [Counting(fails=True), Counting("9", "14", "5")])
async def test_a_batch_that_nobody_speaks_of_stops_the_run(
    tmp_path: Path, teachers: Counting
) -> None:
    with pytest.raises(UserError, match="a whole batch"):
        await stored(teachers, tmp_path / "said.sqlite").attach(traces())
    with pytest.raises(UserError, match=r"distillation.cache: .* cannot be used"):
        await stored(Counting(), tmp_path).attach(traces())


def config_of(output: Path, **changed: Any) -> dict[str, Any]:
    section = {
        "type": "logits", "teachers": [TEACHER], "dataset": "runs:traces", "params": {"n": 24},
        "epochs": 2, "batch_size": 12, "learning_rate": 1e-2, "top_k": 8,
    }  # fmt: skip
    return rl_config(output, distillation={**section, **changed})


def test_a_run_learns_the_distributions_and_asks_once(tmp_path: Path) -> None:
    run = run_sync(config_of(tmp_path, epochs=10, top_k=64))
    losses = [row["loss"] for row in metrics_of(run.path, "distill")]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
    assert (run.path / FILE).is_file()
    shared = tmp_path / "said.sqlite"
    first = run_sync(config_of(tmp_path, cache=str(shared)))
    size = shared.stat().st_size
    second = run_sync(config_of(tmp_path, cache=str(shared)))
    assert shared.stat().st_size == size and not (first.path / FILE).exists()
    one, other = ([r["loss"] for r in metrics_of(x.path, "distill")] for x in (first, second))
    assert one == other
    for changed in ({"temperature": 3.0}, {"cross_entropy": 0.5}, {"top_k": 2}):
        third = run_sync(config_of(tmp_path, **changed))
        assert metrics_of(third.path, "distill")[0]["loss"] != pytest.approx(one[0], rel=1e-3)


def test_check_says_what_it_would_do(tmp_path: Path) -> None:
    said = check(load_config(config_of(tmp_path, cross_entropy=0.25, temperature=2)))
    for line in ("teacher teacher0: in this process", "traces: 24 from", "25% of the loss",
                 "over the teachers' top 8, temperature 2", "4 steps of 12"):  # fmt: skip
        assert line in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cross_entropy": 1.0}, "distillation.cross_entropy: input should be less than 1"),
        ({"teachers": []}, "distillation.teachers: "),
        ({"teachers": [{**TEACHER, "when": {"a": 1}}]}, "teachers.0.when matches no trace"),
        ({"dataset": "a.jsonl"}, "params needs dataset to be an import path"),
    ],
)
def test_refusals(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as failure:
        load_config(config_of(tmp_path, **changed))
    assert message in str(failure.value)
