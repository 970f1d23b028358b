"""What a run acts in: renderer, sandbox, tools, users, environment; from their config sections."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from retrain.config.engine import TorchEngineConfig
from retrain.config.environment import (
    DialogueConfig,
    PythonEnvironmentConfig,
    TagsFormat,
    ToolEnvironmentConfig,
)
from retrain.config.environment import (
    EndpointUser as EndpointUserConfig,
)
from retrain.config.environment import (
    FencedFormat as FencedFormatConfig,
)
from retrain.config.environment import (
    ModelUser as ModelUserConfig,
)
from retrain.config.environment import (
    ScriptedUser as ScriptedUserConfig,
)
from retrain.config.model import ModelConfig
from retrain.config.rewards import RewardConfig
from retrain.config.root import TrainingConfig
from retrain.engines import SamplingParams
from retrain.engines.openai import ChatEndpoint, read_key
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import (
    DialogueEnvironment,
    Environment,
    ScriptedUser,
    SimulatedUser,
    ToolEnvironment,
)
from retrain.importing import import_object
from retrain.models import Policy, load_policy
from retrain.rendering import (
    Codec,
    FencedFormat,
    NativeFormat,
    Renderer,
    TagFormat,
    Template,
    ToolFormat,
    make_template,
)
from retrain.rewards import (
    RewardKind,
    resolve_reward,
    takes_sandbox,
)
from retrain.rollout import EndpointUser, ModelUser
from retrain.sandbox import Sandbox, make_sandbox
from retrain.tools import Tool, resolve_tools
from retrain.types import UserError


@dataclass(frozen=True)
class UserModel:
    """A model that plays users. It never trains."""

    engine: TorchEngine
    renderer: Renderer


def build_renderer(config: TrainingConfig, policy: Policy) -> Renderer:
    """The renderer of the policy's tokenizer and the environment's tool format."""
    template = make_template(policy.tokenizer)
    codec = Codec(policy.tokenizer, _model_stop_tokens(policy))
    environment = config.environment
    tool_format = None
    if isinstance(environment, ToolEnvironmentConfig) and environment.tools:
        tool_format = _tool_format(environment, template)
    return Renderer(codec, template, tool_format)


def _tool_format(environment: ToolEnvironmentConfig, template: Template) -> ToolFormat:
    chosen = environment.tool_format
    if isinstance(chosen, TagsFormat):
        return TagFormat(chosen.tags())
    if isinstance(chosen, FencedFormatConfig):
        return FencedFormat(chosen.language, chosen.output)
    return NativeFormat(template)


def _model_stop_tokens(policy: Policy) -> list[int]:
    generation = getattr(policy.model, "generation_config", None)
    stop = None if generation is None else generation.eos_token_id
    if stop is None:
        return []
    return [stop] if isinstance(stop, int) else list(stop)


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
    if isinstance(environment, ToolEnvironmentConfig) and any(
        tool.name == "python" for tool in environment.tool_list()
    ):
        return True
    rewards: list[tuple[RewardKind, str, RewardConfig]] = [
        *(("step", k, c) for k, c in setup.step_reward_configs.items()),
        *(("rollout", k, c) for k, c in setup.rollout_reward_configs.items()),
        *(("group", k, c) for k, c in setup.group_reward_configs.items()),
    ]
    return any(takes_sandbox(resolve_reward(c.function or k, kind)) for kind, k, c in rewards)


def asks_an_endpoint(config: TrainingConfig) -> bool:
    """Whether an OpenAI-compatible endpoint plays the user, who is then never the same twice."""
    section = config.environment
    return isinstance(section, DialogueConfig) and section.user.type == "openai"


def build_tools(config: TrainingConfig, sandbox: Sandbox) -> list[Tool]:
    environment = config.environment
    if not isinstance(environment, ToolEnvironmentConfig):
        return []
    return [tool for tool, _ in _tools(environment, sandbox)]


def _tools(
    environment: ToolEnvironmentConfig, sandbox: Sandbox
) -> Iterator[tuple[Tool, int | None]]:
    """Each tool, and the most calls of it in a rollout."""
    for section in environment.tool_list():
        params: dict[str, Any] = dict(section.params)
        if section.name == "python":
            params.setdefault("sandbox", sandbox)
        for tool in resolve_tools(section.name, params):
            yield tool, section.max_calls


def build_environment(
    config: TrainingConfig,
    renderer: Renderer,
    sandbox: Sandbox,
    *,
    tools_enabled: bool = True,
    user_models: dict[str, UserModel] | None = None,
) -> Environment:
    """The environment; a dialogue's model user is loaded here, unless `user_models` has it.

    Raises:
        UserError: a tool, environment or model that cannot be found or does not fit.
    """
    section = config.environment
    if isinstance(section, ToolEnvironmentConfig):
        tools = list(_tools(section, sandbox))
        return ToolEnvironment(
            [tool for tool, _ in tools],
            renderer,
            max_steps=section.max_steps,
            timeout_s=section.tool_timeout_s,
            retries=section.tool_retries,
            max_output_chars=section.max_output_chars,
            max_calls=section.max_tool_calls,
            max_calls_of={tool.name: most for tool, most in tools if most is not None},
            tools_column=section.tools_column,
            describe_tools=section.describe_tools,
            enabled=tools_enabled,
        )
    if isinstance(section, DialogueConfig):
        return DialogueEnvironment(
            _build_user(section, config, {} if user_models is None else user_models),
            max_turns=section.max_turns,
            stop_phrase=section.stop_phrase,
        )
    if isinstance(section, PythonEnvironmentConfig):
        return import_environment(section)
    return Environment()


def _build_user(
    section: DialogueConfig, config: TrainingConfig, loaded: dict[str, UserModel]
) -> SimulatedUser:
    user = section.user
    if isinstance(user, ScriptedUserConfig):
        return ScriptedUser(user.replies, user.replies_column)
    if isinstance(user, EndpointUserConfig):
        return _build_endpoint_user(user, config)
    assert isinstance(user, ModelUserConfig)
    key = user.model.model_dump_json()
    if key not in loaded:
        loaded[key] = _load_user(user.model, config)
    return ModelUser(
        loaded[key].engine,
        loaded[key].renderer,
        system_prompt=user.system_prompt,
        params=SamplingParams(user.max_new_tokens, user.temperature),
        run_seed=config.seed,
    )


def _build_endpoint_user(user: EndpointUserConfig, config: TrainingConfig) -> EndpointUser:
    endpoint = ChatEndpoint(
        user.url,
        user.model,
        api_key=read_key(user.api_key_env, "environment.user.api_key_env"),
        temperature=user.temperature,
        max_tokens=user.max_new_tokens,
        timeout_s=user.timeout_s,
        retries=user.retries,
        max_concurrency=user.max_concurrency,
        where="environment.user",
    )
    return EndpointUser(endpoint, system_prompt=user.system_prompt, run_seed=config.seed)


def _load_user(model: ModelConfig, config: TrainingConfig) -> UserModel:
    policy = load_policy(model, seed=config.seed)
    policy.model.requires_grad_(False)
    section = config.engine if isinstance(config.engine, TorchEngineConfig) else TorchEngineConfig()
    engine = TorchEngine(
        policy.model,
        tokenizer=policy.tokenizer,
        max_slots=section.max_slots,
        num_threads=section.num_threads,
        deterministic=section.deterministic,
    )
    codec = Codec(policy.tokenizer, _model_stop_tokens(policy))
    return UserModel(engine, Renderer(codec, make_template(policy.tokenizer)))


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
