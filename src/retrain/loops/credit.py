"""From rewards to an advantage for every trained token."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retrain.algorithms import (
    KLEstimator,
    gae,
    grpo,
    kl,
    opo,
    reinforce_plus_plus,
    rloo,
    soft_overlong_punishment,
    turn_credit,
    whiten,
)
from retrain.types import RewardPart, Rollout, Sample

Estimator = Literal["grpo", "rloo", "opo", "reinforce_plus_plus", "gae"]

OVERLONG = "overlong_punishment"
"""The name of its reward part."""

_BY_GROUP: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {
    "grpo": lambda rewards, lengths, std: grpo(rewards, normalize_std=std),
    "rloo": lambda rewards, lengths, std: _scaled(rloo(rewards), rewards, std),
    "opo": lambda rewards, lengths, std: _scaled(opo(rewards, lengths), rewards, std),
}


@dataclass(frozen=True)
class Credit:
    """How rewards become advantages; the keys of `algorithm.hyperparameters` by the same names."""

    advantage: Estimator = "grpo"
    normalize_advantages: Literal["group", "batch", "none"] = "group"
    per_turn: bool = False
    gamma: float = 1.0
    gae_lambda: float = 1.0
    kl_coefficient: float = 0.0
    """Of a penalty taken off the rewards; needs old and reference log-probabilities."""
    kl_estimator: KLEstimator = "k1"

    def assign(self, groups: Sequence[Sequence[Rollout]], samples: Sequence[Sample]) -> None:
        """Fill in the samples' advantages, and their returns under GAE.

        Groups hold every scored rollout, whether or not it has samples: baselines are theirs too.
        Agents of one group are compared among themselves only.
        """
        of_rollout: dict[str, list[Sample]] = {}
        for sample in samples:
            of_rollout.setdefault(sample.rollout_id, []).append(sample)
        rollouts = {rollout.id: rollout for group in groups for rollout in group}
        rows = [_Row(rollouts[key], own, self._penalties(own)) for key, own in of_rollout.items()]
        if self.advantage in _BY_GROUP:
            self._by_group(groups, rows)
        else:
            self._by_token(rows)
        if self.normalize_advantages == "batch":
            _whiten(rows)

    def _penalties(self, samples: Sequence[Sample]) -> Tensor | None:
        """[M], what each trained token of a rollout loses for leaving the reference."""
        if not self.kl_coefficient:
            return None
        logprobs = _trained(samples, "old_logprobs")
        everything = torch.ones_like(logprobs, dtype=torch.bool)
        reference = _trained(samples, "ref_logprobs")
        distance = kl(logprobs, reference, everything, estimator=self.kl_estimator)
        return self.kl_coefficient * distance

    def _by_group(self, groups: Sequence[Sequence[Rollout]], rows: Sequence[_Row]) -> None:
        by_id = {row.rollout.id: row for row in rows}
        for group in by_agent(groups):
            own = [by_id.get(rollout.id, _Row(rollout, (), None)) for rollout in group]
            if self.per_turn:
                rewards = [row.turn_rewards() for row in own]
                credits = turn_credit(rewards, normalize_std=self.normalize_advantages == "group")
                for row, values in zip(own, credits, strict=True):
                    row.set("advantages", values[row.turns()])
                continue
            values = self._scalars(group, torch.stack([row.reward() for row in own]))
            for row, value in zip(own, values, strict=True):
                row.set("advantages", value.expand(row.size))

    def _scalars(self, group: Sequence[Rollout], rewards: Tensor) -> Tensor:
        lengths = torch.tensor([sampled_tokens(rollout) for rollout in group])
        return _BY_GROUP[self.advantage](rewards, lengths, self.normalize_advantages == "group")

    def _by_token(self, rows: Sequence[_Row]) -> None:
        width = max((row.size for row in rows), default=0)
        shape = (len(rows), width)
        rewards, values = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        mask = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            rewards[number, : row.size] = row.token_rewards()
            mask[number, : row.size] = True
            if self.advantage == "gae":
                values[number, : row.size] = _trained(row.samples, "values")
        if self.advantage == "gae":
            advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.gae_lambda)
            for number, row in enumerate(rows):
                row.set("returns", returns[number, : row.size])
        else:
            advantages = reinforce_plus_plus(rewards, mask, gamma=self.gamma)
        for number, row in enumerate(rows):
            row.set("advantages", advantages[number, : row.size])


@dataclass(frozen=True)
class _Row:
    """One rollout's trained tokens, over all its samples, as one sequence of M."""

    rollout: Rollout
    samples: Sequence[Sample]
    penalties: Tensor | None

    @property
    def size(self) -> int:
        return sum(sum(sample.loss_mask) for sample in self.samples)

    def turns(self) -> Tensor:
        """[M], which turn each token belongs to."""
        return _trained(self.samples, "turns").long()

    def reward(self) -> Tensor:
        """The whole rollout's, less the penalties."""
        reward = torch.tensor(self.rollout.reward, dtype=torch.float64)
        return reward if self.penalties is None else reward - self.penalties.sum()

    def turn_rewards(self) -> Tensor:
        """[S], less the penalties of each turn's tokens."""
        rewards = _tensor(self.rollout.step_rewards)
        if self.penalties is None:
            return rewards
        return rewards.index_add(0, self.turns(), -self.penalties)

    def token_rewards(self) -> Tensor:
        """[M]: each turn's reward at its last token (or the last before it that there is)."""
        turns = self.turns()
        rewards = torch.zeros(self.size, dtype=torch.float64)
        for turn, reward in enumerate(self.rollout.step_rewards):
            upto = (turns <= turn).nonzero()
            rewards[int(upto[-1]) if len(upto) else 0] += reward
        return rewards if self.penalties is None else rewards - self.penalties

    def set(self, column: str, values: Tensor) -> None:
        """Put [M] values at the trained tokens of a column, zeros elsewhere."""
        rest = iter(values.tolist())
        for sample in self.samples:
            setattr(
                sample,
                column,
                array("d", [next(rest) if trains else 0.0 for trains in sample.loss_mask]),
            )


