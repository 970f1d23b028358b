"""Environments behind an OpenEnv server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from retrain.envs.adapters.text import (
    InvalidAction,
    action_text,
    answered,
    compile_pattern,
    fields_of,
    observation_text,
    opened,
    options_of,
    refused,
    seed_of,
)
from retrain.envs.base import Environment, Step
from retrain.importing import import_object
from retrain.rendering import Renderer, ToolSchema
from retrain.types import InfrastructureError, Message, Rollout, Task, ToolCall, UserError

_CODE = re.compile(r"\(code: (?:WSErrorCode\.)?(\w+)\)$")
"""What OpenEnv's clients append to a server's error."""

_REFUSED = ("VALIDATION_ERROR",)
_BROKEN = ("EXECUTION_ERROR", "FACTORY_ERROR")


class OpenEnvEnvironment(Environment):
    """`type: openenv`: a session of an OpenEnv server a rollout, over the environment's own client.

    The task's prompt holds the instructions, and ends with the first observation; each further one
    is a message. `reset` is given the task's columns `seed` and `options`; without a `seed` it
    follows from the task's id, so that the members of a group begin alike. A step's reward is the
    turn's; `done` ends the rollout. An action that the action's class or the server refuses is
    answered with why, and counted as `invalid_actions`. A server that cannot be reached, is full,
    or is too slow, is infrastructure; one whose environment raises is the user's to mend.

    Args:
        url: the server's.
        renderer: writes results of tools so that they cannot forge the policy's own words.
        client, action: import paths of the environment's `EnvClient` and of the class that its
            actions have; None for OpenEnv's generic client, and a mapping.
        action_field: the action's field that takes the model's words; None reads a JSON object.
        action_pattern: a regular expression; see `action_text`.
        observation_field: see `observation_text`.
        tools: the environment is one of MCP tools: its actions are the model's calls, and words
            without a call end the rollout.
        max_steps: most MODEL turns.
        invalid_reward: of a turn whose words are no action.
        timeout_s: of one answer of the server.
        max_sessions: most sessions at once; further rollouts wait.

    Raises:
        UserError: there is no such client or action, or the package is missing.
    """

    def __init__(
        self,
        url: str,
        renderer: Renderer,
        *,
        client: str | None = None,
        action: str | None = None,
        action_field: str | None = "message",
        action_pattern: str | None = None,
        observation_field: str | None = None,
        tools: bool = False,
        max_steps: int = 10,
        invalid_reward: float = 0.0,
        timeout_s: float = 60.0,
        max_sessions: int = 1,
    ) -> None:
        self.url = url
        self.renderer = renderer
        self.action_field = action_field
        self.pattern = compile_pattern(action_pattern)
        self.observation_field = observation_field
        self.max_steps = max_steps
        self.invalid_reward = invalid_reward
        self.timeout_s = timeout_s
        self.client_class = client_class(client, tools)
        self.action_class = action_class(action)
        self.tools = tools
        self.max_sessions = max_sessions
        self._gate = asyncio.Semaphore(max_sessions)
        self._client: Any = None
        self._schemas: tuple[ToolSchema, ...] = ()

    def tools_for(self, task: Task) -> Sequence[ToolSchema]:
        """Known once the session has begun."""
        return self._schemas

    async def reset(self, task: Task) -> Sequence[Message]:
        arguments = {"seed": seed_of(task), **options_of(task)}
        await self._gate.acquire()
        self._client = self.client_class(base_url=self.url, message_timeout_s=self.timeout_s)
        async with _blame(self.url):
            await self._client.connect()
            result = await self._client.reset(**arguments)
            if self.tools:
                self._schemas = tuple(map(_schema, await self._client.list_tools()))
        return opened(self.opening(task), self._shown(result.observation))

    async def step(self, rollout: Rollout, message: Message) -> Step:
        if self.tools:
            return await self._call_tools(message)
        try:
            action = self._read(action_text(message.content, self.pattern))
            async with _blame(self.url):
                result = await self._client.step(action)
        except InvalidAction as error:
            return Step([refused(rollout, error)], self.invalid_reward)
        return Step(
            answered(self._shown(result.observation)),
            float(result.reward or 0.0),
            "environment" if result.done else None,
        )

    async def finish(self, rollout: Rollout) -> None:
        if self._client is None:
            return
        try:
            await self._client.close()
        finally:
            self._gate.release()

    async def _call_tools(self, message: Message) -> Step:
        """Each call is a step; they are made in the model's order."""
        from openenv.core.env_server.mcp_types import CallToolAction

        if not message.tool_calls:
            return Step(stop="answered")
        results: list[Message] = []
        reward = 0.0
        done = False
        for call in message.tool_calls:
            text = _refusal(call, self._schemas)
            if done:
                text = "The environment is done."
            elif text is None:
                async with _blame(self.url):
                    result = await self._client.step(
                        CallToolAction(tool_name=call.name, arguments=dict(call.arguments))
                    )
                text = _tool_text(result.observation)
                reward += float(result.reward or 0.0)
                done = bool(result.done)
            results.append(self.renderer.tool_message(text, call.name, call.id))
        return Step(results, reward, "environment" if done else None)

    def _shown(self, observation: Any) -> str:
        value = fields_of(observation)
        if self.observation_field is None and isinstance(value, Mapping):
            # What the result says already, and what is not for the model.
            hidden = ("done", "reward", "metadata")
            value = {name: item for name, item in value.items() if name not in hidden}
            if not value:
                return ""
        return observation_text(value, self.observation_field)

    def _read(self, text: str) -> Any:
        """
        Raises:
            InvalidAction: the action's class refuses it.
        """
        from pydantic import ValidationError

        try:
            fields = {self.action_field: text} if self.action_field else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidAction(f"it must be a JSON object: {error}") from None
        if not isinstance(fields, dict):
            raise InvalidAction("it must be a JSON object")
        try:
            return self.action_class(**fields)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise InvalidAction(faults) from None
        except TypeError as error:
            raise InvalidAction(str(error)) from None


