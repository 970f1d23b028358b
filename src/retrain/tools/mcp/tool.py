"""The tools of an MCP server, as any others; and what a config's `params` make of them."""

from __future__ import annotations

import importlib.util
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.importing import suggest
from retrain.tools.base import ToolError, ToolSession
from retrain.tools.mcp.arguments import Arguments
from retrain.tools.mcp.background import background
from retrain.tools.mcp.content import text_of
from retrain.tools.mcp.link import Address, Link, Process
from retrain.tools.mcp.server import NotConnected, Server
from retrain.types import UserError

if TYPE_CHECKING:
    from mcp.types import Tool as RemoteTool

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]")
LONGEST_NAME = 64


class Shared:
    """What the tools of one server have in common; the last of them that is closed ends it."""

    def __init__(
        self, link: Link, *, start_timeout_s: float, restarts: int, per_rollout: bool
    ) -> None:
        self.link = link
        self.start_timeout_s = start_timeout_s
        self.restarts = restarts
        self.per_rollout = per_rollout
        self.users = 0
        self.server = self.new_server()
        dropped = weakref.finalize(self, _drop, self.server, os.getpid())
        dropped.atexit = False

    def new_server(self) -> Server:
        """Not started yet."""
        return Server(
            self.link,
            start_timeout_s=self.start_timeout_s,
            restarts=self.restarts,
            stateful=self.per_rollout,
        )

    async def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            await background().finish(self.server.close())


def _drop(server: Server, pid: int) -> None:
    """Of tools that nobody closed and nobody has any more; a fork has none to close."""
    if os.getpid() == pid:
        background().submit(server.close())


class MCPTool:
    """One tool of a server, with its description and its schema.

    Arguments that do not fit the schema, or that the server refuses, are the model's fault. An
    error that the server answers with is the tool's. A server that died, or a connection that
    broke, is the infrastructure's: the next attempt connects again.
    """

    def __init__(
        self, shared: Shared, remote: RemoteTool, *, prefix: str, timeout_s: float | None
    ) -> None:
        self.name = _NOT_IN_A_NAME.sub("_", prefix + remote.name)[:LONGEST_NAME]
        self.description = remote.description or remote.title or ""
        self.parameters = _with_properties(remote.input_schema)
        self.timeout_s = timeout_s
        self.in_order: object = shared if shared.per_rollout else False
        self.remote_name = remote.name
        self.arguments = Arguments(self.parameters)
        self._shared = shared
        self._open = True
        shared.users += 1

    def session(self) -> ToolSession:
        return self.session_beside(())

    def session_beside(self, others: Iterable[ToolSession]) -> ToolSession:
        """A session of the rollout that has `others` open: of a server of its own it has one."""
        if not self._shared.per_rollout:
            return MCPSession(self, self._shared)
        for other in others:
            if isinstance(other, OwnServerSession) and other.own.shared is self._shared:
                return OwnServerSession(self, other.own)
        return OwnServerSession(self, OwnServer(self._shared))

    async def close(self) -> None:
        """The last tool of a server to be closed ends it."""
        if self._open:
            self._open = False
            await self._shared.release()


def _with_properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """As it is, but for what readers of schemas count on: `properties`, each a mapping."""
    properties = schema.get("properties") or {}
    named = {name: {} if one is True else one for name, one in properties.items()}
    return {"type": "object", **schema, "properties": named}


class MCPSession:
    """A rollout's calls of a tool, at the server that all rollouts share."""

    def __init__(self, tool: MCPTool, shared: Shared) -> None:
        self._tool = tool
        self._shared = shared

    async def ready(self) -> None:
        await _connect(self._shared.server)

    async def call(self, arguments: Mapping[str, Any]) -> str:
        return await _call(self._shared.server, self._tool, arguments)

    async def close(self) -> None:
        return None


