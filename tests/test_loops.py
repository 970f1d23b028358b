"""One whole run, SFT then GRPO, and everything it left behind."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrain
from retrain.loops.run import RunResult
from retrain.rollout import to_samples
from retrain.types import Rollout, Source
from runs import (
    RecordingEngine,
    hyperparameters,
    metrics_of,
    rl_config,
    rollouts_of,
    sft_section,
)

STEPS, PROMPTS, GROUP = 4, 3, 4


@dataclass(frozen=True)
class Trained:
    result: RunResult
    engine: RecordingEngine


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """20 steps of SFT, then 4 of GRPO with two updates each, evaluated on the way and after."""
    engines: list[RecordingEngine] = []

    def build(config: Any, policy: Any) -> RecordingEngine:
        engines.append(RecordingEngine(policy.model, tokenizer=policy.tokenizer, max_slots=8))
        return engines[-1]

    config = rl_config(
        tmp_path_factory.mktemp("runs"),
        sft=sft_section(),
        algorithm={
            "hyperparameters": hyperparameters(
                steps=STEPS,
                prompts_per_step=PROMPTS,
                group_size=GROUP,
                epochs=2,
                clip_high=0.28,
                aggregation="token_mean",
                max_new_tokens=10,
                learning_rate=3e-3,
                micro_batch_tokens=300,
            )
        },
        evaluation={
            "prompt_source": {
                "type": "python",
                "function": "runs:questions",
                "params": {"n": 6, "first": 60},
            },
            "every_steps": 2,
            "success_threshold": 0.5,
            "group_by": "parity",
            "modes": [
                {"name": "T=1", "repeats": 2},
                {"name": "no tool", "tools": False, "temperature": 0},
            ],
        },
        checkpoint={"every_steps": 1, "keep_last": 2},
        tracking={"progress": "off", "plots": True, "transcripts": 1},
        stages=[{"kind": "sft"}, {"kind": "rl"}, {"kind": "eval", "name": "after"}],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrain.loops.run.build_engine", build)
        yield Trained(retrain.run_sync(config), engines[0])


def every_rollout(trained: Trained) -> list[Rollout]:
    return [r for step in rollouts_of(trained.result.path).values() for r in step]


def test_every_step_wrote_its_rollouts_down(trained: Trained) -> None:
    by_step = rollouts_of(trained.result.path)
    assert list(by_step) == list(range(1, STEPS + 1))
    assert all(len(rollouts) == PROMPTS * GROUP for rollouts in by_step.values())
    assert len({r.id for r in every_rollout(trained)}) == STEPS * PROMPTS * GROUP
    assert any(len(r.model_messages) > 1 for r in every_rollout(trained)), "no tool was called"
    assert any(r.metrics.get("tool_calls/ok") for r in every_rollout(trained))


def test_only_sampled_tokens_train_and_each_once(trained: Trained) -> None:
    for rollout in every_rollout(trained):
        samples = iter(to_samples(rollout))
        for index, segment in enumerate(rollout.segments):
            sampled = [i for i, s in enumerate(segment.source) if s == Source.SAMPLED]
            in_turns = [i for span in segment.turns for i in range(span.start, span.end)]
            assert sampled == in_turns
            if not sampled:
                continue
            sample = next(samples)
            trains = [i for i, one in enumerate(sample.loss_mask) if one]
            assert trains == [segment.prefix_len + i for i in sampled]
            assert sample.token_ids == rollout.full_token_ids(index)[: len(sample)]
        assert next(samples, None) is None


def test_the_ledger_is_what_the_engine_got_and_gave(trained: Trained) -> None:
    for rollout in every_rollout(trained):
        log = iter(trained.engine.log[rollout.id])
        for index, segment in enumerate(rollout.segments):
            full = rollout.full_token_ids(index)
            for span in segment.turns:
                request, completion = next(log)
                assert array("i", request.prompt_ids) == full[: segment.prefix_len + span.start]
                own = slice(span.start, span.end)
                assert segment.token_ids[own] == completion.token_ids
                assert segment.logprobs[own] == completion.logprobs
                assert segment.versions[own] == completion.versions
                assert span.finish_reason == completion.finish_reason
        assert next(log, None) is None


def test_versions_count_the_updates(trained: Trained) -> None:
    for step, rollouts in rollouts_of(trained.result.path).items():
        versions = {v for r in rollouts for s in r.segments for v in s.versions if v >= 0}
        assert versions == {20 + 2 * (step - 1)}


def test_engine_and_learner_agree(trained: Trained) -> None:
    rows = metrics_of(trained.result.path)
    assert len(rows) == STEPS
    assert all(0 <= row["logprob_gap/max"] < 1e-4 for row in rows)


def test_the_last_checkpoint_gives_the_engines_logprobs(trained: Trained) -> None:
    """The evaluation after training, scored by what `from_pretrained` loads."""
    model = AutoModelForCausalLM.from_pretrained(trained.result.checkpoint).eval()
    checked = 0
    for rollout in rollouts_of(trained.result.path, "after-T_1")[0]:
        for index, segment in enumerate(rollout.segments):
            ids = torch.tensor([list(rollout.full_token_ids(index))])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            for i, source in enumerate(segment.source):
                if source == Source.SAMPLED:
                    t = segment.prefix_len + i
                    assert abs(logprobs[t - 1, ids[0, t]] - segment.logprobs[i]) < 1e-4
                    checked += 1
    assert checked > 50


def test_a_second_update_leaves_ratio_one(trained: Trained) -> None:
    rows = metrics_of(trained.result.path)
    assert all(row["ratio/mean"] != 1.0 and abs(row["ratio/mean"] - 1) < 0.5 for row in rows)
    assert any(row["clip_fraction"] > 0 for row in rows)


def test_the_policy_learned(trained: Trained) -> None:
    sft = metrics_of(trained.result.path, "sft")
    assert len(sft) == 20 and sft[-1]["loss"] < 0.6 * sft[0]["loss"]
    assert all(row["tokens"] > 0 for row in sft)


def test_evaluation_during_and_after(trained: Trained) -> None:
    during = metrics_of(trained.result.path, "rl-eval")
    assert [row["step"] for row in during] == [2, 4]
    assert during[0]["eval/T=1/n"] == 12 and during[0]["eval/no tool/n"] == 6
    assert during[0]["eval/T=1/masked"] == 0
    assert [(r.stage, r.mode, r.n) for r in trained.result.evaluations] == [
        ("after", "T=1", 12),
        ("after", "no tool", 6),
    ]
    assert {key for r in trained.result.evaluations for key in r.by_group} == {"0", "1"}
    for rollout in rollouts_of(trained.result.path, "after-no_tool")[0]:
        assert "tool_calls/ok" not in rollout.metrics
    names = {p.name for p in (trained.result.path / "transcripts").iterdir()}
    assert names == {"after-T_1-1.txt", "after-no_tool-1.txt"}


def test_the_last_checkpoints_are_kept(trained: Trained) -> None:
    kept = sorted(p.name for p in (trained.result.path / "checkpoints").iterdir())
    # of one stage's steps the last two; the end of a stage is none of them
    assert kept == ["rl", "rl-000002", "rl-000003", "sft", "sft-000018", "sft-000019"]
    assert trained.result.checkpoint == trained.result.path / "checkpoints" / "rl"


def test_the_checkpoint_is_the_policy(trained: Trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.result.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.result.checkpoint)
    assert tokenizer.encode("<code>1") == [tokenizer.convert_tokens_to_ids("<code>"), 
                                           *tokenizer.encode("1")]  # fmt: skip
    ids = torch.tensor([tokenizer.encode("User:\nWhat is 12+13?\n\nAssistant:\n")])
    with torch.no_grad():
        own = trained.engine.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, own, atol=0, rtol=0)


def test_a_run_goes_on_from_a_checkpoint(trained: Trained, tmp_path: Any) -> None:
    before = AutoModelForCausalLM.from_pretrained(trained.result.checkpoint)
    config = rl_config(
        tmp_path,
        model={"name_or_path": str(trained.result.checkpoint)},
        algorithm={"hyperparameters": hyperparameters(steps=1, learning_rate=1e-12)},
    )
    result = retrain.run_sync(config)
    after = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_the_same_seed_gives_the_same_run(tmp_path: Any) -> None:
    config = rl_config(tmp_path)
    one, other = (retrain.run_sync(config) for _ in range(2))
    first, second = ([r for s in rollouts_of(x.path).values() for r in s] for x in (one, other))
    assert [r.full_token_ids() for r in first] == [r.full_token_ids() for r in second]
    assert one.metrics["loss"] == other.metrics["loss"]
    third = retrain.run_sync(config | {"seed": 1})
    assert [r.full_token_ids() for r in first] != [
        r.full_token_ids() for s in rollouts_of(third.path).values() for r in s
    ]
