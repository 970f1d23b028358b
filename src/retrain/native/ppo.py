"""PPO with a critic as a loss to call `backward` on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from retrain.algorithms import Aggregation, CorrectionLevel, value_loss
from retrain.learner import Batch, Critic, PolicyObjective
from retrain.loops.credit import Credit
from retrain.models.forward import splits_exactly
from retrain.models.scores import spread
from retrain.native.scoring import Rewards
from retrain.native.settings import (
    CorrectionKind,
    above_zero,
    between_0_and_1,
    clipped_loss,
    make_correction,
    make_reference,
    one_of,
)
from retrain.native.update import Pass, PolicyLossBuilder, token_means, without_dropout
from retrain.tools import Tool
from retrain.types import Rollout, TagConfig, UserError

Backbone = Literal["own", "shared"]


class PPO:
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) with generalised
    advantage estimation over MODEL tokens: values are carried across what tools wrote.

    The critic is a module; give its parameters to the optimizer too:

        ppo = PPO(model, tokenizer)
        optimizer = torch.optim.AdamW([
            {"params": model.parameters(), "lr": 1e-6},
            {"params": ppo.critic.parameters(), "lr": 1e-5},
        ])
        ppo.calculate_loss(rollouts, rewards).backward()

    What trains, epochs, memory and dropout are as in `GRPO`; the critic's values are remembered
    with the log-probabilities. No groups are compared: each rollout is judged by the critic.

    Args:
        model, tokenizer, eps, eps_high: as in `GRPO`.
        backbone: `own`: the critic has a copy of the model of its own. `shared`: its head sits
            on the policy's hidden states, and the value loss trains those too.
        gamma: discount from token to token.
        gae_lambda: 1 trusts returns, 0 trusts values.
        value_clip: new values count up to this far from the old ones; None does not clip.
        value_coefficient: weight of the value loss.
        normalize_advantages: whiten over the trained tokens of the `batch` (the call), or `none`.
        aggregation, aggregation_length, kl_coefficient, kl_estimator, reference,
            entropy_coefficient, correction, correction_level, correction_cap, temperature,
            tag_config, tools: as in `GRPO`.

    Raises:
        UserError: settings out of range, or that do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        eps: float = 0.2,
        *,
        eps_high: float | None = None,
        backbone: Backbone = "own",
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        value_clip: float | None = 0.2,
        value_coefficient: float = 0.5,
        normalize_advantages: Literal["batch", "none"] = "batch",
        aggregation: Aggregation = "token_mean",
        aggregation_length: int | None = None,
        kl_coefficient: float = 0.0,
        kl_estimator: Literal["k2", "k3"] = "k3",
        reference: nn.Module | None = None,
        entropy_coefficient: float = 0.0,
        correction: CorrectionKind | None = None,
        correction_level: CorrectionLevel = "token",
        correction_cap: float = 2.0,
        temperature: float = 1.0,
        tag_config: TagConfig | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        _check_critic(model, backbone, value_clip, value_coefficient)
        self.critic = Critic(model, own_backbone=backbone == "own")
        self._value_clip = value_clip
        self._value_coefficient = value_coefficient
        self._credit = _gae_credit(normalize_advantages, gamma, gae_lambda)
        self._builder = PolicyLossBuilder(
            model,
            tokenizer,
            objective=PolicyObjective(
                loss=clipped_loss(eps, eps_high),
                correction=make_correction(correction, correction_level, correction_cap),
                kl_estimator=kl_estimator,
                kl_coefficient=kl_coefficient,
                entropy_coefficient=entropy_coefficient,
            ),
            reference=make_reference(model, kl_coefficient, kl_estimator, reference),
            temperature=temperature,
            aggregation=aggregation,
            aggregation_length=aggregation_length,
            tag_config=tag_config,
            tools=tools,
        )
        self.metrics: dict[str, float] = {}
        """As of `GRPO`, with `policy_loss`, `value_loss` (before its coefficient), and
        `value_clipped`."""

    def calculate_loss(self, rollouts: Sequence[Rollout], rewards: Rewards) -> Tensor:
        """The policy's loss and the critic's of these rollouts, a scalar with its graph.

        Args:
            rewards: a number for each rollout, which stands at its last trained token; or a list
                for each, with a number for each of its MODEL messages.

        Raises:
            UserError: rollouts and rewards that do not fit each other, a reward that is not
                finite, a rollout without a MODEL message, or a loss that is not finite.
        """
        prepared = self._builder.prepare(rollouts, rewards, None)
        self._builder.attach(prepared, "values", self._old_values)
        self._builder.assign(self._credit, prepared)
        passed = self._builder.run(prepared, skip_zero_advantages=False)
        if passed is None:
            self.metrics = {"tokens": 0.0}
            return self._builder.nothing()
        value, counts = self._value_loss(passed)
        counts["policy_loss"] = passed.loss.detach() * passed.batch.num_trained
        self.metrics = token_means(passed, counts)
        return passed.loss + self._value_coefficient * value

    def forget(self) -> None:
        """Start a new iteration: what is remembered of every rollout is dropped."""
        self._builder.memory.forget()

    def _old_values(self, batch: Batch) -> Tensor:
        hidden = None
        if self.critic.backbone is None:
            with without_dropout(self._builder.model):
                hidden = self._builder.scores(batch).hidden
        return self._values(batch, hidden)

    def _value_loss(self, passed: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, before its coefficient, and sums over the trained tokens."""
        batch = passed.batch
        values = self._values(batch, passed.found.hidden)
        per_token, counts = value_loss(
            values, batch.values, batch.returns, batch.mask, clip=self._value_clip
        )
        counts["value_loss"] = per_token.detach().sum()
        return (per_token * batch.weights).sum().to(values.dtype), counts

    def _values(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """The critic's [B, T] of the states before the trained tokens."""
        with without_dropout(self.critic):
            found = self.critic.values(batch.token_ids, batch.mask, hidden)
        return spread(found, batch.mask)


def _check_critic(
    model: nn.Module, backbone: Backbone, value_clip: float | None, value_coefficient: float
) -> None:
    one_of("backbone", backbone, get_args(Backbone))
    above_zero("value_coefficient", value_coefficient)
    if value_clip is not None:
        above_zero("value_clip", value_clip)
    if backbone == "shared" and not splits_exactly(model):
        raise UserError(
            f"{type(model).__name__} does not give its hidden states apart from its logits",
            "Use backbone='own'.",
        )


def _gae_credit(
    normalize_advantages: Literal["batch", "none"], gamma: float, gae_lambda: float
) -> Credit:
    one_of("normalize_advantages", normalize_advantages, ("batch", "none"))
    between_0_and_1("gamma", gamma)
    between_0_and_1("gae_lambda", gae_lambda)
    return Credit(
        advantage="gae",
        normalize_advantages=normalize_advantages,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
