"""`environment.type: agents`: several agents, each with its own prompt, player and tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section
from retrain.config.formats import TagsFormat, ToolConfig, ToolFormatConfig
from retrain.config.users import EndpointPlayer, ModelPlayer


class PolicyPlayer(Section):
    """`policy`: the model that trains, with its weights of the moment."""

    type: Literal["policy"] = "policy"


PlayerConfig = Annotated[PolicyPlayer | ModelPlayer | EndpointPlayer, Field(discriminator="type")]


class AgentConfig(Section):
    """One agent."""

    player: PlayerConfig = Field(default_factory=PolicyPlayer)
    """Who speaks for it."""
    trainable: bool = True
    """Whether what the policy samples for it trains. Nobody else's words do."""
    system_prompt: str | None = None
    """A format string over the task's columns, `{prompt}` and `{answer}` among them."""
    sees_task: bool = True
    """Whether it begins with the task's prompt."""
    tools: list[str | ToolConfig] = Field(default_factory=list)
    """As those of `smolagent`."""
    calls: list[str] = Field(default_factory=list)
    """Names of agents that it has as tools, each with one argument: a message. An agent that is
    called takes no turns."""
    description: str = ""
    """What those that call it are told about it."""
    max_steps: int = Field(10, ge=1)
    """Most MODEL turns until it answers without calling anything."""

    @property
    def acts(self) -> bool:
        """Whether it can call anything."""
        return bool(self.tools or self.calls)

    @model_validator(mode="after")
    def _consistent(self) -> AgentConfig:
        if self.player.type == "openai" and self.acts:
            raise ValueError(
                "tools and calls: an agent that an endpoint plays only answers; remove them, or "
                "use player.type: policy or model"
            )
        if len(set(self.calls)) < len(self.calls):
            raise ValueError(f"calls: {self.calls} names an agent twice")
        if not self.acts and self.changed("max_steps"):
            raise ValueError(
                f"max_steps {self.max_steps} does nothing for an agent without tools and calls: "
                "it answers in one turn"
            )
        return self

    def tool_list(self) -> list[ToolConfig]:
        return [ToolConfig(name=t) if isinstance(t, str) else t for t in self.tools]


class AgentsConfig(Section):
    """`agents`: several agents take turns, or call each other; each has a rollout of its own.

    Those that nobody calls take turns in the order of the file, and hear each other. With one such
    agent the episode ends with its answer. `group_size` counts episodes.
    """

    type: Literal["agents"] = "agents"
    agents: dict[str, AgentConfig] = Field(min_length=1)
    """By name."""
    path: str | None = None
    """`pkg.module:Class` or `path/to/file.py:Class`, a subclass of `MultiAgentEnvironment` with a
    protocol of its own; null is turns and calls as described."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    max_turns: int = Field(10, ge=1)
    """Of each agent that takes turns, where several do."""
    stop_phrase: str | None = None
    """A turn that contains it ends the episode."""
    tool_format: ToolFormatConfig = Field(default_factory=TagsFormat)
    """How calls are written and results put back."""
    tool_timeout_s: float = Field(30.0, gt=0)
    """Of one attempt at a call of a tool, unless the tool has a `timeout_s` of its own."""
    tool_retries: int = Field(2, ge=0)
    """Of a call whose infrastructure failed."""
    max_output_chars: int = Field(4000, ge=16)
    """Of one result; the middle is left out."""
    describe_tools: bool = False
    """Open with a system message about what can be called, and how (tags and fenced)."""

    @field_validator("agents")
    @classmethod
    def _names_can_be_called(cls, agents: dict[str, AgentConfig]) -> dict[str, AgentConfig]:
        for name in agents:
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(f"agent name {name!r}: use letters, digits and _")
        return agents

    @model_validator(mode="after")
    def _calls_end(self) -> AgentsConfig:
        for name, agent in self.agents.items():
            for callee in agent.calls:
                if callee not in self.agents:
                    known = ", ".join(self.agents)
                    raise ValueError(f"agents.{name}.calls: no agent {callee!r}; there are {known}")
            if name in _reached(self.agents, name):
                raise ValueError(f"agents.{name}.calls: it would wait for itself")
        return self

    @model_validator(mode="after")
    def _every_key_acts(self) -> AgentsConfig:
        acting = any(agent.acts for agent in self.agents.values())
        keys = ("tool_format", "max_output_chars", "describe_tools")
        if not acting and (idle := self.changed(*keys)):
            raise ValueError(
                f"{' and '.join(idle)}: nothing to act on, since no agent has tools or calls"
            )
        tools = any(agent.tools for agent in self.agents.values())
        if not tools and (idle := self.changed("tool_timeout_s", "tool_retries")):
            raise ValueError(
                f"{' and '.join(idle)}: nothing to act on, since no agent has tools; a call of "
                "another agent is bounded by rollout.turn_timeout_s, and never made twice"
            )
        if self.describe_tools and self.tool_format.type == "native":
            raise ValueError(
                "describe_tools does nothing with native tool calls: the chat template "
                "describes the tools itself"
            )
        called = {callee for agent in self.agents.values() for callee in agent.calls}
        idle = [name for name in called if self.agents[name].description == ""]
        if idle:
            raise ValueError(
                f"agents.{idle[0]}: it is called, and has no description for those that call it"
            )
        described = [n for n, agent in self.agents.items() if agent.description and n not in called]
        if described and self.path is None:
            raise ValueError(f"agents.{described[0]}.description does nothing: no agent calls it")
        speakers = len(self.agents) - len(called)
        if (
            self.path is None
            and speakers == 1
            and (idle := self.changed("max_turns", "stop_phrase"))
        ):
            raise ValueError(
                f"{' and '.join(idle)} does nothing: one agent takes turns, and answers once"
            )
        if self.path is None and self.params:
            raise ValueError("params needs path: they are arguments of a class of your own")
        return self


def _reached(agents: dict[str, AgentConfig], start: str) -> set[str]:
    """Names that are called from `start`, however far down."""
    found: set[str] = set()
    waiting = list(agents[start].calls)
    while waiting:
        name = waiting.pop()
        if name not in found and name in agents:
            found.add(name)
            waiting.extend(agents[name].calls)
    return found
