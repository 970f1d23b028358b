"""Algorithms by name: what each stands for, how a file overrules it, and short runs."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import retrain
from retrain.config import load_config
from retrain.config.algorithm import AlgorithmConfig, Hyperparameters
from retrain.config.load import resolve_stages
from retrain.config.model import ModelConfig
from retrain.config.presets import PRESETS
from retrain.loops.check import check
from retrain.loops.credit import sampled_tokens
from retrain.loops.update import build_objective
from retrain.models import load_policy
from retrain.types import Rollout, UserError
from runs import digits, hyperparameters, metrics_of, model_section, rl_config, rollouts_of

GRPO: dict[str, Any] = {
    "advantage": "grpo", "normalize_advantages": "group", "credit": "rollout", "gamma": 1.0,
    "loss": "ppo_clip", "clip": (0.2, 0.2), "dual_clip": None, "aggregation": "sequence_mean",
    "epochs": 1, "mini_batches": 1, "dynamic_sampling_rounds": 0, "kl": None, "correction": None,
    "critic": None, "overlong_punishment": None, "entropy_coefficient": 0.0,
    "train_truncated": True, "train_turns": "all",
}  # fmt: skip
"""Written down here once more, from the papers."""

DIFFERENCES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"normalize_advantages": "none", "aggregation": "constant"},
    "dapo": {
        "clip": (0.2, 0.28), "aggregation": "token_mean", "dynamic_sampling_rounds": 3,
        "mini_batches": 2, "overlong_punishment": {"buffer_share": 0.2, "weight": 1.0},
    },
    "gspo": {"loss": "gspo", "clip": (3e-4, 4e-4), "mini_batches": 2},
    "cispo": {"loss": "cispo", "clip": (None, 4.0), "aggregation": "token_mean",
              "mini_batches": 2},
    "rloo": {
        "advantage": "rloo", "normalize_advantages": "none", "loss": "reinforce",
        "clip": (None, None), "aggregation": "sequence_sum",
    },
    "reinforce_plus_plus": {
        "advantage": "reinforce_plus_plus", "normalize_advantages": "batch",
        "aggregation": "token_mean",
        "kl": {"coefficient": 0.001, "estimator": "k1", "place": "reward", "refresh_steps": None},
    },
    "ppo": {
        "advantage": "gae", "normalize_advantages": "batch", "aggregation": "token_mean",
        "epochs": 2,
        "critic": {
            "backbone": "own", "learning_rate": None, "gae_lambda": 1.0, "value_clip": 0.2,
            "loss_coefficient": 0.5, "warmup_steps": 0, "from_checkpoint": None,
        },
    },
}  # fmt: skip

PRINTED = {
    "grpo": [
        "advantage: grpo, normalised: group, credit: rollout",
        "loss: ppo_clip (1 - 0.2 to 1 + 0.2); aggregation: sequence_mean",
        "updates a step: 1 x 1 (epochs x mini-batches)",
    ],
    "dr_grpo": [
        "advantage: grpo, normalised: none, credit: rollout",
        "loss: ppo_clip (1 - 0.2 to 1 + 0.2); aggregation: constant, 6 tokens",
    ],
    "dapo": [
        "loss: ppo_clip (1 - 0.2 to 1 + 0.28); aggregation: token_mean",
        "dynamic sampling: up to 3 further rounds",
        "overlong punishment: over the last 20% of max_new_tokens, up to 1",
    ],
    "gspo": ["loss: gspo (1 - 0.0003 to 1 + 0.0004); aggregation: sequence_mean"],
    "cispo": ["loss: cispo (0 to 1 + 4); aggregation: token_mean"],
    "rloo": [
        "advantage: rloo, normalised: none, credit: rollout",
        "loss: reinforce; aggregation: sequence_sum",
    ],
    "reinforce_plus_plus": [
        "advantage: reinforce_plus_plus, normalised: batch, credit: rollout",
        "kl: k1 in the reward, coefficient 0.001",
    ],
    "ppo": [
        "advantage: gae, normalised: batch, credit: rollout",
        "updates a step: 2 x 1 (epochs x mini-batches)",
        "critic: own backbone, learning rate 0.001, lambda 1, value clip 0.2, warm-up 0 steps",
    ],
}

each_preset = pytest.mark.parametrize("name", list(DIFFERENCES))


def algorithm(name: str, **given: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": name, "hyperparameters": given})


def choices(settings: Hyperparameters) -> dict[str, Any]:
    """Those that GRPO lists, with the clip that is used."""
    given = {**settings.model_dump(mode="json"), "clip": settings.clip}
    return {key: given[key] for key in GRPO}


def test_these_are_all_presets() -> None:
    assert list(PRESETS) == list(DIFFERENCES) == list(PRINTED)


@each_preset
def test_a_preset_is_its_choices_and_the_defaults(name: str) -> None:
    assert choices(algorithm(name).hyperparameters) == GRPO | DIFFERENCES[name]
    assert algorithm(name).hyperparameters == Hyperparameters(**PRESETS[name])
    assert AlgorithmConfig(name=name) == algorithm(name)


@each_preset
def test_check_prints_what_a_name_amounts_to(name: str, tmp_path: Path) -> None:
    given = {"name": name, "hyperparameters": hyperparameters()}
    text = check(load_config(rl_config(tmp_path, algorithm=given)))
    lines = [line.strip() for line in text.splitlines()]
    assert set(PRINTED[name]) <= set(lines)
    assert any(line.startswith(f"{name} on torch: 2 steps of 2 prompts x 3") for line in lines)
    optional = ("kl:", "critic:", "dynamic sampling:", "overlong", "correction:", "entropy")
    extra = {line for line in lines if line.startswith(optional)}
    assert extra == {line for line in PRINTED[name] if line.startswith(optional)}


def test_check_prints_choices_that_no_preset_makes(tmp_path: Path) -> None:
    settings = hyperparameters(
        epochs=2, dual_clip=3.0, entropy_coefficient=0.01, train_truncated=False, credit="turn",
        train_turns="last",
        steps=6, kl={"refresh_steps": 5}, correction={"kind": "mis", "level": "sequence"},
    )  # fmt: skip
    text = check(load_config(rl_config(tmp_path, algorithm={"hyperparameters": settings})))
    for line in (
        "advantage: grpo, normalised: group, credit: turn",
        "loss: ppo_clip (1 - 0.2 to 1 + 0.2, dual 3); aggregation: sequence_mean",
        "entropy bonus: 0.01",
        "kl: k3 in the loss, coefficient 0.001, refreshed every 5 steps",
        "correction: mis by sequence, cap 2",
        "truncated rollouts do not train",
        "only the last turn of a rollout trains",
    ):
        assert f"  {line}\n" in text


@pytest.mark.parametrize(
    ("name", "given", "changed"),
    [
        ("dapo", {"clip_high": 0.4}, {"clip": (0.2, 0.4)}),
        ("dapo", {"overlong_punishment": None}, {"overlong_punishment": None}),
        ("dapo", {"overlong_punishment": {"weight": 2.0}},
         {"overlong_punishment": {"buffer_share": 0.2, "weight": 2.0}}),
        ("gspo", {"clip_high": 0.1}, {"clip": (3e-4, 0.1)}),
        ("reinforce_plus_plus", {"kl": None}, {"kl": None}),
        ("reinforce_plus_plus", {"kl": {"coefficient": 0.5}}, {"kl": {
            "coefficient": 0.5, "estimator": "k1", "place": "reward", "refresh_steps": None}}),
        ("ppo", {"epochs": 1, "critic": {"gae_lambda": 0.5}},
         {"epochs": 1, "critic": {**DIFFERENCES["ppo"]["critic"], "gae_lambda": 0.5}}),
        ("ppo", {"advantage": "grpo"}, {"advantage": "grpo", "critic": None}),
        ("dapo", {"loss": "gspo"}, {"loss": "gspo", "clip": (3e-4, 4e-4)}),
        ("dapo", {"loss": "sapo"}, {"loss": "sapo", "clip": (None, None)}),
    ],
)  # fmt: skip
def test_a_file_overrules_its_preset_key_by_key(
    name: str, given: dict[str, Any], changed: dict[str, Any]
) -> None:
    found = choices(algorithm(name, **given).hyperparameters)
    assert found == GRPO | DIFFERENCES[name] | changed


def stage_settings(section: dict[str, Any], *overlays: dict[str, Any]) -> list[Hyperparameters]:
    stages = [{"kind": "rl", "algorithm": overlay} for overlay in overlays]
    config = load_config(rl_config(Path("runs"), algorithm=section, stages=stages))
    return [stage.algorithm.hyperparameters for _, _, stage in resolve_stages(config)]


@each_preset
def test_a_stage_that_names_a_preset_gets_its_choices(name: str) -> None:
    given = {"name": "ppo", "hyperparameters": {"learning_rate": 0.5, "entropy_coefficient": 0.1}}
    own, other = stage_settings(given, {}, {"name": name})
    kept = {"entropy_coefficient": 0.1}
    assert choices(own) == GRPO | DIFFERENCES["ppo"] | kept
    assert choices(other) == GRPO | DIFFERENCES[name] | kept
    assert own.learning_rate == other.learning_rate == 0.5


def test_a_stage_overrules_the_preset_it_names() -> None:
    (found,) = stage_settings(
        {"name": "dapo", "hyperparameters": {"epochs": 2, "clip_high": 0.3}},
        {"name": "reinforce_plus_plus", "hyperparameters": {"kl": {"coefficient": 0.2}}},
    )
    expected = GRPO | DIFFERENCES["reinforce_plus_plus"] | {"clip": (0.2, 0.3), "epochs": 2}
    expected["kl"] = {**expected["kl"], "coefficient": 0.2}
    assert choices(found) == expected


GAE = {"advantage": "gae", "normalize_advantages": "none"}
PLUS = {"advantage": "reinforce_plus_plus", "normalize_advantages": "none"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 1}, "group_size 1 gives every rollout an advantage of zero under grpo"),
        ({"advantage": "gae", "critic": {}}, "normalize_advantages: group has no meaning for gae"),
        ({"advantage": "reinforce_plus_plus"}, "has no meaning for reinforce_plus_plus"),
        ({"gamma": 0.9}, "gamma does nothing for grpo: it is for gae, reinforce_plus_plus"),
        ({"advantage": "rloo", "credit": "turn"}, "credit: turn is for advantage grpo, not rloo"),
        ({**PLUS, "credit": "turn"}, "it has the rewards of turns where they were given"),
        (GAE, "advantage: gae needs a critic, `critic: {}` for its defaults"),
        ({"critic": {}}, "critic does nothing for advantage grpo: it is for gae"),
        ({"loss": "reinforce", "clip_high": 0.2}, "clip_low and clip_high do nothing for loss re"),
        ({"loss": "sapo", "clip_low": 0.2}, "clip_low and clip_high do nothing for loss sapo"),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip does nothing for loss gspo"),
        ({"aggregation_length": 8}, "aggregation_length does nothing for sequence_mean"),
        ({**PLUS, "dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds does nothing for rein"),
        ({"kl": {"place": "reward"}}, "makes the penalty as large as a reward where a group's"),
        ({"mini_batches": 3}, "mini_batches is 3, but a step has 2 groups to deal out"),
        ({**GAE, "critic": {"warmup_steps": 2}}, "critic.warmup_steps takes all the steps"),
        ({"kl": {"estimator": "k1"}}, "kl.estimator k1 in the loss has an expected gradient of"),
        ({"clip_low": 0.2}, "clip_low does nothing in a step's first update, and epochs: 1 with"),
        ({"clip_high": 0.28}, "clip_high does nothing in a step's first update"),
        ({"loss": "gspo", "clip_high": 0.28}, "clip_high does nothing in a step's first update"),
        ({"dual_clip": 3.0}, "dual_clip does nothing in a step's first update"),
        ({**GAE, "critic": {"value_clip": 0.5}}, "critic.value_clip does nothing in a step's firs"),
        ({"epochs": 2, "clip_low": 1.0}, "clip_low 1.0 does nothing for loss ppo_clip: the ratio"),
        ({"epochs": 2, "loss": "cispo", "clip_low": 1.5}, "clip_low 1.5 does nothing for loss c"),
        ({"kl": {"refresh_steps": 2}}, "kl.refresh_steps does nothing: the reference would first"),
        ({"min_lr_ratio": 0.2}, "min_lr_ratio 0.2 does nothing with schedule: constant"),
        ({"warmup_steps": 2}, "warmup_steps is 2, but there are 2 updates: nothing would be lea"),
        ({"learning_rate": 2e37}, "learning_rate: 2e+37 is more than a 32-bit float can hold"),
        ({**GAE, "critic": {"learning_rate": 2e37}}, "critic.learning_rate: 2e+37 is more"),
        ({"betas": [0.9, 1.0]}, "betas.1: input should be less than 1"),
    ],
)  # fmt: skip
def test_choices_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    section = {"hyperparameters": {"steps": 2, "prompts_per_step": 2, **given}}
    with pytest.raises(UserError) as failure:
        load_config(rl_config(Path("runs"), algorithm=section))
    assert message in failure.value.cause
    assert "algorithm.hyperparameters" in failure.value.cause


@pytest.mark.parametrize(
    "given",
    [
        {**PLUS, "group_size": 1, "gamma": 0.9},
        {**GAE, "group_size": 1, "critic": {}},
        {"credit": "turn", "normalize_advantages": "batch"},
        {"loss": "gmpo", "clip_low": 1.5, "epochs": 2},
        {"aggregation": "constant", "aggregation_length": 8},
        {"kl": {"estimator": "k1", "place": "reward"}, "normalize_advantages": "batch"},
        {"mini_batches": 2, "clip_high": 0.28, "dual_clip": 3.0},
        {**GAE, "epochs": 2, "critic": {"value_clip": 0.5}},
        {**GAE, "critic": {"value_clip": None}},
        {"kl": {"refresh_steps": 99}, "warmup_steps": 99},
        {"steps": 1, "epochs": 2, "warmup_steps": 1},
        {"schedule": "linear", "min_lr_ratio": 0.2, "learning_rate": 1e37},
    ],
)
def test_choices_with_effect_are_taken(given: dict[str, Any]) -> None:
    Hyperparameters(**given)


@pytest.mark.parametrize(
    ("given", "advantage", "expected"),
    [
        ({"clip_high": 0.28}, 1.0, -1.28),
        ({"clip_low": 0.1}, -1.0, 2.0),
        ({"dual_clip": 1.5}, -1.0, 1.5),
        ({"loss": "gspo", "clip_high": 0.3}, 1.0, -1.3),
        ({"loss": "gmpo", "clip_high": 0.3}, 1.0, -math.exp(0.3)),
        ({"loss": "gmpo"}, 1.0, -math.exp(0.4)),
        ({"loss": "cispo", "clip_high": 0.5}, 1.0, 1.5 * 3),
        ({"loss": "cispo"}, -1.0, -2.0 * 3),
        ({"loss": "sapo"}, 1.0, -4 / (1 + math.exp(-1))),
        ({"loss": "reinforce"}, 0.5, 0.5 * 3),
    ],
)
def test_the_loss_is_the_one_chosen_within_its_bounds(
    given: dict[str, Any], advantage: float, expected: float
) -> None:
    """Of one token, of log-probability -3, that is twice as likely as it was."""
    loss = build_objective(Hyperparameters(**given, epochs=2)).loss
    now = torch.tensor([[-3.0]], dtype=torch.float64)
    mask, sequences = torch.tensor([[True]]), torch.tensor([0])
    found, _ = loss(now, now - math.log(2), torch.full_like(now, advantage), mask, sequences)
    assert found.item() == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def start() -> list[torch.Tensor]:
    """The weights that every run below starts from."""
    model = load_policy(ModelConfig.model_validate(model_section())).model
    return [p.detach() for p in model.parameters()]


def run(path: Path, section: dict[str, Any], **sections: Any) -> Any:
    return retrain.run_sync(
        rl_config(path, environment={"type": "qa"}, algorithm=section, **sections)
    )


def saved(checkpoint: Path | None) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    return [p.detach() for p in model.parameters()]


@each_preset
def test_every_preset_trains(name: str, tmp_path: Path, start: list[torch.Tensor]) -> None:
    result = run(tmp_path, {"name": name, "hyperparameters": hyperparameters()})
    rows = metrics_of(result.path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert all(row["grad_norm"] > 0 and row["logprob_gap/max"] < 1e-4 for row in rows)
    moved = max((a - b).abs().max() for a, b in zip(saved(result.checkpoint), start, strict=True))
    assert 1e-4 < moved < 0.05
    critic = {"value_loss", "explained_variance", "critic_grad_norm"}
    assert all(critic <= row.keys() if name == "ppo" else not critic & row.keys() for row in rows)


def varied_if_even(rollout: Rollout) -> float:
    """Of what was said, for even tasks; the same for all rollouts of an odd one."""
    assert rollout.task is not None
    even = rollout.task.metadata["parity"] == "0"
    return sum(map(ord, rollout.completion)) % 97 if even else 50.0


def nothing(rollout: Rollout) -> float:
    return 1.0


def sampling(path: Path, function: str, rounds: int, **more: Any) -> Any:
    settings = hyperparameters(prompts_per_step=4, dynamic_sampling_rounds=rounds, **more)
    rewards = {"rollout_reward_configs": {"r": {"function": f"test_presets:{function}"}}}
    return run(path, {"hyperparameters": settings}, reward_setup=rewards)


def test_groups_without_variance_are_made_up_for_by_further_tasks(tmp_path: Path) -> None:
    """The others do not train even where an entropy bonus would make something of them."""
    result = sampling(tmp_path, "varied_if_even", 9, entropy_coefficient=0.01)
    steps = rollouts_of(result.path)
    for row, rollouts in zip(metrics_of(result.path), steps.values(), strict=True):
        groups: dict[str | None, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.group_id, []).append(rollout)
        assert {len(group) for group in groups.values()} == {3} and row["groups"] == len(groups)
        full = [group for group in groups.values() if len({r.reward for r in group}) > 1]
        assert len(full) == 4 < len(groups)
        assert row["groups/zero_variance"] == len(groups) - 4
        assert row["tokens/trained"] == sum(sampled_tokens(r) for group in full for r in group)
    ids = [r.id for rollouts in steps.values() for r in rollouts]
    assert len(set(ids)) == len(ids), "the second step goes on where the first one stopped"


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_rounds_are_bounded_and_a_step_may_teach_nothing(
    rounds: int, tmp_path: Path, start: list[torch.Tensor]
) -> None:
    result = sampling(tmp_path, "nothing", rounds)
    for row in metrics_of(result.path):
        assert row["groups"] == row["groups/zero_variance"] == 4 * (rounds + 1)
        assert "loss" not in row and "grad_norm" not in row
    assert all(map(torch.equal, saved(result.checkpoint), start))


def test_a_run_punishes_what_comes_near_its_own_limit(tmp_path: Path) -> None:
    """Over all 40 tokens, with weight 2: each costs 1/20."""
    settings = hyperparameters(
        steps=1, group_size=24, max_new_tokens=40,
        overlong_punishment={"buffer_share": 1.0, "weight": 2.0},
    )  # fmt: skip
    result = run(tmp_path, {"hyperparameters": settings})
    lengths = set()
    for rollout in rollouts_of(result.path)[1]:
        lengths.add(tokens := sampled_tokens(rollout))
        assert rollout.reward == pytest.approx(digits(rollout) - tokens / 20, abs=1e-6)
    assert max(lengths) == 40 and min(lengths) < 20


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(tmp_path: Path) -> None:
    """The first of two updates breaks the weights."""
    settings = hyperparameters(epochs=2, learning_rate=1e35)
    with pytest.raises(UserError, match=r"rl step 1: the .* is (nan|inf) after 1 updates") as stop:
        run(tmp_path, {"hyperparameters": settings}, model=model_section("gpt2"))
    (path,) = tmp_path.glob("t-001/not_finite/rl-000001.jsonl.gz")
    assert str(path) in stop.value.cause
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert rows and {row["rollout_id"].split("/")[-1] for row in rows} <= {"0", "1", "2"}
    for row in rows:
        columns = ("loss_mask", "behavior_logprobs", "old_logprobs", "advantages", "turns")
        assert {len(row[name]) for name in columns} == {len(row["token_ids"])}
        assert any(row["advantages"]) and sum(row["loss_mask"]) > 0
    assert not (tmp_path / "t-001" / "checkpoints").exists()
