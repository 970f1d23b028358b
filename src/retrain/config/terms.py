"""What an algorithm may add to its loss or its rewards: parts of `algorithm.hyperparameters`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from retrain.config.base import Section


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
