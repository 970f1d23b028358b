"""The learner: forward, backward, step. It knows per-token losses, not algorithms."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrain.algorithms import Aggregation
from retrain.learner.batch import Batch, micro_batches
from retrain.learner.optim import OptimizerName, Schedule, make_optimizers
from retrain.models.forward import selected_logprobs
from retrain.types import Sample, UserError

PerTokenLoss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(log-probabilities [B, T], batch) -> per-token loss [B, T] and metrics that are sums."""


class TorchLearner:
    """Trains the model it shares with the engine, in place.

    Args:
        model: any causal LM of transformers, PEFT-wrapped or not; only parameters that require
            a gradient are given to the optimizer.
        temperature: of sampling; the learner's log-probabilities are those of the distribution
            that the engine samples from.
        max_grad_norm: gradients are clipped to this global norm; None leaves them.
        micro_batch_tokens: most padded tokens of one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        optimizer: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.learning_rate = learning_rate
        self.schedule = schedule or Schedule()
        self.updates = 0
        self._checkpointing = any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        )
        self.optimizers = make_optimizers(
            model.named_parameters(),
            name=optimizer,
            learning_rate=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
        )
        if not self.optimizers:
            raise UserError("the model has no parameter that trains")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward_backward(
        self,
        samples: Sequence[Sample],
        per_token_loss: PerTokenLoss,
        aggregation: Aggregation = "token_mean",
    ) -> dict[str, float]:
        """Accumulate the gradient of `(per_token * weights).sum()` over all samples.

        Returns the loss and what `per_token_loss` counted, over the whole batch, with `tokens`,
        the tokens that trained, and `gap_max` and `gap_mean`, how far the learner's
        log-probabilities are from the engine's.

        Raises:
            UserError: the loss is not finite.
        """
        totals: dict[str, float] = {"loss": 0.0, "tokens": 0.0}
        gap_max, gap_sum = 0.0, 0.0
        self._set_mode()
        for chosen, batch in self._micro_batches(samples, aggregation):
            logprobs = self._logprobs(batch)
            per_token, counts = per_token_loss(logprobs, batch)
            loss = (per_token * batch.weights).sum()
            if not bool(torch.isfinite(loss)):
                ids = ", ".join(sorted({samples[i].rollout_id for i in chosen})[:5])
                raise UserError(
                    f"the loss is {loss.item()} after {self.updates} updates (rollouts {ids})",
                    "Lower the learning rate, or look at those rollouts in the run directory.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            totals["loss"] += loss.item()
            totals["tokens"] += batch.num_trained
            for name, value in counts.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            gap = ((logprobs.detach() - batch.behavior_logprobs).abs() * batch.mask).float()
            gap_max = max(gap_max, float(gap.max()))
            gap_sum += float(gap.sum())
        totals["gap_max"] = gap_max
        totals["gap_mean"] = gap_sum / max(totals["tokens"], 1.0)
        return totals

    def optim_step(self) -> dict[str, float]:
        """Clip, step, clear. Returns the gradient's norm before clipping and the learning rate."""
        parameters = [p for group in self._groups() for p in group["params"]]
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient norm is {norm} after {self.updates} updates",
                "Lower the learning rate.",
            )
        rate = self.learning_rate * self.schedule.factor(self.updates)
        for group in self._groups():
            group["lr"] = rate
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return {"grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def attach_old_logprobs(self, samples: Sequence[Sample]) -> None:
        """Keep the learner's log-probabilities on each sample, for the ratio of later updates."""
        self._set_mode()
        for chosen, batch in self._micro_batches(samples, "token_mean"):
            rows = self._logprobs(batch).double().cpu()
            for row, index in enumerate(chosen):
                length = len(samples[index])
                samples[index].old_logprobs = array("d", rows[row, :length].tolist())

    def _set_mode(self) -> None:
        """Training mode is what switches gradient checkpointing on; nothing else needs it."""
        self.model.train(self._checkpointing)

    def _micro_batches(
        self, samples: Sequence[Sample], aggregation: Aggregation
    ) -> Iterator[tuple[list[int], Batch]]:
        return micro_batches(
            samples,
            token_budget=self.micro_batch_tokens,
            aggregation=aggregation,
            device=self.device,
        )

    def _logprobs(self, batch: Batch) -> Tensor:
        return selected_logprobs(
            self.model, batch.token_ids, batch.lengths, batch.mask, self.temperature
        )

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups
