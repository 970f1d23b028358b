"""One attempt at a task by several agents: who speaks for a role, what it hears, whom it calls."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from retrain.envs.base import Agent, cut_short
from retrain.envs.prompts import fill
from retrain.envs.tools import ToolEnvironment
from retrain.rendering import ToolSchema
from retrain.tools import ModelError, ToolError
from retrain.types import Message, MessageType, Rollout, Task, UserError


class Player(Protocol):
    """Who speaks for a role. Without one, the policy does."""

    trains: bool
    """Whether it is the policy, so that its words can train."""

    def agent(
        self, policy: Agent, name: str, *, trainable: bool, place: str, compared: str | None
    ) -> Agent:
        """The agent of one attempt at a task.

        Args:
            place: tells its rollout apart from the others of the attempt.
            compared: names those of the attempt that it is compared with; None compares it with
                those of other attempts at the task.
        """
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
    names: Sequence[str]
    """Of all roles: nobody can speak in another's name."""
    _world: ToolEnvironment
    _tools: Sequence[ToolSchema]
    busy: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    """Held by whoever has told it something and waits for its answer."""
    unfinished: bool = field(default=False, init=False)
    """Its last turns were used up by calls, and gave no answer."""

    @classmethod
    async def enter(
        cls,
        role: Role,
        task: Task,
        agent: Agent,
        names: Sequence[str],
        others: Sequence[RoleTool] = (),
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
        return cls(role, task, agent, rollout, names, world, world.tools_for(own))

    @property
    def over(self) -> bool:
        """It can say no more: a token budget or the context limit cut it short."""
        return self.rollout.stop_reason is not None

    def hear(self, text: str, *, name: str | None = None) -> None:
        """Another party's words; they cannot forge this one's own, nor a third one's.

        What it hears before its turn, the task included, is one message.

        Args:
            name: who speaks, written before the words.
        """
        renderer = self._world.renderer
        markers = renderer.tool_format.markers if renderer.tool_format else ()
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no tokens
        said = renderer.codec.neutralise(text, markers)
        if name is not None:
            named = "|".join(map(re.escape, self.names))
            said = f"{name}: " + re.sub(rf"(?m)^(\s*(?:{named}))(\s*:)", r"\1 \2", said)
        heard = self.rollout.messages
        if heard and heard[-1].type is MessageType.MESSAGE:
            heard[-1] = replace(heard[-1], content=f"{heard[-1].content}\n\n{said}")
        else:
            heard.append(Message(said, MessageType.MESSAGE, name=name))

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
        self.unfinished = False
        before = len(self.rollout.env_rewards)
        while True:
            message = await self.agent.act(self.rollout, self._tools)
            self.rollout.env_rewards.append(0.0)
            self.rollout.stop_reason = cut_short(message)
            if self.over or not self._tools:
                return message
            step = await self._world.step(self.rollout, message)
            self.rollout.add_messages(*step.messages)
            self.unfinished = step.stop is None
            if step.stop is not None:
                return message
            if len(self.rollout.env_rewards) - before >= self._world.max_steps:
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

    async def leave(self) -> None:
        if self.rollout.stop_reason is None:
            self.rollout.stop_reason = "max_steps" if self.unfinished else "answered"
        await self._world.finish(self.rollout)


class RoleTool:
    """A role as a tool of another one: it is told the message, and its answer is the result. It
    remembers what was said to it before."""

    retries = 0
    """Of a call: what it was told once, it has heard."""
    timeout_s = 86_400.0
    """Turns and rollouts have deadlines of their own."""

    def __init__(self, role: Role, circle: Episode, in_order: object) -> None:
        """
        Args:
            circle: where the role is found.
            in_order: tools with the same one wait for each other.
        """
        self.name = role.name
        self.description = role.description
        self.in_order = in_order
        self.parameters: dict[str, Any] = {
            "type": "object",
            "properties": {"message": {"type": "string", "description": "What to tell it."}},
            "required": ["message"],
        }
        self._circle = circle

    def session(self) -> RoleTool:
        return self

    async def call(self, arguments: Mapping[str, Any]) -> str:
        message = arguments.get("message")
        if not isinstance(message, str) or not message.strip():
            raise ModelError(f"{self.name} needs a message: a text that is not empty.")
        callee = await self._circle.participant(self.name)
        async with callee.busy:
            if callee.over:
                raise ToolError(f"{self.name} can say no more.")
            callee.hear(message)
            answer = await callee.speak()
        if callee.unfinished:
            raise ToolError(f"{self.name} came to no answer.")
        return answer.content

    async def close(self) -> None:
        return None


class Episode:
    """One attempt at a task by all roles; a participant enters when it is first asked for."""

    def __init__(
        self,
        roles: Mapping[str, Role],
        task: Task,
        policy: Agent,
        *,
        most_agents: int,
        inside: Episode | None = None,
        place: str = "",
        compared: str | None = None,
    ) -> None:
        """
        Args:
            inside: the whole episode, of which this is what one of several attempts has to itself.
            place, compared: what its participants' ids, and groups, begin with.
        """
        self.task = task
        self.everyone: list[Participant] = [] if inside is None else inside.everyone
        """All that entered, in the order in which they did."""
        self._roles = roles
        self._policy = policy
        self._most_agents = most_agents
        self._place = place
        self._compared = compared
        self._entered: dict[str, Participant] = {}
        self._entering = asyncio.Lock()
        self._attempts: Counter[str] = Counter()
        self._batches: Counter[str] = Counter()

    async def participant(self, name: str) -> Participant:
        """The one of this name.

        Raises:
            UserError: there is no such role.
        """
        async with self._entering:
            if name not in self._entered:
                group = None if self._compared is None else f"{self._compared}/{name}"
                self._entered[name] = await self._enter(name, self._place + name, group, self)
            return self._entered[name]

    async def attempts(self, name: str, count: int) -> list[Participant]:
        """`count` independent participants of one role, each with a rollout of its own and, where
        it calls others, with those to itself. They are compared with each other, and with those of
        no other call or episode.

        Raises:
            UserError: there is no such role.
        """
        self._batches[name] += 1
        batch = self._batches[name]
        group = f"{self._place}{name}" + ("" if batch == 1 else f".{batch}")
        made = []
        for _ in range(count):
            place = f"{self._place}{name}/{self._attempts[name]}"
            self._attempts[name] += 1
            circle = Episode(
                self._roles,
                self.task,
                self._policy,
                most_agents=self._most_agents,
                inside=self,
                place=f"{place}/",
                compared=group,
            )
            made.append(await self._enter(name, place, group, circle))
        return made

    async def _enter(
        self, name: str, place: str, group: str | None, circle: Episode
    ) -> Participant:
        if name not in self._roles:
            raise UserError(
                f"there is no agent {name!r} in this environment",
                f"Agents: {', '.join(self._roles)}.",
            )
        if len(self.everyone) >= self._most_agents:
            raise UserError(
                f"more than {self._most_agents} agents take part in one episode",
                "Set most_agents of the environment's class to what it needs: the engine keeps "
                "room for so many.",
            )
        role = self._roles[name]
        agent = role.player.agent(
            self._policy, name, trainable=role.trainable, place=place, compared=group
        )
        order: object = object() if self._share_callees(role) else True
        others = [RoleTool(self._roles[callee], circle, order) for callee in role.calls]
        made = await Participant.enter(role, self.task, agent, tuple(self._roles), others)
        self.everyone.append(made)
        return made

    def _share_callees(self, role: Role) -> bool:
        """Whether two of its callees could call the same one: who is heard there first must not
        depend on time."""
        reached = [self._reached(callee) for callee in role.calls]
        return sum(map(len, reached)) > len(set().union(*reached))

    def _reached(self, name: str) -> set[str]:
        return {name}.union(*(self._reached(callee) for callee in self._roles[name].calls))

    @property
    def participants(self) -> list[Participant]:
        """All that entered, in the order of the roles."""
        order = list(self._roles)
        return sorted(self.everyone, key=lambda participant: order.index(participant.role.name))


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
