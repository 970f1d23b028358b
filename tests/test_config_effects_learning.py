"""What a key of `algorithm.hyperparameters` changes of the weights that a few updates lead to.

That each formula is the right one, other tests show; here every key must arrive.
"""

from __future__ import annotations

import copy
import functools
import json
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from retrain.config.algorithm import CLIPPED_LOSSES, Hyperparameters, Optimization
from retrain.config.stages import SFTConfig
from retrain.loops.build import build_learner
from retrain.loops.update import PolicyUpdate, build_update
from retrain.models import Policy
from retrain.types import Rollout
from test_learner import exact
from test_update import shaken, three_groups, unheard
from tiny import tiny_qwen3

STEPS = 3
PLUS = {"advantage": "reinforce_plus_plus", "normalize_advantages": "batch"}
GAE = {"advantage": "gae", "normalize_advantages": "batch", "critic": {}}
SHARED = GAE | {"critic": {"backbone": "shared"}}
SEVERAL = {"epochs": 4, "learning_rate": 0.02}
BOUNDS = {"ppo_clip": 1e-5, "gspo": 0.5, "cispo": 1e-5, "gmpo": 1e-5}
"""Far from the default of each loss."""


def groups() -> list[list[Rollout]]:
    """With log-probabilities of an engine that is far off, and one rollout that was cut."""
    found = three_groups()
    for rollout in (rollout for group in found for rollout in group):
        rollout.step_rewards = [0.5, rollout.reward - 0.5]
        for segment in rollout.segments:
            segment.logprobs = array("f", [-6.0 + 0.1 * i for i in range(len(segment.logprobs))])
    found[0][0].stop_reason = "length"
    return found


def update_of(settings: dict[str, Any]) -> PolicyUpdate:
    chosen = Hyperparameters(**{"learning_rate": 0.01, "steps": STEPS, **settings})
    update = build_update(chosen, Policy(exact(tiny_qwen3), None), seed=0)
    if update.learner.critic is not None:
        shaken(update.learner.critic.head, 0.3)
    return update