class OwnServer:
    """A server for one rollout, started at its first call. When it is lost after it has answered,
    so is the rollout: its state is."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.server = shared.new_server()
        self.users = 0


class OwnServerSession:
    """A rollout's calls of a tool, at the rollout's own server."""

    def __init__(self, tool: MCPTool, own: OwnServer) -> None:
        self._tool = tool
        self.own = own
        own.users += 1

    async def ready(self) -> None:
        await _connect(self.own.server)

    async def call(self, arguments: Mapping[str, Any]) -> str:
        return await _call(self.own.server, self._tool, arguments)

    async def close(self) -> None:
        self.own.users -= 1
        if self.own.users == 0:
            await background().finish(self.own.server.close())


async def _connect(server: Server) -> None:
    if not server.connected:
        await background().wait(server.connect())


async def _call(server: Server, tool: MCPTool, arguments: Mapping[str, Any]) -> str:
    fitting = tool.arguments.fit(arguments)
    result = await background().wait(server.call(tool.remote_name, fitting))
    text = text_of(result)
    if result.is_error:
        raise ToolError(text)
    return text


def mcp(
    command: str | None = None,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    env_from: Mapping[str, str] | None = None,
    cwd: str | None = None,
    url: str | None = None,
    headers_env: Mapping[str, str] | None = None,
    sse: bool = False,
    tools: Sequence[str] | None = None,
    prefix: str = "",
    per_rollout: bool = False,
    start_timeout_s: float = 20.0,
    timeout_s: float | None = None,
    restarts: int = 3,
) -> list[MCPTool]:
    """The tools of an MCP server, which is started, or reached, and asked for them right away.

    A later change of the server's list is not followed. Needs the extra `retrain[mcp]`.

    Args:
        command, args: what starts a server that speaks over stdin and stdout.
        env: variables for it; of this process's own it gets PATH, HOME and the like only.
        env_from: more variables for it, such as a key: by its name for each, the variable of this
            process's environment that holds the value.
        cwd: where it runs.
        url: of a server that runs already (streamable HTTP), in place of `command`.
        headers_env: headers for it, by name: the environment variable that holds the value.
        sse: the url speaks the older SSE.
        tools: the server's names of those wanted; all of them if None.
        prefix: put before each name.
        per_rollout: a server (or, of a url, a connection) for each rollout, started at its first
            call, ended with it. For servers that keep state; calls then run one after the other.
        start_timeout_s: to start and list the tools.
        timeout_s: of one call; the runner's if None.
        restarts: how often, in a run, a server that died or hangs is started again; of a rollout's
            own server, in that rollout.

    Raises:
        UserError: it does not start in time, or lacks a tool that is wanted; or the parameters do
            not fit together.
    """
    if importlib.util.find_spec("mcp") is None:
        raise UserError("the tool mcp needs the package mcp", "Run: pip install 'retrain[mcp]'")
    _check_numbers(start_timeout_s, timeout_s, restarts)
    link = _link(
        command,
        url,
        args=args,
        env=env,
        env_from=env_from,
        cwd=cwd,
        headers_env=headers_env,
        sse=sse,
    )
    shared = Shared(
        link, start_timeout_s=start_timeout_s, restarts=restarts, per_rollout=per_rollout
    )
    found = _started(shared)
    try:
        chosen = _chosen(found, tools, link.label)
        return [MCPTool(shared, tool, prefix=prefix, timeout_s=timeout_s) for tool in chosen]
    except BaseException:
        background().run(shared.server.close())
        raise


def _check_numbers(start_timeout_s: float, timeout_s: float | None, restarts: int) -> None:
    if start_timeout_s <= 0 or restarts < 0 or (timeout_s is not None and timeout_s <= 0):
        raise UserError(
            f"tool 'mcp': start_timeout_s {start_timeout_s:g}, timeout_s {timeout_s}, "
            f"restarts {restarts}",
            "Times must be above 0, restarts at least 0.",
        )


def _link(
    command: str | None,
    url: str | None,
    *,
    args: Sequence[str],
    env: Mapping[str, str] | None,
    env_from: Mapping[str, str] | None,
    cwd: str | None,
    headers_env: Mapping[str, str] | None,
    sse: bool,
) -> Link:
    if (command is None) == (url is None):
        raise UserError(
            "tool 'mcp': set exactly one of command and url",
            "command starts a server (with args, env, env_from, cwd); url reaches one that runs.",
        )
    idle: dict[str, object] = {"headers_env": headers_env, "sse": sse}
    if url is not None:
        idle = {"args": args, "env": env, "env_from": env_from, "cwd": cwd}
    if given := [name for name, value in idle.items() if value]:
        raise UserError(
            f"tool 'mcp': {' and '.join(given)} does nothing with "
            f"{'command' if url is None else 'url'}",
            "Leave it out.",
        )
    if url is not None:
        return Address(url, _of_environment(headers_env, "headers_env"), sse)
    assert command is not None
    if cwd is not None and not Path(cwd).is_dir():
        raise UserError(f"tool 'mcp': there is no directory {cwd}", "Correct cwd.")
    variables = {name: str(value) for name, value in (env or {}).items()}
    from_ours = _of_environment(env_from, "env_from")
    if twice := variables.keys() & from_ours.keys():
        raise UserError(f"tool 'mcp': env and env_from both set {min(twice)}", "Leave one out.")
    return Process(command, [str(arg) for arg in args], variables | from_ours, cwd)


def _of_environment(named: Any, where: str) -> dict[str, str]:
    """By name, what a variable of this process's environment holds.

    Raises:
        UserError: it is not set, or `named` names none.
    """
    from retrain.engines.openai import read_key

    place = f"tool 'mcp': {where}"
    if not isinstance(named, Mapping | None):
        raise UserError(f"{place} is {named!r}", "Write {NAME: VARIABLE_OF_THIS_ENVIRONMENT}.")
    read = {}
    for name, variable in (named or {}).items():
        if not isinstance(name, str) or not isinstance(variable, str) or not variable:
            raise UserError(f"{place}.{name} is {variable!r}", "Give the name of a variable.")
        read[name] = read_key(variable, f"{place}.{name}") or ""
    return read


def _started(shared: Shared) -> Sequence[RemoteTool]:
    """The server's tools. A server that rollouts will have of their own ends again."""
    try:
        found = background().run(shared.server.list_tools())
    except NotConnected as error:
        words = error.words.replace("\n", "\n  ")
        next_step = f"Its last words on stderr:\n  {words}" if words else _advice(shared.link)
        raise UserError(f"tool 'mcp': {shared.link.label} {error}", next_step) from error
    except BaseException:
        background().submit(shared.server.close())
        raise
    if shared.per_rollout:
        background().run(shared.server.close())
    return found


def _advice(link: Link) -> str:
    if isinstance(link, Process):
        return "It wrote nothing to stderr. Is it an MCP server that speaks over stdin and stdout?"
    return "Does it run, and is the url that of its MCP endpoint (often it ends in /mcp)?"


def _chosen(
    found: Sequence[RemoteTool], wanted: Sequence[str] | None, label: str
) -> Sequence[RemoteTool]:
    if not found:
        raise UserError(f"tool 'mcp': {label} has no tools", "Use another server.")
    if wanted is None:
        return found
    by_name = {tool.name: tool for tool in found}
    for name in wanted:
        if name not in by_name:
            raise UserError(
                f"tool 'mcp': {label} has no tool '{name}'", suggest(name, by_name, "it has")
            )
    return [by_name[name] for name in dict.fromkeys(wanted)]
