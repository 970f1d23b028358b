"""Several agents in one conversation: they take turns, or call each other as tools.

Each keeps a rollout of its own: its own words are MODEL messages there, everybody else's are
MESSAGEs or tool results, so that each learns from what it saw and said itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from retrain.envs.base import Agent, Environment
from retrain.envs.episode import Episode, Participant, Role, opening
from retrain.rendering import ToolSchema
from retrain.rewards.failures import describe_rollout
from retrain.types import Message, Rollout, Task, UserError


class MultiAgentEnvironment(Environment):
    """Roles that take turns (`type: agents`).

    Those that nobody calls take turns in their order; what one says, the others hear. With one
    such role the episode ends with its answer; with several, after `max_turns` turns of each, when
    one says `stop_phrase`, or when one is cut short. Override `conduct` for another protocol.

    `most_agents` participants enter an episode at most, by default one of each role: a protocol
    that has several attempts of one sets it higher.

    A subclass with arguments of its own takes the roles first, and hands the rest on:
    `def __init__(self, roles, *, mine, **settings): super().__init__(roles, **settings)`.

    Args:
        roles: in the order in which they speak.
        max_turns: of each role that takes turns.
        stop_phrase: ends the episode where a turn contains it; None never does.
    """

    def __init__(
        self, roles: Sequence[Role], *, max_turns: int = 10, stop_phrase: str | None = None
    ) -> None:
        self.roles = {role.name: role for role in roles}
        self.most_agents = max(type(self).most_agents, len(self.roles))
        self.max_turns = max_turns
        self.stop_phrase = stop_phrase

    async def conduct(self, task: Task, episode: Episode) -> None:
        """One episode: who speaks when, who hears what, and what it is worth.

        Rewards of the config come on top of those given here by `Participant.reward`.
        """
        called = {callee for role in self.roles.values() for callee in role.calls}
        speakers = [await episode.participant(n) for n in self.roles if n not in called]
        turns = self.max_turns if len(speakers) > 1 else 1
        for _ in range(turns):
            for speaker in speakers:
                said = (await speaker.speak()).content
                for other in speakers:
                    if other is not speaker:
                        other.hear(said, name=speaker.role.name if len(speakers) > 2 else None)
                phrase = self.stop_phrase is not None and self.stop_phrase in said
                if phrase or speaker.over or speaker.unfinished:
                    return

    def starts(self, task: Task) -> Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]:
        return [
            (role.world.opening(replace(task, prompt=opening(role, task))), ())
            for role in self.roles.values()
            if role.player.trains
        ]

    def cast(self, agent: Agent) -> Sequence[Agent]:
        return [
            role.player.agent(
                agent, role.name, trainable=role.trainable, place=role.name, compared=None
            )
            for role in self.roles.values()
        ]

    async def run(self, task: Task, agent: Agent) -> list[Rollout]:
        """The rollouts of all participants that said something, in the order of the roles.

        Raises:
            UserError: `conduct` raised, or nobody said anything.
            InfrastructureError: as it was raised.
        """
        episode = Episode(self.roles, task, agent, most_agents=self.most_agents)

        def so_far() -> str:
            return "\n".join(describe_rollout(p.rollout) for p in episode.participants)

        try:
            with self._blamed("conduct", so_far):
                await self.conduct(task, episode)
        finally:
            await self._leave(episode)
        made = [p.rollout for p in episode.participants if p.rollout.model_messages]
        if not made:
            raise UserError(
                f"{type(self).__name__}.conduct ended without a word of any agent",
                "Call speak() of at least one participant.",
            )
        return made

    async def _leave(self, episode: Episode) -> None:
        """Every participant's, at the same time; the first failure is raised when all are done."""

        async def one(participant: Participant) -> None:
            rollout = participant.rollout
            with self._blamed("finish", lambda: describe_rollout(rollout)):
                await self._bounded(participant.leave(), rollout)

        leaving = map(one, episode.participants)
        for outcome in await asyncio.gather(*leaving, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def close(self) -> None:
        for role in self.roles.values():
            await role.world.close()
            await role.player.close()
