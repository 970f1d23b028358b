"""What a run acts in: renderer, sandbox, tools, users, environment; from their config sections."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from retrain.config.adapters import GymnasiumConfig, OpenEnvConfig, VerifiersConfig
from retrain.config.agents import AgentsConfig
from retrain.config.environment import (
    DialogueConfig,
    EnvironmentConfig,
    PythonEnvironmentConfig,
    ToolEnvironmentConfig,
)
from retrain.config.external import ExternalConfig
from retrain.config.formats import ToolConfig, ToolFormatConfig
from retrain.config.rewards import RewardConfig
from retrain.config.root import TrainingConfig
from retrain.envs import DialogueEnvironment, Environment, ToolEnvironment
from retrain.importing import import_object
from retrain.loops.adapters import build_adapter
from retrain.loops.agents import build_agents, make_tools
from retrain.loops.external import build_external
from retrain.loops.players import LoadedModel, build_user, codec_of, make_renderer
from retrain.models import Policy
from retrain.rendering import Renderer, ToolSchema
from retrain.rewards import RewardKind, resolve_reward, takes_sandbox
from retrain.sandbox import Sandbox, make_sandbox
from retrain.tools import tool_schema
from retrain.tools.base import close_tools
from retrain.types import UserError

_ASKING_TOOLS = ("http", "llm_pool")
_JUDGES = ("llm_judge", "pairwise_judge", "rubric")


def build_renderer(config: TrainingConfig, policy: Policy) -> Renderer:
    """The renderer of the policy's tokenizer and the environment's tool format."""
    return make_renderer(codec_of(policy), policy.tokenizer, _chosen_format(config))


def _chosen_format(config: TrainingConfig) -> ToolFormatConfig | None:
    """None where there is nothing to call."""
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig):
        return environment.tool_format if environment.tools else None
    if isinstance(environment, AgentsConfig):
        acting = any(agent.acts for agent in environment.agents.values())
        return environment.tool_format if acting else None
    if isinstance(environment, OpenEnvConfig | VerifiersConfig | ExternalConfig):
        return environment.tool_format
    return None


def describes_tools(config: TrainingConfig) -> bool:
    """Whether the policy is told of its tools in the system message."""
    section = config.environment
    if isinstance(section, ToolEnvironmentConfig | AgentsConfig | ExternalConfig):
        return section.describe_tools
    return False


def build_sandbox(config: TrainingConfig) -> Sandbox:
    """Nothing starts yet. What the config leaves at its default is not asked for.

    Raises:
        UserError: the config asks for more than its sandbox can do.
    """
    section = config.sandbox
    wishes = {
        "packages": section.packages,
        "files": section.files or None,
        "writable": section.writable or None,
        "bubblewrap": section.bubblewrap or None,
        "url": section.url,
    }
    return make_sandbox(
        section.type,
        timeout_s=section.timeout_s,
        memory_mb=section.memory_mb,
        max_output_chars=section.max_output_chars,
        max_concurrency=section.max_concurrency,
        stateful=section.stateful,
        **{name: wish for name, wish in wishes.items() if wish is not None},
    )


def runs_code(config: TrainingConfig) -> bool:
    """Whether code that the model writes will run: by the python tool, or by a reward."""
    environment, setup = config.environment, config.reward_setup
    if any(tool.name == "python" for tool in _tool_list(environment)):
        return True
    rewards: list[tuple[RewardKind, str, RewardConfig]] = [
        *(("step", k, c) for k, c in setup.step_reward_configs.items()),
        *(("rollout", k, c) for k, c in setup.rollout_reward_configs.items()),
        *(("group", k, c) for k, c in setup.group_reward_configs.items()),
    ]
    return any(takes_sandbox(resolve_reward(c.function or k, kind)) for kind, k, c in rewards)


def _tool_list(environment: EnvironmentConfig) -> list[ToolConfig]:
    """What the environment's agents may call."""
    if isinstance(environment, ToolEnvironmentConfig):
        return environment.tool_list()
    if isinstance(environment, AgentsConfig):
        return [tool for agent in environment.agents.values() for tool in agent.tool_list()]
    return []


