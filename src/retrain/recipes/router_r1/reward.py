"""Router-R1's reward: format, then the answer, then what the routed calls cost.

The values are those of the published implementation (ulab-uiuc/Router-R1, `format_reward` and
`normalize_reward` of main_ppo.py, `compute_score_em` of qa_em.py), to the last bit. It differs in
when the window moves: there, with every rollout that is scored, those of validation included; here,
between steps and by training alone, so that a reward does not depend on who was scored before.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from retrain.recipes.router_r1.names import pool_name
from retrain.rewards.base import reward, verifier
from retrain.rewards.extract import accepted_answers, squad_normalize
from retrain.types import MessageType, Rollout, UserError

Metric = Literal["em", "f1"]

WINDOW = 1000
"""Rollouts whose costs a new one is compared with."""

COST_METRIC = "pool/cost"
"""Of `Rollout.metrics`: what the routed calls of the rollout cost, summed up by the tool."""

BAD_FORMAT = -1.0

_TAGS = ("search", "answer", "think", "information")
_BLOCK = re.compile(rf"<({'|'.join(_TAGS)})>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKS = tuple(mark for tag in _TAGS for mark in (f"<{tag}>", f"</{tag}>"))
_PLACEHOLDERS = ("llm-name", "your-query")
_CLOSED = ("yes", "no", "noanswer")


@dataclass(frozen=True)
class Score:
    """What a rollout is worth, and why."""

    format: float
    """0, or -1 where the format is broken."""
    em: float
    """1 where the last answer is a gold answer, else 0, whatever the format."""
    f1: float
    """Of the last answer with the nearest gold answer, in [0, 1], whatever the format."""
    cheapness: float
    """1 where the rollout was among the cheapest of the window, 0 among the dearest."""
    reward: float


def router_reward(
    text: str,
    golds: str | Sequence[str],
    cost: float = 0.0,
    *,
    alpha: float = 0.0,
    history: Sequence[float] = (),
    metric: Metric = "em",
    models: Sequence[str] | None = None,
    window: int = WINDOW,
) -> Score:
    """Score one response, as the published implementation scores the last rollout of a stream.

    A broken format is -1 and a wrong answer 0, and neither counts the cost; else the reward is
    (1 - alpha) * score + alpha * cheapness, in [0, 1].

    Args:
        text: the whole response, with the information blocks and without the prompt.
        golds: answers that are right.
        cost: of its routed calls: completion tokens times price, summed.
        alpha: the cost coefficient, in [0, 1].
        history: costs of the rollouts before it, oldest first.
        metric: which score has to be above 0.
        models: names that may be routed to; None goes by the published implementation's rule.
        window: how many costs count, this one among them.

    Raises:
        ValueError: a cost is negative or no number.
    """
    format_score = check_format(text, models)
    answer = last_answer(text)
    accepted = [golds] if isinstance(golds, str) else list(golds)
    em = f1 = 0.0
    if answer is not None:
        em, f1 = exact_match(answer, accepted), best_f1(answer, accepted)
    cheapness = cost_score(cost, history, window=window)
    worth = em if metric == "em" else f1
    if format_score < 0:
        worth = format_score
    elif worth > 0:
        worth = worth * (1.0 - alpha) + cheapness * alpha
    return Score(format_score, em, f1, cheapness, worth)


def check_format(text: str, models: Sequence[str] | None = None) -> float:
    """0 where the response keeps to the protocol, else -1."""
    blocks = [(tag, body.strip()) for tag, body in _BLOCK.findall(text)]
    count = Counter(tag for tag, _ in blocks)
    whole = text.strip()
    kept = (
        bool(blocks)
        and all(text.count(f"<{tag}>") == text.count(f"</{tag}>") for tag in _TAGS)
        and not any(mark in body for _, body in blocks for mark in _MARKS)
        and count["answer"] == 1
        and count["think"] >= 1
        and count["search"] == count["information"]
        and whole.startswith("<think>")
        and whole.endswith("</answer>")
        and all(body not in ("", "...") for tag, body in blocks if tag == "think")
        and all(_good_search(body, models) for tag, body in blocks if tag == "search")
    )
    return 0.0 if kept else BAD_FORMAT


def _good_search(body: str, models: Sequence[str] | None) -> bool:
    """Whether it is one name, one colon, and a query that is neither empty, nor a placeholder, nor
    speaks of the model by the name it was given."""
    name, colon, query = body.partition(":")
    name, query, lowered = name.strip(), query.strip(), body.lower()
    return (
        colon != ""
        and ":" not in query
        and query != ""
        and not any(placeholder in lowered for placeholder in _PLACEHOLDERS)
        and name.lower() not in query.lower()
        and pool_name(name, models) is not None
    )


def last_answer(text: str) -> str | None:
    """What the last `<answer>` holds, None without one."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer is a gold answer once both are normalised as in SQuAD, else 0."""
    return float(any(squad_normalize(gold) == squad_normalize(answer) for gold in golds))


