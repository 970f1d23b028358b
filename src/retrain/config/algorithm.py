"""`algorithm`: how rewards become gradients."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section
from retrain.config.presets import PRESETS

CLIPPED_LOSSES = {
    "ppo_clip": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (None, 4.0),
    "gmpo": (0.4, 0.4),
}
"""Losses that have clip bounds, and what (clip_low, clip_high) are where the config is silent."""

TOKEN_ADVANTAGES = ("gae", "reinforce_plus_plus")
"""Estimators that give every token its own advantage, from discounted later rewards."""


class Optimization(Section):
    """What every training stage has: optimizer, schedule, clipping, micro-batches."""

    learning_rate: float = Field(1e-5, gt=0)
    """The highest one, after warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the matrices inside the layers, AdamW on the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where linear and cosine schedules end, as a share of the learning rate."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null leaves them alone."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most tokens of one forward pass; gradients accumulate over as many as it takes."""
    share_prefixes: bool = True
    """Compute what sequences share from the start (a group's prompt, a system prompt) once; exact.
    Off, or where the architecture does not allow it, sequences are padded and count as such."""


class KLConfig(Section):
    """A penalty on leaving the reference: the policy as it was when the stage began."""

    coefficient: float = Field(0.001, gt=0)
    """Its weight."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of log p(token) - log p_ref(token), as Schulman names them. `k1` has no gradient of its own
    worth having, so it serves as a reward only."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: added to each token's loss. `reward`: taken off the rewards, before advantages."""
    refresh_steps: int | None = Field(None, ge=1)
    """The reference becomes the present policy every so many steps; by default never."""

    @model_validator(mode="after")
    def _k1_is_no_loss(self) -> KLConfig:
        if self.estimator == "k1" and self.place == "loss":
            raise ValueError(
                "kl.estimator k1 in the loss has an expected gradient of zero; "
                "use k2 or k3, or place: reward"
            )
        return self


class CorrectionConfig(Section):
    """Importance weights for what the engine sampled from, which is not quite the learner."""

    kind: Literal["tis", "mis"] = "tis"
    """`tis`: ratios are cut at the cap. `mis`: what exceeds the cap does not train."""
    level: Literal["token", "sequence"] = "token"
    """A ratio for each token, or their product over the rollout."""
    cap: float = Field(2.0, gt=1)
    """Of the ratio learner / engine."""


class OverlongConfig(Section):
    """DAPO's soft punishment of turns that come near `max_new_tokens`."""

    buffer_share: float = Field(0.2, gt=0, le=1)
    """Of `max_new_tokens`: over this last part the punishment grows from 0 to 1."""
    weight: float = Field(1.0, gt=0)
    """What the whole punishment takes off the reward."""


class CriticConfig(Section):
    """A value head, for `advantage: gae`."""

    backbone: Literal["own", "shared"] = "own"
    """`own`: a copy of the policy of its own. `shared`: the head sits on the policy's hidden
    states, and the value loss trains those too."""
    learning_rate: float | None = Field(None, gt=0)
    """Of the critic, or of the head on a shared backbone; by default the policy's."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Of generalised advantage estimation: 1 trusts returns, 0 trusts values."""
    value_clip: float | None = Field(0.2, gt=0)
    """New values count up to this far from the old ones; null does not clip."""
    loss_coefficient: float = Field(0.5, gt=0)
    """Weight of the value loss."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, in which the critic learns and the policy does not."""
    from_checkpoint: str | None = None
    """A checkpoint directory of a PPO stage whose critic to go on from."""


class Hyperparameters(Optimization):
    """What the algorithm's name stands for, choice by choice; the defaults are those of `grpo`."""

    steps: int = Field(100, ge=1)
    """Of sampling and learning."""
    prompts_per_step: int = Field(16, ge=1)
    """Tasks drawn in a step; each makes one group."""
    group_size: int = Field(8, ge=1)
    """Rollouts of one task, compared with each other."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Further rounds of sampling in a step, for as many groups as turned out to have no variance;
    0 learns from what there is."""
    epochs: int = Field(1, ge=1)
    """Passes over each step's rollouts."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps in each pass; every one takes its share of the groups."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; the learner divides its logits by it too."""
    max_new_tokens: int = Field(256, ge=1)
    """Of one MODEL turn."""
    advantage: Literal["grpo", "rloo", "opo", "reinforce_plus_plus", "gae"] = "grpo"
    """Reward minus: `grpo` the group's mean, `rloo` the mean of the others, `opo` the mean weighted
    by length, `gae` the critic's values; `reinforce_plus_plus` takes nothing off."""
    normalize_advantages: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group's rewards; or whiten over all trained tokens of
    the batch; or leave as they are."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount from token to token, for `gae` and `reinforce_plus_plus`."""
    credit: Literal["rollout", "turn"] = "rollout"
    """`rollout`: one advantage for all its tokens. `turn`: each turn has that of its own and later
    rewards, normalised over all turns of the group."""
    loss: Literal["ppo_clip", "gspo", "cispo", "gmpo", "sapo", "reinforce"] = "ppo_clip"
    """Of the policy."""
    clip_low: float | None = Field(None, gt=0)
    """How far the probability ratio counts below 1; by default as the loss's paper has it."""
    clip_high: float | None = Field(None, gt=0)
    """How far it counts above 1."""
    dual_clip: float | None = Field(None, gt=1)
    """Of `ppo_clip`: bounds the loss of negative advantages at this many times the advantage; 3 is
    usual."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = (
        "sequence_mean"
    )
    """`token_mean`: every token of the batch weighs the same. `sequence_mean`: every rollout does.
    `sequence_sum`: the mean over rollouts of their tokens' sum. `constant`: that sum divided by
    `aggregation_length`."""
    aggregation_length: int | None = Field(None, ge=1)
    """Tokens that `constant` divides by; by default max_new_tokens."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of a bonus for the entropy of the policy at each trained token."""
    kl: KLConfig | None = None
    """Null: no reference model is kept."""
    correction: CorrectionConfig | None = None
    """Null: the engine is taken to sample from exactly what the learner computes."""
    critic: CriticConfig | None = None
    """Required by `advantage: gae`, refused elsewhere."""
    train_truncated: bool = True
    """Off (DAPO's overlong filtering): rollouts cut by a token budget or the context limit do not
    train; they still count in their group's baseline."""
    overlong_punishment: OverlongConfig | None = None
    """Null: a turn's length costs nothing."""

    @model_validator(mode="before")
    @classmethod
    def _no_truncated_sampling(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in ("top_p", "top_k"):
                if key in data:
                    raise ValueError(
                        f"{key} is refused for training: it makes the engine sample from a "
                        "truncated distribution that the learner cannot reproduce; "
                        f"use {key} in evaluation.modes"
                    )
        return data

    @model_validator(mode="after")
    def _every_choice_acts(self) -> Hyperparameters:
        for refused, reason in (*self._unfit_for_the_advantage(), *self._unfit_for_the_update()):
            if refused:
                raise ValueError(reason)
        return self

    def _unfit_for_the_advantage(self) -> list[tuple[bool, str]]:
        by_token = self.advantage in TOKEN_ADVANTAGES
        return [
            (
                self.group_size == 1 and not by_token,
                f"group_size 1 gives every rollout an advantage of zero under {self.advantage}; "
                "use at least 2, better 8",
            ),
            (
                by_token and self.normalize_advantages == "group",
                f"normalize_advantages: group has no meaning for {self.advantage}, which compares "
                "no groups; use batch or none",
            ),
            (
                self.gamma != 1 and not by_token,
                f"gamma does nothing for {self.advantage}: it is for {', '.join(TOKEN_ADVANTAGES)}",
            ),
            (
                self.credit == "turn" and self.advantage != "grpo",
                f"credit: turn is for advantage grpo, not {self.advantage}"
                + ("; it has the rewards of turns where they were given" if by_token else ""),
            ),
            (
                (self.critic is None) == (self.advantage == "gae"),
                "advantage: gae needs a critic, `critic: {}` for its defaults"
                if self.critic is None
                else f"critic does nothing for advantage {self.advantage}: it is for gae "
                "(critic: null where a section above sets it)",
            ),
            (
                self.dynamic_sampling_rounds > 0 and by_token,
                f"dynamic_sampling_rounds does nothing for {self.advantage}: a group without "
                "variance teaches it too",
            ),
            (
                self.kl is not None
                and self.kl.place == "reward"
                and self.normalize_advantages == "group",
                "kl.place: reward with normalize_advantages: group makes the penalty as large as a "
                "reward where a group's rewards are equal; use batch or none, or place: loss",
            ),
        ]

    def _unfit_for_the_update(self) -> list[tuple[bool, str]]:
        clips = self.clip_low is not None or self.clip_high is not None
        return [
            (
                self.critic is not None and self.critic.warmup_steps >= self.steps,
                "critic.warmup_steps takes all the steps: the policy would never learn",
            ),
            (
                self.mini_batches > self.prompts_per_step,
                f"mini_batches is {self.mini_batches}, but a step has {self.prompts_per_step} "
                "groups to deal out",
            ),
            (
                clips and self.loss not in CLIPPED_LOSSES,
                f"clip_low and clip_high do nothing for loss {self.loss}",
            ),
            (
                self.dual_clip is not None and self.loss != "ppo_clip",
                f"dual_clip does nothing for loss {self.loss}: it is for ppo_clip",
            ),
            (
                self.aggregation_length is not None and self.aggregation != "constant",
                f"aggregation_length does nothing for {self.aggregation}: it is for constant",
            ),
        ]

    @property
    def clip(self) -> tuple[float | None, float | None]:
        """(clip_low, clip_high) of the loss, its own defaults filled in."""
        low, high = CLIPPED_LOSSES.get(self.loss, (None, None))
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )


class AlgorithmConfig(Section):
    name: str = "grpo"
    """A preset: `grpo`, `dr_grpo`, `dapo`, `gspo`, `cispo`, `rloo`, `reinforce_plus_plus`, `ppo`.
    It sets hyperparameters that the file leaves out, and nothing else; `retrain check` prints
    them."""
    backend: str = "torch"
    """`torch`; no other is built."""
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    """Of the algorithm, and of its optimizer."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        preset = PRESETS.get(str(data.get("name", "grpo")))
        given = data.get("hyperparameters", {})
        if preset is None or not isinstance(given, dict):
            return data
        return {**data, "hyperparameters": _overlaid(_fitting(preset, given), given)}

    @field_validator("name")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in PRESETS:
            close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"algorithm {name!r} is not built; there are: {', '.join(PRESETS)}{hint}"
            )
        return name

    @field_validator("backend")
    @classmethod
    def _built_backend(cls, backend: str) -> str:
        if backend != "torch":
            raise ValueError(f"backend {backend!r} is not built; the one there is: torch")
        return backend

    def choices(self) -> dict[str, Any]:
        """The section as JSON, less what its preset says already."""
        given = self.model_dump(mode="json")
        preset = type(self).model_validate({"name": self.name}).model_dump(mode="json")
        given["hyperparameters"] = {
            key: value
            for key, value in given["hyperparameters"].items()
            if value != preset["hyperparameters"][key]
        }
        return given


def _fitting(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is left of a preset where the file takes another loss or advantage than it."""
    left = dict(preset)
    if given.get("loss", preset.get("loss", "ppo_clip")) != preset.get("loss", "ppo_clip"):
        for key in ("clip_low", "clip_high", "dual_clip"):
            left.pop(key, None)
    if given.get("advantage", preset.get("advantage", "grpo")) != preset.get("advantage", "grpo"):
        for key in ("critic", "dynamic_sampling_rounds"):
            left.pop(key, None)
    return left


def _overlaid(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Given keys over the preset's, also within the small sections that both set."""
    both = {
        key: {**preset[key], **value}
        for key, value in given.items()
        if isinstance(value, dict) and isinstance(preset.get(key), dict)
    }
    return {**preset, **given, **both}