def endpoints_asked(config: TrainingConfig) -> list[str]:
    """What endpoints do here, a clause each. What they say may be different another time."""
    section, setup = config.environment, config.reward_setup
    found = []
    if isinstance(section, DialogueConfig) and section.user.type == "openai":
        found.append("an endpoint plays the user")
    if isinstance(section, AgentsConfig):
        played = [n for n, agent in section.agents.items() if agent.player.type == "openai"]
        found += [f"an endpoint plays {name}" for name in played]
    if isinstance(section, OpenEnvConfig):
        found.append("a server plays the environment")
    if isinstance(section, ExternalConfig):
        found.append("a program of your own asks the model")
    for tool in _tool_list(section):
        if tool.name in _ASKING_TOOLS or (tool.name == "simulated" and "model" in tool.params):
            found.append(f"the tool {tool.name} asks an endpoint")
    for configs in (setup.rollout_reward_configs, setup.group_reward_configs):
        for name, reward in configs.items():
            if (reward.function or name) in _JUDGES:
                found.append(f"the reward {name} asks an endpoint")
    return found


def tool_schemas(sections: Sequence[ToolConfig], sandbox: Sandbox) -> list[ToolSchema]:
    """Tools as the policy is told of them; what they hold is released again."""
    tools = make_tools(sections, sandbox)[0]
    try:
        return [tool_schema(tool) for tool in tools]
    finally:
        with ThreadPoolExecutor(1) as thread:  # there may be a running event loop in this one
            thread.submit(asyncio.run, close_tools(tools)).result()


def build_environment(
    config: TrainingConfig,
    renderer: Renderer,
    sandbox: Sandbox,
    *,
    tools_enabled: bool = True,
    user_models: dict[str, LoadedModel] | None = None,
) -> Environment:
    """The environment; models that play users or agents are loaded here, unless `user_models`
    has them.

    Raises:
        UserError: a tool, environment or model that cannot be found or does not fit.
    """
    section = config.environment
    loaded = {} if user_models is None else user_models
    if isinstance(section, ToolEnvironmentConfig):
        tools, most = make_tools(section.tool_list(), sandbox)
        return ToolEnvironment(
            tools,
            renderer,
            max_steps=section.max_steps,
            timeout_s=section.tool_timeout_s,
            retries=section.tool_retries,
            max_output_chars=section.max_output_chars,
            max_calls=section.max_tool_calls,
            max_calls_of=most,
            tools_column=section.tools_column,
            describe_tools=section.describe_tools,
            enabled=tools_enabled,
        )
    if isinstance(section, DialogueConfig):
        return DialogueEnvironment(
            build_user(section.user, config, loaded),
            max_turns=section.max_turns,
            stop_phrase=section.stop_phrase,
        )
    if isinstance(section, AgentsConfig):
        return build_agents(section, config, renderer, sandbox, loaded, tools_enabled=tools_enabled)
    if isinstance(section, GymnasiumConfig | OpenEnvConfig | VerifiersConfig):
        return build_adapter(section, renderer)
    if isinstance(section, ExternalConfig):
        return build_external(section, renderer)
    if isinstance(section, PythonEnvironmentConfig):
        return import_environment(section)
    return Environment()


def import_environment(section: PythonEnvironmentConfig) -> Environment:
    kind = import_object(section.path, "environment")
    if not (isinstance(kind, type) and issubclass(kind, Environment)):
        raise UserError(
            f"environment.path: {section.path} is not a subclass of retrain.Environment",
            "Derive it from retrain.Environment and override reset and step.",
        )
    try:
        return kind(**section.params)
    except TypeError as error:
        raise UserError(
            f"environment.params do not fit {section.path}: {error}",
            f"Its parameters: {inspect.signature(kind)}.",
        ) from error