def best_f1(answer: str, golds: Sequence[str]) -> float:
    """Token F1 with the nearest gold answer, normalised as in SQuAD, in [0, 1].

    0 with a gold where only one side is yes, no or noanswer, and where either normalises to
    nothing (also both: the exact match is then 1).
    """
    said = squad_normalize(answer)
    return max((_f1(said, squad_normalize(gold)) for gold in golds), default=0.0)


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    said, wanted = answer.split(), gold.split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    # Not 2 * shared / (said + wanted), which is the same but for the last bit.
    return (2 * precision * recall) / (precision + recall)


def cost_score(cost: float, history: Sequence[float] = (), *, window: int = WINDOW) -> float:
    """How cheap a cost is among the last `window`, itself included: 1 - clip((√cost - p5) /
    (p95 - p5), 0, 1), with p5 and p95 the percentiles of the square roots (linear interpolation);
    0.5 where the two are closer than 1e-8.

    Raises:
        ValueError: a cost is negative or no number.
    """
    kept = history[max(0, len(history) + 1 - window) :]
    costs = np.array([*kept, cost], dtype=np.float64)
    if not bool(np.all(np.isfinite(costs) & (costs >= 0.0))):
        raise ValueError(f"a cost is a number of at least 0, got {cost!r} after {kept!r}"[:200])
    roots = np.sqrt(costs)
    low, high = np.percentile(roots, 5.0), np.percentile(roots, 95.0)
    if high - low < 1e-8:
        return 0.5
    return 1.0 - float(np.clip((roots[-1] - low) / (high - low), 0.0, 1.0))


def response_text(rollout: Rollout) -> str:
    """The response as the policy's turn holds it: its words and the information between them."""
    pieces = []
    for message in rollout.messages:
        if message.type is MessageType.MODEL:
            pieces.append(message.content)
        elif message.type is MessageType.TOOL:
            pieces.append(f"\n\n<information>{message.content}</information>\n\n")
    return "".join(pieces)


@reward(kind="rollout", range=(BAD_FORMAT, 1.0))
class RouterReward:
    """The reward with its window, for `rollout_reward_configs`.

    The window stands still within a step and moves between steps, in the order of tasks and
    samples; a checkpoint holds it. An evaluation has a reward object of its own, whose window stays
    empty: there every right answer has a cheapness of 0.5, so let `router_em` decide success and
    read costs from the rollouts' metrics.

    Example: `router: {function: "retrain.recipes.router_r1.reward:RouterReward", params: {alpha:
    0.6, models: [Qwen2.5-7B-Instruct]}}`

    Args:
        alpha, metric, models, window: as `router_reward` has them.

    Raises:
        UserError: alpha, metric or window cannot be one.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        metric: Metric = "em",
        models: Sequence[str] | None = None,
        window: int = WINDOW,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise UserError(f"RouterReward: alpha is {alpha!r}", "It is a share: from 0 to 1.")
        if metric not in ("em", "f1"):
            raise UserError(f"RouterReward: metric is {metric!r}", "There are em and f1.")
        if window < 1:
            raise UserError(f"RouterReward: window is {window!r}", "It needs 1 cost at least.")
        self._alpha = alpha
        self._metric: Metric = metric
        self._models = None if models is None else tuple(models)
        self._window = window
        self._costs: deque[float] = deque(maxlen=window)

    def __call__(self, rollout: Rollout) -> float:
        return self.score(rollout).reward

    def score(self, rollout: Rollout) -> Score:
        """All of it, without moving the window.

        Raises:
            ValueError: the task has no answer.
        """
        return router_reward(
            response_text(rollout),
            gold_answers(rollout),
            rollout_cost(rollout),
            alpha=self._alpha,
            history=list(self._costs),
            metric=self._metric,
            models=self._models,
            window=self._window,
        )

    def end_step(self, rollouts: Sequence[Rollout]) -> None:
        self._costs.extend(map(rollout_cost, rollouts))

    def state_dict(self) -> dict[str, Any]:
        return {"costs": list(self._costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._costs = deque(state["costs"], maxlen=self._window)


@reward(kind="rollout", range=(0.0, 1.0))
def router_em(rollout: Rollout) -> float:
    """1 where the last answer is right, else 0, whatever the format and the cost."""
    answer = last_answer(response_text(rollout))
    return 0.0 if answer is None else exact_match(answer, gold_answers(rollout))


@reward(kind="rollout", range=(0.0, 1.0))
def router_f1(rollout: Rollout) -> float:
    """F1 of the last answer, whatever the format and the cost."""
    answer = last_answer(response_text(rollout))
    return 0.0 if answer is None else best_f1(answer, gold_answers(rollout))


def rollout_cost(rollout: Rollout) -> float:
    """What its routed calls cost; 0 without any."""
    return rollout.metrics.get(COST_METRIC, 0.0)


def gold_answers(rollout: Rollout) -> list[str]:
    """The task's answers, one or a list.

    Raises:
        ValueError: there is none.
    """
    return [str(answer) for answer in accepted_answers(rollout)]


@verifier
def keeps_protocol(rollout: Rollout) -> bool:
    """A verifier: whether the format is kept, names read by the published implementation's rule."""
    return check_format(response_text(rollout)) == 0.0
