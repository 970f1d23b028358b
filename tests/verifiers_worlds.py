"""An environment on verifiers' own classes: a taskset with rewards, and a harness that keeps the
conversation itself and asks with OpenAI's client, one turn or several, with or without tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal

import openai
import verifiers.v1 as vf
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from saying import said
from verifiers_tools import Shop

__all__ = ["Digits", "Loop"]


class Line(vf.TaskData):
    digit: str


class DigitsConfig(vf.TaskConfig):
    broken: bool = False


class Say(vf.Task[Line, vf.State, DigitsConfig]):
    @vf.reward(weight=0.5)
    async def a_digit(self, trace: vf.Trace[Any]) -> float:
        if self.config.broken:
            raise ZeroDivisionError("no such world")
        return float(any(c.isdigit() for c in trace.last_reply))

    @vf.reward
    async def the_digit(self, task: Line, trace: vf.Trace[Any]) -> float:
        return float(task.digit in trace.last_reply)

    @vf.metric
    async def length(self, trace: vf.Trace[Any]) -> float:
        return float(len(trace.last_reply))


class DigitsTasksetConfig(vf.TasksetConfig):
    task: DigitsConfig = DigitsConfig()
    tools: bool = False


class Digits(vf.Taskset[Say, DigitsTasksetConfig]):
    def load(self) -> Iterator[Say]:
        for digit in "1234":
            line = Line(prompt=f"Say {digit}.", system_prompt="Be brief.", digit=digit)
            yield Say(line, self.config.task)

    @classmethod
    def toolsets(cls, config: DigitsTasksetConfig) -> list[vf.Toolset]:
        return [Shop(vf.SharedToolsetConfig())] if config.tools else []


class LoopConfig(vf.HarnessConfig):
    turns: int = 1
    history: Literal["kept", "edited", "repeated"] = "kept"
    """What is sent with a further turn: all of it; all of it with other first words; or the
    question alone, again."""
    stream: bool = False
    stop: str | None = None
    crash: bool = False


class Loop(vf.Harness[LoopConfig]):
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(  # noqa: PLR0917
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        **_: Any,
    ) -> vf.ProgramResult:
        if self.config.crash:
            return vf.ProgramResult(exit_code=3, stdout="", stderr="the harness fell over")
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [
            {"role": "system", "content": system},
            {"role": "user", "content": prompt},
        ]
        servers = {"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0)
            )
            schemas, dispatch, connections = await connect_mcp(servers, stack)
            with suppress(openai.BadRequestError):
                await self._converse(client, messages, schemas, (connections, dispatch))
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    async def _converse(
        self,
        client: openai.AsyncOpenAI,
        messages: list[Any],
        schemas: list[Any],
        servers: tuple[dict[str, Any], dict[str, Any]],
    ) -> None:
        question = messages[1]["content"]
        more: dict[str, Any] = {"tools": schemas} if schemas else {}
        if self.config.stop is not None:
            more["stop"] = self.config.stop
        for turn in range(self.config.turns):
            if self.config.stream:
                async with client.chat.completions.stream(
                    model="policy", messages=messages, **more
                ) as events:
                    completion: Any = await events.get_final_completion()
            else:
                completion = await client.chat.completions.create(
                    model="policy", messages=messages, **more
                )
            reply = completion.choices[0].message
            messages.append(reply.model_dump(exclude_none=True))
            for call in reply.tool_calls or ():
                try:
                    arguments = json.loads(call.function.arguments)
                    content: Any = await call_mcp(*servers, call.function.name, arguments)
                except (ValueError, KeyError) as error:
                    content = f"error: {error}"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
            if not reply.tool_calls:
                messages.append({"role": "user", "content": "Again."})
            if self.config.history == "edited":
                messages[1]["content"] = f"{question} ({turn})"
            elif self.config.history == "repeated":
                del messages[2:]


def block(*, task: Any = None, tools: bool = False, **harness: Any) -> dict[str, Any]:
    """The `env` block of the environment."""
    taskset: dict[str, Any] = {"id": "verifiers-worlds", "tools": tools, "task": task or {}}
    agent = {"harness": {"id": "verifiers-worlds", **harness}, "runtime": {"type": "subprocess"}}
    return {"taskset": taskset, "agent": agent}


def environment(turns: int) -> Any:
    """The environment, from a function."""
    return vf.load_environment(vf.resolve_env_config(block(turns=turns)))


def nothing() -> str:
    return "no environment"


def traces(n: int = 320) -> Iterator[dict[str, Any]]:
    for trace in said("Say 1.", ["1", "2", "no", "3 4"], n):
        yield {"messages": [{"role": "system", "content": "Be brief."}, *trace["messages"]]}


def shop_traces(n: int = 320) -> Iterator[dict[str, Any]]:
    for trace in said("Say 1.", ["<code>tea</code>", "<code>a</code>", "1"], n):
        yield {"messages": [{"role": "system", "content": "Be brief."}, *trace["messages"]]}