@asynccontextmanager
async def _blame(url: str) -> AsyncIterator[None]:
    """Whose fault it is that the server did not answer as it should.

    Raises:
        InvalidAction: the server refused the action.
        UserError: the environment raised.
        InfrastructureError: anything else between here and there.
    """
    from websockets.exceptions import WebSocketException

    try:
        yield
    except TimeoutError as error:
        raise InfrastructureError(f"the OpenEnv server {url} did not answer in time") from error
    except (OSError, WebSocketException) as error:
        raise InfrastructureError(
            f"the OpenEnv server {url} cannot be reached, or has no further session "
            f"(environment.max_sessions): {type(error).__name__}: {error}"
        ) from error
    except RuntimeError as error:
        found = _CODE.search(str(error))
        if found is None:
            raise
        said = str(error)[: found.start()].removeprefix("Server error: ").strip()
        if found.group(1) in _REFUSED:
            raise InvalidAction(said) from None
        if found.group(1) in _BROKEN:
            raise UserError(
                f"the environment of the OpenEnv server {url} failed: {said}",
                "Mend the environment; its server's log has the traceback.",
            ) from error
        raise InfrastructureError(
            f"the OpenEnv server {url} has no session (environment.max_sessions): {said}"
        ) from error


def client_class(path: str | None, tools: bool) -> Callable[..., Any]:
    try:
        from openenv.core import EnvClient, GenericEnvClient
        from openenv.core.mcp_client import MCPToolClient
    except ImportError as error:
        raise UserError(
            "environment.type openenv needs the package openenv-core",
            "Run: pip install 'retrain[openenv]'",
        ) from error
    if path is None:
        generic: Callable[..., Any] = MCPToolClient if tools else GenericEnvClient
        return generic
    kind = import_object(path, "environment.client")
    if not (isinstance(kind, type) and issubclass(kind, EnvClient)):
        raise UserError(
            f"environment.client: {path} is not a subclass of openenv.core.EnvClient",
            "Name the environment's client, or leave the key out for the generic one.",
        )
    return kind


def action_class(path: str | None) -> Callable[..., Any]:
    if path is None:
        return dict
    kind = import_object(path, "environment.action")
    if not isinstance(kind, type):
        raise UserError(
            f"environment.action: {path} is not a class", "Name that of the client's actions."
        )
    return kind


def _schema(tool: Any) -> ToolSchema:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _refusal(call: ToolCall, schemas: Sequence[ToolSchema]) -> str | None:
    """What the model reads of a call that cannot be made; None for one that can."""
    names = [str(schema["function"]["name"]) for schema in schemas]
    if call.error is not None:
        return call.error
    return None if call.name in names else f"no tool {call.name!r}; tools: {', '.join(names)}"


def _tool_text(observation: Any) -> str:
    """The result of a call as the model reads it: its text, or what went wrong."""
    fault = getattr(observation, "error", None)
    if fault is not None:
        return f"{fault.error_type.value}: {fault.message}"
    result = fields_of(getattr(observation, "result", None))
    if isinstance(result, Mapping):
        parts = [str(p["text"]) for p in result.get("content") or () if "text" in p]
        if parts:
            return "\n".join(parts)
        result = result.get("data", result)
    return observation_text(result, None)
