"""Several agents in one conversation: they take turns, or call each other as tools.

Each keeps a rollout of its own: its own words are MODEL messages there, everybody else's are
MESSAGEs or tool results, so that each learns from what it saw and said itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from retrain.envs.base import Agent, Environment, cut_short
from retrain.envs.prompts import fill
from retrain.envs.tools import ToolEnvironment
from retrain.rendering import ToolSchema
from retrain.tools import ModelError, ToolError
from retrain.types import Message, MessageType, Rollout, Task, UserError


class Player(Protocol):
    """Who speaks for a role. Without one, the policy does."""

    trains: bool
    """Whether it is the policy, so that its words can train."""

    def agent(self, policy: Agent, name: str, *, trainable: bool, attempt: int | None) -> Agent:
        """The agent of one attempt at a task."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Role:
    """An agent of a multi-agent environment, as it is the same in every episode.

    Args:
        player: who speaks for it.
        world: the tool environment that it acts in: what it may call, how often, and the opening
            system message about that; without tools it just answers.
        system_prompt: a format string over the task's columns, `{prompt}` and `{answer}` too.
        sees_task: whether it begins with the task's prompt.
        trainable: whether its sampled tokens train.
        calls: names of the roles that it has as tools.
        description: what those that call it are told about it.
    """

    name: str
    player: Player
    world: ToolEnvironment
    system_prompt: str | None = None
    sees_task: bool = True
    trainable: bool = True
    calls: tuple[str, ...] = ()
    description: str = ""


@dataclass
class Participant:
    """A role in one episode: what it heard and said so far."""

    role: Role
    task: Task
    agent: Agent
    rollout: Rollout
    _world: ToolEnvironment
    _tools: Sequence[ToolSchema]
    busy: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    """Held by whoever has told it something and waits for its answer."""

    @classmethod
    async def enter(
        cls, role: Role, task: Task, agent: Agent, others: Sequence[RoleTool] = ()
    ) -> Participant:
        """
        Args:
            others: the tools that stand for other roles.
        """
        world = role.world.spawn()
        world.tools = (*world.tools, *others)
        own = replace(task, prompt=opening(role, task))
        rollout = agent.start(task)
        rollout.add_messages(*await world.reset(own))
        return cls(role, task, agent, rollout, world, world.tools_for(own))

    @property
    def over(self) -> bool:
        """It can say no more: a token budget or the context limit cut it short."""
        return self.rollout.stop_reason is not None

    def hear(self, text: str, *, name: str | None = None) -> None:
        """Another party's words; they cannot forge this one's own.

        Args:
            name: who speaks, written before the words.
        """
        renderer = self._world.renderer
        markers = renderer.tool_format.markers if renderer.tool_format else ()
        said = renderer.codec.neutralise(text, markers)
        prefix = "" if name is None else f"{name}: "
        self.rollout.add_messages(Message(prefix + said, MessageType.MESSAGE, name=name))

    async def speak(self) -> Message:
        """Its next words: it calls tools until it answers without one, or is cut short.

        Raises:
            UserError: it has heard nothing and has no prompt.
            InfrastructureError: the engine, or a tool, failed.
        """
        if not self.rollout.messages:
            raise UserError(
                f"agent {self.role.name} is to speak, and there is nothing that it has been told",
                "Give it a system_prompt, sees_task: true, or a turn after somebody else's.",
            )
        before = len(self.rollout.env_rewards)
        while True:
            message = await self.agent.act(self.rollout, self._tools)
            self.rollout.env_rewards.append(0.0)
            self.rollout.stop_reason = cut_short(message)
            if self.over:
                return message
            if not self._tools:
                return message
            step = await self._world.step(self.rollout, message)
            self.rollout.add_messages(*step.messages)
            if step.stop is not None:
                return message
            if len(self.rollout.env_rewards) - before >= self._world.max_steps:
                self.rollout.stop_reason = "max_steps"
                return message

    def reward(self, value: float) -> None:
        """An intrinsic reward for its last words.

        Raises:
            UserError: it has said nothing.
        """
        if not self.rollout.env_rewards:
            raise UserError(
                f"agent {self.role.name} gets a reward before it has said anything",
                "Reward it after speak().",
            )
        self.rollout.env_rewards[-1] += value

    @property
    def said(self) -> str:
        """Its last words; empty before the first."""
        own = self.rollout.model_messages
        return self.rollout.messages[own[-1]].content if own else ""

    async def leave(self) -> None:
        if self.rollout.stop_reason is None:
            self.rollout.stop_reason = "answered"
        await self._world.finish(self.rollout)