@functools.cache
def trained(settings: str) -> Tensor:
    """All weights, the critic's too, after `STEPS` steps with the settings, which are JSON."""
    update = update_of(json.loads(settings))
    for step in range(1, STEPS + 1):
        update.learn(update.samples(groups()), step, unheard)
    modules = [update.learner.model, *filter(None, [update.learner.critic])]
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def changed(settings: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    *sections, last = key.split(".")
    node = settings
    for section in sections:
        node = node[section]
    node[last] = value
    return settings


@pytest.mark.parametrize(
    ("key", "settings", "value"),
    [
        ("learning_rate", {}, 0.02),
        ("optimizer", {}, "muon"),
        ("betas", {}, [0.5, 0.9]),
        ("weight_decay", {}, 0.1),
        ("schedule", {}, "linear"),
        ("schedule", {}, "cosine"),
        ("warmup_steps", {}, 2),
        ("min_lr_ratio", {"schedule": "linear"}, 0.5),
        ("max_grad_norm", {}, 1e-3),
        ("epochs", {}, 2),
        ("mini_batches", {}, 2),
        ("temperature", {}, 0.5),
        *(("advantage", {}, name) for name in ("rloo", "opo")),
        ("advantage", PLUS | {"advantage": "grpo"}, "reinforce_plus_plus"),
        *(("normalize_advantages", {}, name) for name in ("batch", "none")),
        ("gamma", PLUS, 0.9),
        ("gamma", GAE, 0.9),
        ("credit", {}, "turn"),
        *(("loss", SEVERAL, name) for name in ("gspo", "cispo", "gmpo", "sapo", "reinforce")),
        *(("clip_low", SEVERAL | {"loss": loss}, bound) for loss, bound in BOUNDS.items()),
        *(("clip_high", SEVERAL | {"loss": loss}, bound) for loss, bound in BOUNDS.items()),
        ("dual_clip", SEVERAL, 1.001),
        *(("aggregation", {}, name) for name in ("token_mean", "sequence_sum", "constant")),
        ("aggregation_length", {"aggregation": "constant"}, 3),
        ("entropy_coefficient", {}, 0.1),
        ("kl", {}, {"coefficient": 1.0}),
        ("kl.coefficient", {"kl": {"coefficient": 1.0}}, 2.0),
        ("kl.estimator", {"kl": {"coefficient": 1.0}}, "k2"),
        ("kl.place", {"kl": {"coefficient": 1.0}, "normalize_advantages": "none"}, "reward"),
        ("kl.refresh_steps", {"kl": {"coefficient": 1.0}}, 1),
        ("correction", {}, {}),
        ("correction.kind", {"correction": {}}, "mis"),
        ("correction.level", {"correction": {"cap": 20}}, "sequence"),
        ("correction.cap", {"correction": {}}, 4.0),
        ("critic.backbone", GAE, "shared"),
        ("critic.learning_rate", GAE, 0.1),
        ("critic.gae_lambda", GAE, 0.5),
        ("critic.value_clip", GAE | SEVERAL, None),
        ("critic.value_clip", GAE | SEVERAL, 1e-3),
        ("critic.loss_coefficient", SHARED, 0.1),
        ("critic.warmup_steps", GAE, 1),
        ("train_truncated", {}, False),
        ("train_turns", {}, "last"),
    ],
)
def test_a_key_changes_the_weights(key: str, settings: dict[str, Any], value: object) -> None:
    with_it = trained(json.dumps(changed(settings, key, value)))
    without = trained(json.dumps(settings))
    assert with_it.shape != without.shape or not torch.equal(with_it, without)


def test_the_same_settings_give_the_same_weights() -> None:
    """So that what differs above does so for its key."""
    for settings in ({}, GAE | SEVERAL):
        text = json.dumps(settings)
        assert torch.equal(trained(text), trained.__wrapped__(text))


def passes(**settings: Any) -> tuple[int, int]:
    """Forward passes with gradients of an update, and the tokens that they run."""
    update = update_of(settings)
    samples = update.samples(groups())
    sizes: list[int] = []
    base = update.learner.model.get_decoder()
    base.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()) if torch.is_grad_enabled()
        else None,
        with_kwargs=True,
    )  # fmt: skip
    update.learn(samples, 1, unheard)
    return len(sizes), sum(sizes)


def test_micro_batches_are_no_larger_than_micro_batch_tokens() -> None:
    once, _ = passes()
    several, _ = passes(micro_batch_tokens=20)
    assert once == 1 and several > 3


def test_share_prefixes_runs_a_prompt_once() -> None:
    _, shared = passes()
    _, apart = passes(share_prefixes=False)
    assert shared < apart


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.02),
        ("optimizer", "muon"),
        ("betas", [0.5, 0.9]),
        ("weight_decay", 0.1),
        ("schedule", "cosine"),
        ("warmup_steps", 2),
        ("min_lr_ratio", 0.5),
        ("max_grad_norm", 1e-3),
        ("micro_batch_tokens", 20),
        ("share_prefixes", False),
    ],
)
def test_sft_has_the_same_keys_and_the_same_learner(key: str, value: object) -> None:
    def built(**settings: Any) -> dict[str, Any]:
        section = SFTConfig(dataset="a:b", **{"schedule": "linear", **settings})
        found = build_learner(section, Policy(tiny_qwen3(), None), total_updates=9)
        state = {name: value for name, value in vars(found).items() if not callable(value)}
        groups = [group for optimizer in found.optimizers for group in optimizer.param_groups]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return state | {"optimizers": settings}

    assert set(Optimization.model_fields) < set(Hyperparameters.model_fields)
    assert built() == built() != built(**{key: value})


def test_every_loss_that_clips_is_tried() -> None:
    assert list(BOUNDS) == list(CLIPPED_LOSSES)
