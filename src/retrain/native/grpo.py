"""GRPO and its kin as a loss to call `backward` on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from retrain.algorithms import Aggregation, CorrectionLevel
from retrain.learner import PolicyObjective
from retrain.loops.credit import Credit
from retrain.native.scoring import Rewards, group_labels
from retrain.native.settings import (
    CorrectionKind,
    clipped_loss,
    make_correction,
    make_reference,
    one_of,
)
from retrain.native.update import PolicyLossBuilder, token_means
from retrain.tools import Tool
from retrain.types import Rollout, TagConfig, UserError

Advantage = Literal["grpo", "rloo", "opo"]
Normalization = Literal["group", "batch", "none"]


class GRPO:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300), and what differs
    from it by a choice: Dr. GRPO, RLOO, OPO, DAPO's bounds.

    The model and the optimizer are the user's:

        grpo = GRPO(model, tokenizer, eps=0.2)
        loss = grpo.calculate_loss(rollouts, rewards)
        loss.backward()
        optimizer.step()

    **What trains** are the tokens that an engine sampled for MODEL messages. A rollout without
    any, written by hand say, is rendered, and the words of its MODEL messages train. Rollouts
    with `trainable=False` (a frozen agent's) and those with `error` set give no gradient, and
    their rewards count in no baseline. Rollouts of several agents in one group are compared
    with those of the same agent only.

    **Epochs.** The ratio of PPO's surrogate is taken to the model's log-probabilities at the
    first loss that sees a rollout, where it is exactly one. Later calls with the same rollouts
    are further epochs of the same iteration. Call `forget()` to start a new iteration with
    rollouts that were seen before; fresh ones need nothing. To cut an epoch into mini-batches, with
    an optimizer step after each, call it once on all rollouts under `torch.no_grad()` first:
    the ratio is then taken to the model before the first of them. Rollouts are told apart as
    objects: a copy is another attempt.

    **Memory.** All rollouts of a call are one graph, prompts that they share computed once.
    Where that does not fit, use `retrain.learner.TorchLearner`, which cuts micro-batches.

    Dropout takes no part, whether the model is in training mode or not.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not.
        tokenizer: its own; one without a chat template gets the plain format.
        eps: the ratio counts down to 1 - eps, and up to 1 + eps.
        eps_high: the upper bound if it is another one; DAPO has 0.28.
        advantage: reward minus, `grpo` the group's mean, `rloo` the mean of the others, `opo`
            the mean weighted by length.
        normalize_advantages: divide by the standard deviation of the `group`'s rewards, whiten
            over the trained tokens of the `batch` (the call), or `none` (Dr. GRPO).
        aggregation: `sequence_mean` (of each rollout's token mean), `token_mean`,
            `sequence_sum`, or `constant`, the sum over `aggregation_length` tokens.
        aggregation_length: for `constant`, and needed there.
        kl_coefficient: weight of a penalty on leaving `reference`.
        kl_estimator: of the penalty; k3 is GRPO's.
        reference: a frozen model; by default the policy as it is now, a copy of it or, of a
            PEFT model, the one without adapters. Only with a `kl_coefficient`.
        entropy_coefficient: weight of a bonus for the policy's entropy.
        correction: importance weights learner/engine, `tis` cut at `correction_cap`, `mis` zero
            beyond it; of each token, or of the whole rollout (`correction_level`).
        temperature: of sampling; the same as that of `ModelGenerate`.
        tag_config, tools: how hand-written tool calls and their results are rendered.

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
        advantage: Advantage = "grpo",
        normalize_advantages: Normalization = "group",
        aggregation: Aggregation = "sequence_mean",
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
        one_of("advantage", advantage, get_args(Advantage))
        one_of("normalize_advantages", normalize_advantages, get_args(Normalization))
        self._credit = Credit(advantage=advantage, normalize_advantages=normalize_advantages)
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
        """Of the last loss, means over its trained tokens: `ratio`, `clipped_low`, `clipped_high`
        (shares), `approx_kl`, `entropy`, `kl` and `correction` where they are used; `logprob_gap`,
        how far the engine's log-probabilities are from the model's (large where the rollouts are
        another model's, or the temperature another); and the number of `tokens`."""

    def calculate_loss(
        self,
        rollouts: Sequence[Rollout],
        rewards: Rewards,
        groups: Sequence[Hashable] | None = None,
    ) -> Tensor:
        """The loss of these rollouts, a scalar with its graph.

        Without anything to learn (all advantages zero, say) it is zero, and `backward` still
        works.

        Args:
            rewards: a number for each rollout; or a list for each, with a number for each of its
                MODEL messages, which gives every turn an advantage of its own.
            groups: which rollouts answer the same prompt, one label each. By default their
                `group_id`; with neither, all are one group, and a warning says so.

        Raises:
            UserError: rollouts, rewards and groups that do not fit each other, a reward that is
                not finite, a rollout without a MODEL message, or a loss that is not finite.
        """
        prepared = self._builder.prepare(rollouts, rewards, group_labels(rollouts, groups))
        if prepared.by_turn and self._credit.advantage != "grpo":
            raise UserError(
                f"advantage {self._credit.advantage} takes one reward for each rollout",
                "Use advantage='grpo' for rewards by turn.",
            )
        self._builder.assign(replace(self._credit, per_turn=prepared.by_turn), prepared)
        skip = not self._builder.objective.trains_everything
        passed = self._builder.run(prepared, skip_zero_advantages=skip)
        self.metrics = {"tokens": 0.0} if passed is None else token_means(passed)
        return self._builder.nothing() if passed is None else passed.loss

    def forget(self) -> None:
        """Start a new iteration: what is remembered of every rollout is dropped."""
        self._builder.memory.forget()