class RoleTool:
    """A role as a tool of another one: it is told the message, and its answer is the result. It
    remembers what was said to it in the episode."""

    in_order = True

    retries = 0
    """Of a call: what it was told once, it has heard."""
    timeout_s = 86_400.0
    """Turns and rollouts have deadlines of their own."""

    def __init__(self, role: Role, episode: Episode) -> None:
        self.name = role.name
        self.description = role.description
        self.parameters: dict[str, Any] = {
            "type": "object",
            "properties": {"message": {"type": "string", "description": "What to tell it."}},
            "required": ["message"],
        }
        self._episode = episode

    def session(self) -> RoleTool:
        return self

    async def call(self, arguments: Mapping[str, Any]) -> str:
        message = arguments.get("message")
        if not isinstance(message, str) or not message.strip():
            raise ModelError(f"{self.name} needs a message: a text that is not empty.")
        callee = await self._episode.participant(self.name)
        async with callee.busy:
            if callee.over:
                raise ToolError(f"{self.name} can say no more.")
            callee.hear(message)
            return (await callee.speak()).content

    async def close(self) -> None:
        return None


class Episode:
    """One attempt at a task by all roles; a participant enters when it is first asked for."""

    def __init__(self, roles: Mapping[str, Role], task: Task, policy: Agent) -> None:
        self.task = task
        self._roles = roles
        self._policy = policy
        self._entered: dict[str, Participant] = {}
        self._entering = asyncio.Lock()
        self._further: list[Participant] = []

    async def participant(self, name: str) -> Participant:
        """The one of this name.

        Raises:
            UserError: there is no such role.
        """
        async with self._entering:
            if name not in self._entered:
                self._entered[name] = await self._enter(name, None)
            return self._entered[name]

    async def attempts(self, name: str, count: int) -> list[Participant]:
        """`count` independent participants of one role, each with a rollout of its own. They are
        compared with each other, and with no other episode's.

        Raises:
            UserError: there is no such role.
        """
        made = [await self._enter(name, number) for number in range(count)]
        self._further += made
        return made

    async def _enter(self, name: str, attempt: int | None) -> Participant:
        if name not in self._roles:
            raise UserError(
                f"there is no agent {name!r} in this environment",
                f"Agents: {', '.join(self._roles)}.",
            )
        role = self._roles[name]
        agent = role.player.agent(self._policy, name, trainable=role.trainable, attempt=attempt)
        others = [RoleTool(self._roles[callee], self) for callee in role.calls]
        return await Participant.enter(role, self.task, agent, others)

    @property
    def participants(self) -> list[Participant]:
        """All that entered, in the order of the roles."""
        order = list(self._roles)
        everyone = [*self._entered.values(), *self._further]
        return sorted(everyone, key=lambda participant: order.index(participant.role.name))


class MultiAgentEnvironment(Environment):
    """Roles that take turns (`type: agents`).

    Those that nobody calls take turns in their order; what one says, the others hear. With one
    such role the episode ends with its answer; with several, after `max_turns` turns of each, when
    one says `stop_phrase`, or when one is cut short. Override `conduct` for another protocol.

    Args:
        roles: in the order in which they speak.
        max_turns: of each role that takes turns.
        stop_phrase: ends the episode where a turn contains it; None never does.
    """

    def __init__(
        self, roles: Sequence[Role], *, max_turns: int = 10, stop_phrase: str | None = None
    ) -> None:
        self.roles = {role.name: role for role in roles}
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
                if speaker.over or (self.stop_phrase is not None and self.stop_phrase in said):
                    return

    def starts(self, task: Task) -> Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]:
        return [
            (role.world.opening(replace(task, prompt=opening(role, task))), ())
            for role in self.roles.values()
            if role.player.trains
        ]

    def cast(self, agent: Agent) -> Sequence[Agent]:
        return [
            role.player.agent(agent, role.name, trainable=role.trainable, attempt=None)
            for role in self.roles.values()
        ]

    async def run(self, task: Task, agent: Agent) -> list[Rollout]:
        """The rollouts of all participants that said something, in the order of the roles.

        Raises:
            UserError: `conduct` raised, or nobody said anything.
            InfrastructureError: as it was raised.
        """
        episode = Episode(self.roles, task, agent)
        at = Rollout(task=task)
        try:
            with self._blamed("conduct", at):
                await self.conduct(task, episode)
        finally:
            for participant in episode.participants:
                with self._blamed("finish", participant.rollout):
                    await self._bounded(participant.leave(), participant.rollout)
        made = [p.rollout for p in episode.participants if p.rollout.model_messages]
        if not made:
            raise UserError(
                f"{type(self).__name__}.conduct ended without a word of any agent",
                "Call speak() of at least one participant.",
            )
        return made

    async def close(self) -> None:
        for role in self.roles.values():
            await role.world.close()
            await role.player.close()


def opening(role: Role, task: Task) -> tuple[Message, ...]:
    """What a role begins with, the description of its tools apart.

    Raises:
        UserError: its system prompt asks for a column that the task lacks.
    """
    seen = task.prompt if role.sees_task else ()
    if role.system_prompt is None:
        return seen
    text = fill(role.system_prompt, task, f"environment.agents.{role.name}.system_prompt")
    if seen and seen[0].type is MessageType.SYSTEM:
        return (Message(f"{text}\n\n{seen[0].content}", MessageType.SYSTEM), *seen[1:])
    return (Message(text, MessageType.SYSTEM), *seen)
