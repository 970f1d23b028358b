"""The environment of several agents, from its config section."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from retrain.config.agents import AgentConfig, AgentsConfig
from retrain.config.formats import ToolConfig
from retrain.config.root import TrainingConfig
from retrain.envs import MultiAgentEnvironment, Player, Role, ToolEnvironment
from retrain.importing import import_object
from retrain.loops.players import LoadedModel, build_player
from retrain.rendering import Renderer
from retrain.sandbox import Sandbox
from retrain.tools import Tool, resolve_tools
from retrain.types import UserError


def make_tools(
    sections: Sequence[ToolConfig], sandbox: Sandbox
) -> tuple[list[Tool], dict[str, int]]:
    """The tools that a list in a config stands for, and the most calls of those that have a budget.

    Raises:
        UserError: a tool that cannot be found, or parameters that it does not take.
    """
    tools: list[Tool] = []
    most: dict[str, int] = {}
    for section in sections:
        params = dict(section.params)
        if section.name == "python":
            params.setdefault("sandbox", sandbox)
        made = resolve_tools(section.name, params)
        tools += made
        if section.max_calls is not None:
            most |= {tool.name: section.max_calls for tool in made}
    return tools, most


def build_agents(
    section: AgentsConfig,
    config: TrainingConfig,
    renderer: Renderer,
    sandbox: Sandbox,
    loaded: dict[str, LoadedModel],
    *,
    tools_enabled: bool = True,
) -> MultiAgentEnvironment:
    """
    Raises:
        UserError: a tool, model or class that cannot be found or does not fit.
    """
    kind = MultiAgentEnvironment if section.path is None else import_conduct(section.path)
    roles = []
    for name, agent in section.agents.items():
        tools, most = make_tools(agent.tool_list(), sandbox)
        tool_format = section.tool_format if agent.acts else None
        player, own = build_player(
            name, agent.player, config, renderer=renderer, loaded=loaded, tool_format=tool_format
        )
        world = ToolEnvironment(
            tools,
            own,
            max_steps=agent.max_steps,
            timeout_s=section.tool_timeout_s,
            retries=section.tool_retries,
            max_output_chars=section.max_output_chars,
            max_calls_of=most,
            describe_tools=section.describe_tools,
            enabled=tools_enabled,
        )
        roles.append(_role(name, agent, player, world))
    try:
        return kind(
            roles,
            max_turns=section.max_turns,
            stop_phrase=section.stop_phrase,
            **section.params,
        )
    except TypeError as error:
        raise UserError(
            f"environment.params do not fit {section.path}: {error}",
            f"Its parameters: {inspect.signature(kind)}; it is called as (roles, max_turns=..., "
            "stop_phrase=..., **params).",
        ) from error


def _role(name: str, agent: AgentConfig, player: Player, world: ToolEnvironment) -> Role:
    return Role(
        name,
        player,
        world,
        system_prompt=agent.system_prompt,
        sees_task=agent.sees_task,
        trainable=agent.trainable and player.trains,
        calls=tuple(agent.calls),
        description=agent.description,
    )


def import_conduct(path: str) -> type[MultiAgentEnvironment]:
    """
    Raises:
        UserError: there is no such class, or it is no environment of several agents.
    """
    kind = import_object(path, "environment")
    if not (isinstance(kind, type) and issubclass(kind, MultiAgentEnvironment)):
        raise UserError(
            f"environment.path: {path} is not a subclass of retrain.envs.MultiAgentEnvironment",
            "Derive it from that, and override conduct.",
        )
    return kind
