"""`algorithm`: how rewards become gradients."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    field_validator,
    model_validator,
)

from retrain.config.base import Section
from retrain.config.presets import PRESETS, fitting, overlaid
from retrain.config.terms import CorrectionConfig, KLConfig, OverlongConfig

CLIPPED_LOSSES = {
    "ppo_clip": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (None, 4.0),
    "gmpo": (0.4, 0.4),
}
"""Losses that have clip bounds, and what (clip_low, clip_high) are where the config is silent."""

BOUNDED_BELOW = ("ppo_clip", "gspo", "cispo")
"""Losses that hold the ratio above 1 - clip_low; that of `gmpo` is held above exp(-clip_low)."""

TOKEN_ADVANTAGES = ("gae", "reinforce_plus_plus")
"""Estimators that give every token its own advantage, from discounted later rewards."""


def _fits_a_float(rate: float) -> float:
    if rate <= 1e37:
        return rate
    raise ValueError(f"{rate:g} is more than a 32-bit float can hold; 1e-5 is usual")


LearningRate = Annotated[float, AfterValidator(_fits_a_float)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimization(Section):
    """What every training stage has: optimizer, schedule, clipping, micro-batches."""

    learning_rate: LearningRate = Field(1e-5, gt=0)
    """The highest one, after warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the matrices inside the layers, AdamW on the rest."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate, after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises from 0; fewer than there are."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where linear and cosine schedules end, as a share of the learning rate."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null leaves them alone."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most tokens of one forward pass; gradients accumulate over as many as it takes."""
    share_prefixes: bool = True
    """Pack sequences: lay them end to end instead of padding them, and compute what they share from
    the start (a group's prompt, a system prompt) once; exact. Off, or where the architecture does
    not allow it, sequences are padded and count as such."""

    @model_validator(mode="after")
    def _schedule_ends(self) -> Self:
        if self.schedule == "constant" and self.changed("min_lr_ratio"):
            raise ValueError(
                f"min_lr_ratio {self.min_lr_ratio:g} does nothing with schedule: constant, which "
                "never falls; remove it, or use schedule: linear or cosine"
            )
        return self

    def _refuse_long_warmup(self, updates: int) -> None:
        if self.warmup_steps >= updates:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but there are {updates} updates: nothing "
                "would be learned at the learning_rate given, and schedule would do nothing; "
                "lower warmup_steps, or raise steps"
            )


class CriticConfig(Section):
    """A value head, for `advantage: gae`."""

    backbone: Literal["own", "shared"] = "own"
    """`own`: a copy of the policy of its own. `shared`: the head sits on the policy's hidden
    states, and the value loss trains those too."""
    learning_rate: LearningRate | None = Field(None, gt=0)
    """Of the critic, or of the head on a shared backbone; by default the policy's."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Of generalised advantage estimation: 1 trusts returns, 0 trusts values."""
    value_clip: float | None = Field(0.2, gt=0)
    """New values count up to this far from the old ones; null does not clip. Acts where a step has
    several updates."""
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
    """How far the probability ratio counts below 1; by default as the loss's paper has it. The
    ratio is 1 until a step's second update, so bounds need epochs x mini_batches above 1."""
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
    max_staleness: int = Field(0, ge=0)
    """Most steps between the oldest weights that sampled a token of a rollout and the policy that
    learns from it. 0 is strictly on-policy. Above, rollouts are sampled while the learner works,
    and `correction` is required."""
    correction: CorrectionConfig | None = None
    """Null: the engine is taken to sample from exactly what the learner computes."""
    critic: CriticConfig | None = None
    """Required by `advantage: gae`, refused elsewhere."""
    train_truncated: bool = True
    """Off (DAPO's overlong filtering): rollouts cut by a token budget or the context limit do not
    train; they still count in their group's baseline."""
    train_turns: Literal["all", "last"] = "all"
    """`all`: what was sampled in every turn of a rollout trains, tool calls included. `last`: that
    of its last turn only, so that no call to a tool learns from what it led to."""
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
        unfit = self._unfit_for_the_advantage() + self._unfit_for_the_update()
        for reason in (r for refused, r in unfit + self._unfit_for_one_update() if refused):
            raise ValueError(reason)
        self._refuse_long_warmup(self.steps * self.updates)
        return self

    @property
    def updates(self) -> int:
        """In a step."""
        return self.epochs * self.mini_batches

    def _unfit_for_the_advantage(self) -> list[tuple[bool, str]]:
        by_token = self.advantage in TOKEN_ADVANTAGES
        return [
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
            (
                (self.clip_low or 0) >= 1 and self.loss in BOUNDED_BELOW,
                f"clip_low {self.clip_low} does nothing for loss {self.loss}: the ratio is above "
                f"0, so a bound at 1 - clip_low never acts; give less than 1",
            ),
            (
                self.kl is not None and (self.kl.refresh_steps or 0) >= self.steps,
                f"kl.refresh_steps does nothing: the reference would first be renewed after the "
                f"last of {self.steps} steps; lower it, or remove it",
            ),
            (
                self.max_staleness > 0 and self.correction is None,
                f"max_staleness {self.max_staleness} learns from what older weights sampled, and "
                "nothing corrects for that; add `correction: {kind: tis}` beside it",
            ),
            (
                self.max_staleness >= self.steps,
                f"max_staleness {self.max_staleness} is never reached in {self.steps} steps; "
                "lower it, or raise steps",
            ),
        ]

    def _unfit_for_one_update(self) -> list[tuple[bool, str]]:
        """What holds a step's later updates back, where it has one only."""
        keys = self.changed("clip_low", "clip_high", "dual_clip")
        if self.critic is not None and self.critic.value_clip is not None:
            keys += [f"critic.{key}" for key in self.critic.changed("value_clip")]
        reason = (
            "does nothing in a step's first update, and epochs: 1 with mini_batches: 1 makes no "
            "other; raise one of them, or remove it (null where a section above sets it)"
        )
        return [(self.updates == 1, f"{key} {reason}") for key in keys]

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

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in_the_preset(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What the preset fills in does not count as set."""
        if not isinstance(data, dict):
            return handler(data)
        preset = PRESETS.get(str(data.get("name", "grpo")))
        given = data.get("hyperparameters", {})
        if preset is None or not isinstance(given, dict):
            return handler(data)
        filled = overlaid(fitting(preset, given), given)
        section = handler({**data, "hyperparameters": filled})
        section.hyperparameters.model_fields_set.intersection_update(given)
        return section

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
        """The section as JSON: what was given, and what differs from what its preset says.

        Where every key is set, as in a config that was written down whole, what was given is no
        longer known, and only the difference counts.
        """
        choices = self.model_dump(mode="json")
        values = choices["hyperparameters"]
        said = type(self).model_validate({"name": self.name}).model_dump(mode="json")
        preset, fields = PRESETS[self.name], Hyperparameters.model_fields
        unfit = preset.keys() - fitting(preset, values).keys()
        said = said["hyperparameters"] | {key: fields[key].default for key in unfit}
        given = self.hyperparameters.model_fields_set
        known = given if len(given) < len(fields) else set()
        choices["hyperparameters"] = {
            key: value for key, value in values.items() if key in known or value != said[key]
        }
        return choices