def _trained(samples: Sequence[Sample], column: str) -> Tensor:
    """[M], a column at the trained tokens of several samples."""
    parts = []
    for sample in samples:
        values = getattr(sample, column)
        assert values is not None
        mask = torch.frombuffer(sample.loss_mask, dtype=torch.uint8).bool()
        parts.append(torch.tensor(values, dtype=torch.float64)[mask])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _whiten(rows: Sequence[_Row]) -> None:
    if not rows:
        return
    values = torch.cat([_trained(row.samples, "advantages") for row in rows]).unsqueeze(0)
    whitened = whiten(values, torch.ones_like(values, dtype=torch.bool))[0]
    for row, part in zip(rows, torch.split(whitened, [row.size for row in rows]), strict=True):
        row.set("advantages", part)


def _scaled(advantages: Tensor, rewards: Tensor, std: bool) -> Tensor:
    if not std or not bool(advantages.any()):
        return advantages
    return advantages / (rewards.std(unbiased=True) + 1e-6)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_agent(groups: Sequence[Sequence[Rollout]]) -> Iterator[list[Rollout]]:
    """The rollouts that are compared with each other: those of one agent, and of one group where
    an episode has groups of its own. Masked ones are with none."""
    for group in groups:
        agents: dict[tuple[str, str | None], list[Rollout]] = {}
        for rollout in group:
            if rollout.error is None:
                agents.setdefault((rollout.agent, rollout.group_id), []).append(rollout)
        yield from agents.values()


def has_variance(group: Sequence[Rollout], *, per_turn: bool = False) -> bool:
    """Whether rewards differ within some agent's rollouts of a group, overlong punishment aside."""
    for own in by_agent([group]):
        if not own[0].trainable:
            continue
        rewards = [reward for rollout in own for reward in _task_rewards(rollout, per_turn)]
        if any(reward != rewards[0] for reward in rewards):
            return True
    return False


def _task_rewards(rollout: Rollout, per_turn: bool) -> list[float]:
    rewards = list(rollout.step_rewards) if per_turn else [rollout.reward]
    for part in rollout.reward_parts:
        if part.name == OVERLONG and part.turn is not None:
            rewards[part.turn if per_turn else 0] -= part.value
    return rewards


def sampled_tokens(rollout: Rollout) -> int:
    """Tokens that the policy sampled in all its turns."""
    return sum(span.end - span.start for segment in rollout.segments for span in segment.turns)


def truncated(rollout: Rollout) -> bool:
    """Whether a token budget or the context limit cut it."""
    return rollout.stop_reason in ("length", "context")


def rollout_advantages(samples: Sequence[Sample]) -> dict[str, float]:
    """Rollout id -> mean advantage over its trained tokens; nothing where rewards do not train."""
    tokens: dict[str, list[float]] = {}
    for sample in samples:
        if sample.advantages is None or not any(sample.loss_mask):
            continue
        own = (a for a, trains in zip(sample.advantages, sample.loss_mask, strict=True) if trains)
        tokens.setdefault(sample.rollout_id, []).extend(own)
    return {rollout: statistics.fmean(values) for rollout, values in tokens.items()}


def punish_overlong(
    group: Sequence[Rollout], *, limit: int, buffer_share: float, weight: float
) -> None:
    """Take DAPO's soft punishment off each turn's reward, by the tokens sampled in it.

    It enters the rollout's rewards as a part of its own, `overlong_punishment`.
    """
    buffer = max(1, round(limit * buffer_share))
    for rollout in group:
        lengths = _turn_lengths(rollout)
        punishments = soft_overlong_punishment(_tensor(lengths), limit=limit, buffer=buffer)
        for turn, raw in enumerate(punishments.tolist()):
            if raw == 0 or rollout.error is not None:
                continue
            value = weight * raw
            part = RewardPart(OVERLONG, "step", turn, raw, weight, value)
            rollout.reward_parts.append(part)
            rollout.step_rewards[turn] += value
            rollout.reward += value


def _turn_lengths(rollout: Rollout) -> list[int]:
    turn_of = {m: turn for turn, m in enumerate(rollout.model_messages)}
    lengths = [0] * len(turn_of)
    for segment in rollout.segments:
        for span in segment.turns:
            lengths[turn_of[span.message]] += span.end - span.start
    return lengths
