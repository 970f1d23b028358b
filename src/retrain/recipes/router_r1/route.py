"""`<search>LLM-Name:Query</search>`: the pool as one tool whose whole argument is the request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from retrain.recipes.router_r1.names import pool_name
from retrain.tools.base import ToolOutput
from retrain.tools.llm_pool import LLMPool
from retrain.types import InfrastructureError, UserError

NOTHING = "None"
"""What the policy reads where there is no such model, or no answer."""

ASSISTANT = """\
Another model is working on a question and has passed a part of it on to you. Answer that part as \
well as you can, with one or two sentences of explanation. If you only know something that helps, \
say that. If you know nothing about it, say so plainly and advise to ask a different model. Be \
brief and keep to the subject.

The part for you: {query}
"""
"""What a routed model is asked, in its only message."""


class RouteTool:
    """Router-R1's pool, in the `tags` format with `tool_start: <search>`.

    What a rollout's calls come to is added up in its metrics: `pool/cost` (completion tokens times
    the price of a million), `pool/completion_tokens`, `pool/calls` and `pool/calls/<name>`,
    `pool/refused` (no such model) and `pool/failed` (no answer).

    Args:
        models: as `retrain.tools.llm_pool.LLMPool` takes them; a `name` is what the policy writes.
        published_names: a name is read by the published implementation's rule, which finds
            `LLaMA-3.1-70B-Instruct` in any text with "llama" and "70b", and not as it is written.
        prompt: what a model is asked, a format string over `query`.

    Raises:
        UserError: the pool or the prompt cannot be one.
    """

    name = "route"
    description = "Ask one of the models: its name, a colon, and a question."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"request": {"type": "string"}},
        "required": ["request"],
    }
    timeout_s = math.inf
    """The endpoints' own time-outs bound a call."""

    def __init__(
        self,
        models: Sequence[Mapping[str, Any]],
        *,
        published_names: bool = False,
        prompt: str = ASSISTANT,
    ) -> None:
        try:
            asked = prompt.format(query="\0")
        except (IndexError, KeyError, ValueError) as error:
            raise UserError(
                f"route: prompt cannot be filled in: {error!r}", "Use {query}."
            ) from None
        if "\0" not in asked:
            raise UserError("route: prompt does not say what is asked", "Write {query} into it.")
        self._pool = LLMPool(models, where="route")
        self._prices = {model.name: model.price for model in self._pool.models}
        self._published_names = published_names
        self._prompt = prompt

    def session(self) -> RouteSession:
        return RouteSession(self)

    async def ask(self, request: str) -> ToolOutput:
        """What a model of the pool answers to `Name:Query`.

        Raises:
            UserError: the endpoint refuses the request as such (its key, its model), or does not
                say how many tokens it used.
        """
        pieces = request.split(":")
        name = self._named(pieces[0])
        query = pieces[1].strip() if len(pieces) > 1 else ""
        if name is None or not query:
            return ToolOutput(NOTHING, {"pool/refused": 1.0})
        asked = {"pool/calls": 1.0, f"pool/calls/{name}": 1.0}
        try:
            reply = await self._pool.ask(name, self._prompt.format(query=query))
        except InfrastructureError:
            return ToolOutput(NOTHING, asked | {"pool/failed": 1.0})
        if reply.completion_tokens is None:
            raise UserError(
                f"route: the endpoint of {name} does not say how many tokens it used",
                "The cost is made of them: use a server that sends `usage`.",
            )
        tokens = float(reply.completion_tokens)
        spent = {"pool/completion_tokens": tokens, "pool/cost": tokens * self._prices[name]}
        return ToolOutput(reply.text.strip(), asked | spent)

    async def close(self) -> None:
        await self._pool.close()

    def _named(self, text: str) -> str | None:
        named = pool_name(text, None if self._published_names else self._pool.names)
        return named if named in self._prices else None


class RouteSession:
    """One rollout's use of the pool, which remembers nothing of it."""

    def __init__(self, tool: RouteTool) -> None:
        self._tool = tool

    async def call(self, arguments: Mapping[str, Any]) -> ToolOutput:
        return await self._tool.ask(str(arguments.get("request", "")))

    async def close(self) -> None:
        return None
