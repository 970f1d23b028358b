"""Other models to ask: a pool of OpenAI-compatible endpoints, each with a name and a price."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from retrain.engines.openai import ChatEndpoint, ChatReply, MessagesRefused, endpoint_of
from retrain.tools.base import ModelError, ToolError, ToolOutput
from retrain.tools.declared import DeclaredParameters
from retrain.tools.function import checked_name
from retrain.types import InfrastructureError, UserError

DESCRIPTION = "Ask another model a question. Each has its own strengths and its price."


@dataclass(frozen=True)
class PoolModel:
    """One of a pool's models, as it is shown."""

    name: str
    description: str
    price: float
    """Of a million completion tokens."""
    prompt_price: float
    """Of a million prompt tokens."""

    @property
    def line(self) -> str:
        """Name, description and prices."""
        about = f": {self.description}" if self.description else ""
        prices = f"{self.price:g} per million output tokens"
        if self.prompt_price:
            prices = f"{self.prompt_price:g} per million input tokens, {prices}"
        return f"- {self.name}{about} ({prices})"


class LLMPool:
    """Models behind chat endpoints, asked by name.

    Args:
        models: a mapping each: `name` and `url`; `model`, as its server calls it (else the name);
            `description`; `price` and `prompt_price`, of a million output and input tokens;
            `api_key_env`, the variable that holds its key; and its own settings of a call,
            `system_prompt`, `temperature` (0), `max_tokens` (512), `seed` (42; None sends none),
            `timeout_s` (60), `retries` (3), `backoff_s` (1) and `max_concurrency` (16).
        where: the place that they come from, for errors.

    Raises:
        UserError: there is no model, two have one name, a key is unknown, missing or has a value
            that cannot be, or the variable of an API key is not set.
    """

    def __init__(self, models: Sequence[Mapping[str, Any]], *, where: str = "the pool") -> None:
        if not isinstance(models, Sequence) or isinstance(models, str) or not models:
            raise UserError(f"{where}: models lists none", "Give each a name, a url and a model.")
        self._where = where
        self._members: dict[str, _Member] = {}
        for number, given in enumerate(models):
            place = f"{where}: models[{number}]"
            member = _member(given, place)
            if member.about.name in self._members:
                raise UserError(f"{place}: another is named '{member.about.name}'", "Rename one.")
            self._members[member.about.name] = member

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    @property
    def models(self) -> tuple[PoolModel, ...]:
        return tuple(member.about for member in self._members.values())

    async def ask(self, name: str, query: str, system_prompt: str | None = None) -> ChatReply:
        """What a model answers; the reply's `cost` is by the model's prices.

        Args:
            system_prompt: instead of the model's own.

        Raises:
            ModelError: no model has this name.
            MessagesRefused: the model does not take this query: it is too long, or filtered.
            InfrastructureError: there is still no answer after the last retry.
            UserError: the endpoint refuses the request as such: its key, its model.
        """
        if name not in self._members:
            raise ModelError(f"There is no model '{name}'. Models: {', '.join(self.names)}.")
        member = self._members[name]
        system = member.system_prompt if system_prompt is None else system_prompt
        messages = [{"role": "user", "content": query}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return await member.endpoint.chat(messages, seed=member.seed)

    async def close(self) -> None:
        """Close every endpoint's connections; nothing is asked after."""
        await asyncio.gather(*(member.endpoint.close() for member in self._members.values()))


@dataclass(frozen=True)
class _Member:
    about: PoolModel
    endpoint: ChatEndpoint
    system_prompt: str
    seed: int | None


_OWN = ("name", "description", "price", "seed", "system_prompt")
"""Keys of a model that are not those of its endpoint."""

_USUAL: dict[str, Any] = {"temperature": 0.0, "max_tokens": 512, "timeout_s": 60.0}


def _member(given: Any, where: str) -> _Member:
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r}", "Write {name: ..., url: ..., model: ...}.")
    if "completion_price" in given:
        raise UserError(f"{where} has no key 'completion_price'", "It is called price.")
    name, description, system = (
        given.get(key, "") for key in ("name", "description", "system_prompt")
    )
    for key, text in (("name", name), ("description", description), ("system_prompt", system)):
        if not isinstance(text, str) or (key == "name" and not text.strip()):
            raise UserError(f"{where}.{key} is {text!r}", "Give a text.")
    seed = given.get("seed", 42)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UserError(f"{where}.seed is {seed!r}", "Give a whole number.")
    price = given.get("price", 0.0)
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
        raise UserError(f"{where}.price is {price!r}", "Give a number of at least zero.")
    settings = {key: value for key, value in given.items() if key not in _OWN}
    defaults = _USUAL | {"model": name, "completion_price": price}
    endpoint = endpoint_of(defaults | settings, f"{where} ({name})")
    about = PoolModel(name, description, price, settings.get("prompt_price", 0.0))
    return _Member(about, endpoint, system, seed)


