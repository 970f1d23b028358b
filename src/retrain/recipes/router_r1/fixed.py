"""What always asking the same expert comes to: measured in the environment that the policy acts in,
and compared on one scale of costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrain.envs import Environment
from retrain.recipes.router_r1.reward import (
    gold_answers,
    response_text,
    rollout_cost,
    router_reward,
)
from retrain.recipes.router_r1.toy import NAMES, UNKNOWN, hops, query_of
from retrain.rendering import ToolFormat, ToolSchema
from retrain.types import Message, MessageType, Rollout, Task


class FixedChoice:
    """A policy that keeps to the protocol and asks one expert, whatever the question."""

    def __init__(self, expert: str, tool_format: ToolFormat) -> None:
        self._expert = expert
        self._format = tool_format

    def start(self, task: Task) -> Rollout:
        return Rollout(task=task)

    async def act(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Message:
        text = self._words(rollout)
        said = Message(text, MessageType.MODEL, tool_calls=self._format.parse(text, tools))
        rollout.add_messages(said)
        return said

    def _words(self, rollout: Rollout) -> str:
        assert rollout.task is not None
        told = [m.content for m in rollout.messages if m.type is MessageType.TOOL]
        to_ask = hops(rollout.task.metadata["kind"])
        if len(told) == len(to_ask) or UNKNOWN in told:
            return f"<answer>{told[-1]}</answer>"
        kind = to_ask[len(told)]
        subject = told[-1] if told else rollout.task.metadata["subject"]
        query = query_of(kind, subject)
        return f"<think>{kind}</think><search>{self._expert}:{query}</search>"


async def fixed_choices(
    environment: Environment, tool_format: ToolFormat, tasks: Sequence[Task]
) -> dict[str, list[Rollout]]:
    """Each expert's rollouts on all tasks, by name; the environment is closed at the end."""
    rollouts: dict[str, list[Rollout]] = {name: [] for name in NAMES}
    try:
        for name, its in rollouts.items():
            for task in tasks:
                made = await environment.spawn().run(task, FixedChoice(name, tool_format))
                its.extend(made if isinstance(made, list) else [made])
    finally:
        await environment.close()
    return rollouts


@dataclass(frozen=True)
class Outcome:
    """What a policy came to."""

    name: str
    success: float
    """Share of right answers."""
    cost: float
    """Of a rollout, in the mean."""
    calls: Mapping[str, float]
    """Of each expert, in a rollout, in the mean."""
    worth: Mapping[float, float]
    """By alpha: the reward in the mean, with costs compared to `scale`."""


def outcome(
    name: str, rollouts: Sequence[Rollout], scale: Sequence[float], alphas: Sequence[float]
) -> Outcome:
    """
    Args:
        scale: costs that every policy's are compared with; training compares with a window that
            moves, in which two policies cannot be compared.
    """
    n = len(rollouts)
    scores = {
        alpha: [
            router_reward(
                response_text(rollout),
                gold_answers(rollout),
                rollout_cost(rollout),
                alpha=alpha,
                history=scale,
                models=NAMES,
                window=len(scale) + 1,
            )
            for rollout in rollouts
        ]
        for alpha in (0.0, *alphas)
    }
    return Outcome(
        name,
        success=sum(score.em for score in scores[0.0]) / n,
        cost=sum(map(rollout_cost, rollouts)) / n,
        calls={e: sum(r.metrics.get(f"pool/calls/{e}", 0.0) for r in rollouts) / n for e in NAMES},
        worth={alpha: sum(score.reward for score in scores[alpha]) / n for alpha in alphas},
    )


def table(outcomes: Sequence[Outcome], alphas: Sequence[float]) -> str:
    """The outcomes as a Markdown table."""
    head = ["policy", "success", "cost", *(f"{e} calls" for e in NAMES)]
    head += [f"worth at α = {alpha:g}" for alpha in alphas]
    rows = [
        [one.name, f"{one.success:.3f}", f"{one.cost:.1f}"]
        + [f"{one.calls[e]:.2f}" for e in NAMES]
        + [f"{one.worth[alpha]:.3f}" for alpha in alphas]
        for one in outcomes
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
