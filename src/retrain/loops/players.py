"""Who is not the policy: other models and endpoints, as simulated users and as agents."""

from __future__ import annotations

from dataclasses import dataclass

from retrain.config.agents import PlayerConfig
from retrain.config.engine import TorchEngineConfig
from retrain.config.formats import FencedFormat as FencedFormatConfig
from retrain.config.formats import TagsFormat, ToolFormatConfig
from retrain.config.model import ModelConfig
from retrain.config.root import TrainingConfig
from retrain.config.users import EndpointPlayer as EndpointPlayerConfig
from retrain.config.users import EndpointUser as EndpointUserConfig
from retrain.config.users import ModelPlayer as ModelPlayerConfig
from retrain.config.users import ModelUser as ModelUserConfig
from retrain.config.users import ScriptedUser as ScriptedUserConfig
from retrain.engines import SamplingParams
from retrain.engines.openai import ChatEndpoint, read_key
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Player, ScriptedUser, SimulatedUser
from retrain.models import Policy, load_policy
from retrain.rendering import (
    Codec,
    FencedFormat,
    NativeFormat,
    Renderer,
    TagFormat,
    ToolFormat,
    make_template,
)
from retrain.rollout import EndpointPlayer, EndpointUser, ModelPlayer, ModelUser, PolicyPlayer


@dataclass(frozen=True)
class LoadedModel:
    """A model beside the policy. It never trains."""

    engine: TorchEngine
    codec: Codec
    tokenizer: object

    def renderer(self, tool_format: ToolFormatConfig | None = None) -> Renderer:
        return make_renderer(self.codec, self.tokenizer, tool_format)


def make_renderer(
    codec: Codec, tokenizer: object, tool_format: ToolFormatConfig | None
) -> Renderer:
    """
    Args:
        tool_format: None where there is nothing to call.
    """
    template = make_template(tokenizer)
    made: ToolFormat | None = None
    if isinstance(tool_format, TagsFormat):
        made = TagFormat(tool_format.tags(), answer_end=tool_format.answer_end)
    elif isinstance(tool_format, FencedFormatConfig):
        made = FencedFormat(tool_format.language, tool_format.output)
    elif tool_format is not None:
        made = NativeFormat(template)
    return Renderer(codec, template, made)


def codec_of(policy: Policy) -> Codec:
    """Of a model's tokenizer, with the tokens that end its turns."""
    generation = getattr(policy.model, "generation_config", None)
    stop = None if generation is None else generation.eos_token_id
    if stop is None:
        return Codec(policy.tokenizer, [])
    return Codec(policy.tokenizer, [stop] if isinstance(stop, int) else list(stop))


def build_user(
    user: ScriptedUserConfig | ModelUserConfig | EndpointUserConfig,
    config: TrainingConfig,
    loaded: dict[str, LoadedModel],
) -> SimulatedUser:
    """The user of a dialogue.

    Raises:
        UserError: a model or a key that cannot be found.
    """
    if isinstance(user, ScriptedUserConfig):
        return ScriptedUser(user.replies, user.replies_column)
    if isinstance(user, EndpointUserConfig):
        endpoint = _endpoint(user, "environment.user")
        return EndpointUser(endpoint, system_prompt=user.system_prompt, run_seed=config.seed)
    model = _load(user.model, config, loaded)
    return ModelUser(
        model.engine,
        model.renderer(),
        system_prompt=user.system_prompt,
        params=SamplingParams(user.max_new_tokens, user.temperature),
        run_seed=config.seed,
    )


def build_player(
    name: str,
    player: PlayerConfig,
    config: TrainingConfig,
    *,
    renderer: Renderer,
    loaded: dict[str, LoadedModel],
    tool_format: ToolFormatConfig | None,
) -> tuple[Player, Renderer]:
    """Who speaks for an agent, and what renders what it sees.

    Args:
        renderer: the policy's.

    Raises:
        UserError: a model or a key that cannot be found.
    """
    if isinstance(player, EndpointPlayerConfig):
        return EndpointPlayer(_endpoint(player, f"environment.agents.{name}.player")), renderer
    if isinstance(player, ModelPlayerConfig):
        model = _load(player.model, config, loaded)
        own = model.renderer(tool_format)
        params = SamplingParams(player.max_new_tokens, player.temperature)
        return ModelPlayer(model.engine, own, params), own
    own = renderer if tool_format else Renderer(renderer.codec, renderer.template)
    return PolicyPlayer(own), own


def _endpoint(player: EndpointPlayerConfig, place: str) -> ChatEndpoint:
    return ChatEndpoint(
        player.url,
        player.model,
        api_key=read_key(player.api_key_env, f"{place}.api_key_env"),
        temperature=player.temperature,
        max_tokens=player.max_new_tokens,
        timeout_s=player.timeout_s,
        retries=player.retries,
        max_concurrency=player.max_concurrency,
        where=place,
    )


def _load(
    model: ModelConfig, config: TrainingConfig, loaded: dict[str, LoadedModel]
) -> LoadedModel:
    """One engine for each model, however many users and agents it plays."""
    key = model.model_dump_json()
    if key not in loaded:
        policy = load_policy(model, seed=config.seed)
        policy.model.requires_grad_(False)
        section = config.engine
        if not isinstance(section, TorchEngineConfig):
            section = TorchEngineConfig()
        engine = TorchEngine(
            policy.model,
            tokenizer=policy.tokenizer,
            max_slots=section.max_slots,
            num_threads=section.num_threads,
            deterministic=section.deterministic,
        )
        loaded[key] = LoadedModel(engine, codec_of(policy), policy.tokenizer)
    return loaded[key]