class LLMPoolTool:
    """A pool as a tool with two arguments, `model` and `query`.

    Of each call the metrics have `<tool>/calls`, `<tool>/<model>/calls` and, where the server says
    them, `<tool>/prompt_tokens`, `<tool>/completion_tokens` and `<tool>/cost`.

    The endpoints' own time-outs bound a call; how long it may wait for its turn is not limited.
    """

    timeout_s: float = math.inf

    def __init__(
        self,
        pool: LLMPool,
        *,
        name: str = "llm_pool",
        description: str = DESCRIPTION,
        on_failure: Literal["mask", "tell"] = "mask",
    ) -> None:
        """
        Args:
            description: what the list of the models follows.
            on_failure: where there is still no answer after the last retry: `mask` leaves the
                rollout out (after the runner's own retries of the call), `tell` shows the model
                that there was none.
        """
        if on_failure not in ("mask", "tell"):
            raise UserError(f"tool '{name}': on_failure is {on_failure!r}", "One of: mask, tell.")
        self.name = checked_name(name)
        self.description = "\n".join([description, *(model.line for model in pool.models)])
        self.pool = pool
        self._on_failure = on_failure
        choice = {"enum": list(pool.names), "description": "which model to ask"}
        query = {"description": "the question; the model sees nothing else"}
        self._declared = DeclaredParameters({"model": choice, "query": query}, f"tool '{name}'")
        self.parameters = self._declared.schema

    def session(self) -> _Session:
        return _Session(self)

    async def ask(self, arguments: Mapping[str, Any]) -> ToolOutput:
        """One call of the tool.

        Raises:
            ModelError: the arguments do not fit, or the model does not take the query.
            ToolError: there is still no answer after the last retry, with `on_failure: tell`.
            InfrastructureError: there is none, with `mask`.
            UserError: the endpoint refuses the request as such.
        """
        asked = self._declared.bind(arguments)
        model = asked["model"]
        try:
            reply = await self.pool.ask(model, asked["query"])
        except MessagesRefused as refused:
            raise ModelError(f"{model} does not take this query: {refused.said}") from refused
        except InfrastructureError as error:
            if self._on_failure == "mask":
                raise
            raise ToolError(f"{model} gave no answer.") from error
        figures = {
            "calls": 1.0,
            f"{model}/calls": 1.0,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "cost": reply.cost,
        }
        metrics = {f"{self.name}/{k}": float(v) for k, v in figures.items() if v is not None}
        return ToolOutput(reply.text, metrics)

    async def close(self) -> None:
        await self.pool.close()


class _Session:
    """Nothing lasts from call to call."""

    def __init__(self, tool: LLMPoolTool) -> None:
        self._tool = tool

    async def call(self, arguments: Mapping[str, Any]) -> ToolOutput:
        return await self._tool.ask(arguments)

    async def close(self) -> None:
        return None
