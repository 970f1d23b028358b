"""`retrain gateway`: agents that are run by somebody else, answered and written down."""

from __future__ import annotations

import asyncio
import gzip
import os
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from retrain.config.gateway import GatewayConfig
from retrain.config.root import TrainingConfig
from retrain.engines import SamplingParams
from retrain.engines.base import Bounds, Engine
from retrain.engines.openai import read_key
from retrain.gateway.recorder import Recorder
from retrain.gateway.records import AppendOnly, RecordedSession, Records
from retrain.gateway.server import GatewayServer
from retrain.gateway.session import Session
from retrain.gateway.sessions import Sessions
from retrain.gateway.upstream import TextSession, Upstream
from retrain.gateway.variables import variables
from retrain.loops.engines import build_engine
from retrain.loops.interrupt import Interrupted, Stop
from retrain.loops.players import codec_of, make_renderer
from retrain.loops.world import build_renderer, describes_tools
from retrain.models import load_policy
from retrain.rendering import ToolSchema
from retrain.rollout.agent import EngineAgent
from retrain.tracking.rollouts import encode_rollout
from retrain.types import Message, Rollout, Task, UserError

SWEEP_S = 1.0
"""Between two looks for sessions that are over."""
PATIENCE_S = 5.0
"""With a command that is asked to end; then it is killed."""


@dataclass(frozen=True)
class Report:
    """What a gateway has served."""

    exchanges: int
    sessions: int
    rollouts: int
    exit_code: int
    """Of the command, where there was one; 1 where a session's end failed."""


async def serve(
    config: TrainingConfig,
    *,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Serve until SIGINT or SIGTERM, or until `command` ends, which finds its model by the
    environment variables of `variables`.

    Raises:
        UserError: a key, a file, a port or a model that cannot be had.
    """
    section = config.gateway
    assert section is not None
    keys = _keys(section)
    count = _Count()
    async with AsyncExitStack() as closing:
        records = Records(Path(section.records))
        closing.callback(records.close)
        make, ended = await _answering(config, section, count, closing)

        def open_session(name: str) -> Session:
            count.sessions += 1
            return RecordedSession(make(name), records, name)

        sessions = Sessions(open_session, ended, keys=keys, idle_s=section.idle_s)
        closing.callback(sessions.close)
        server = GatewayServer(
            sessions,
            host=section.host,
            port=section.port,
            models=_models(config, section),
            max_body_mb=section.max_body_mb,
        )
        await server.start()
        closing.push_async_callback(server.close)
        sweeping = asyncio.create_task(_sweep(sessions))
        closing.callback(sweeping.cancel)
        who = section.upstream.url if section.upstream else "the model of the config"
        say(f"gateway: {server.url} answers with {who}; records go to {records.path}")
        if not command:
            say(f"  OPENAI_BASE_URL={server.url}/v1  ANTHROPIC_BASE_URL={server.url}")
            say("  Ctrl-C ends it.")
        exit_code = 0
        with Stop() as stop:
            try:
                work = _command(command, server.url, keys) if command else _for_ever()
                exit_code = await stop.watch(work)
            except Interrupted as interrupted:
                exit_code = interrupted.exit_code if command else 0
    if sessions.failed:
        say(f"gateway: the end of {sessions.failed} sessions failed")
        exit_code = exit_code or 1
    return Report(records.exchanges, count.sessions, count.rollouts, exit_code)


@dataclass
class _Count:
    sessions: int = 0
    rollouts: int = 0


def _models(config: TrainingConfig, section: GatewayConfig) -> tuple[str, ...]:
    """What `/v1/models` lists; nothing where the upstream's model is the callers' choice."""
    if section.upstream is not None:
        return () if section.upstream.model is None else (section.upstream.model,)
    return (config.model.name_or_path or "policy",)


def _keys(section: GatewayConfig) -> list[str] | None:
    """
    Raises:
        UserError: the variable is not set, or holds none.
    """
    if section.keys_env is None:
        return None
    given = read_key(section.keys_env, "gateway.keys_env") or ""
    keys = [key.strip() for key in given.split(",") if key.strip()]
    if not keys:
        raise UserError(
            f"gateway.keys_env: {section.keys_env} holds no key", "Set it to one, or to several."
        )
    return keys


Make = Callable[[str], Session]
Ended = Callable[[str, Session], None]


async def _answering(
    config: TrainingConfig, section: GatewayConfig, count: _Count, closing: AsyncExitStack
) -> tuple[Make, Ended]:
    """What opens a session, and what is told of its end."""
    if section.upstream is None:
        return await _by_the_policy(config, section, count, closing)
    asked = section.upstream
    upstream = Upstream(
        asked.url,
        model=asked.model,
        api_key=read_key(asked.api_key_env, "gateway.upstream.api_key_env"),
        timeout_s=asked.timeout_s,
        retries=asked.retries,
        max_concurrency=asked.max_concurrency,
    )
    closing.push_async_callback(upstream.close)
    return (lambda name: TextSession(upstream)), (lambda name, session: None)


async def _by_the_policy(
    config: TrainingConfig, section: GatewayConfig, count: _Count, closing: AsyncExitStack
) -> tuple[Make, Ended]:
    rollouts = None
    if section.rollouts is not None:
        rollouts = AppendOnly(Path(section.rollouts), "gateway.rollouts")
        closing.callback(rollouts.close)
    policy = load_policy(config.model, seed=config.seed)
    engine = build_engine(config, policy)
    closing.push_async_callback(engine.close)
    await engine.prepare()
    await engine.start(Path(closing.enter_context(TemporaryDirectory())))
    if engine.version != 0:
        await engine.update_weights(0)
    renderer, describes = build_renderer(config, policy), describes_tools(config)
    if section.tool_format is not None:
        renderer = make_renderer(codec_of(policy), policy.tokenizer, section.tool_format)
        describes = True
    settings = config.algorithm.hyperparameters
    params = SamplingParams(settings.max_new_tokens, settings.temperature)

    ids = _Ids()

    def make(name: str) -> Session:
        own = ids.open(name)
        agent = EngineAgent(
            engine=engine,
            renderer=renderer,
            params=params,
            run_seed=config.seed,
            epoch=0,
            sample=0,
            rollout_id=own,
        )
        told = {"temperature": settings.temperature, "top_p": 1.0}
        return Recorder(
            _Visitor(agent, engine),
            Task(own, ()),
            renderer,
            settings=told,
            describe_tools=describes,
        )

    def ended(name: str, session: Session) -> None:
        assert isinstance(session, RecordedSession) and isinstance(session.inner, Recorder)
        own = ids.close(name)
        if rollouts is None or session.inner.turns == 0:
            return
        line = encode_rollout(_rollout(own, session.inner)).encode("ascii")
        rollouts.write(gzip.compress(line, compresslevel=1, mtime=0))
        count.rollouts += 1

    return make, ended


@dataclass
class _Ids:
    """What rollouts are called: as their session, and from its second time on `NAME~2`, ... ."""

    taken: dict[str, int] = field(default_factory=dict)
    """Times that a name was given out."""
    current: dict[str, str] = field(default_factory=dict)

    def open(self, name: str) -> str:
        own = name
        while own in self.taken:
            self.taken[name] += 1
            own = f"{name}~{self.taken[name]}"
        self.taken[own] = 1
        self.current[name] = own
        return own

    def close(self, name: str) -> str:
        return self.current.pop(name)


def _rollout(own: str, recorder: Recorder) -> Rollout:
    """A session as a rollout; the reward is what its caller said, at the last turn, and the metric
    `reward_given` whether it said one."""
    task = Task(own, (), metadata=dict(recorder.metadata))
    rollout = Rollout(id=own, task=task, stop_reason="environment")
    recorder.enter(rollout)
    turns = len(rollout.model_messages)
    rollout.reward = recorder.reward or 0.0
    rollout.metrics["reward_given"] = float(recorder.reward is not None)
    rollout.env_rewards = [0.0] * (turns - 1) + [rollout.reward] * (turns > 0)
    rollout.step_rewards = list(rollout.env_rewards)
    return rollout


@dataclass(frozen=True)
class _Visitor:
    """The policy of a session that leaves its place in the engine after every turn: any number of
    them may be open, for as long as they like."""

    agent: EngineAgent
    engine: Engine

    def start(self, task: Task) -> Rollout:
        return self.agent.start(task)

    async def act_within(
        self, rollout: Rollout, tools: Sequence[ToolSchema], bounds: Bounds
    ) -> Message:
        try:
            return await self.agent.act_within(rollout, tools, bounds)
        finally:
            await self.engine.end_session(rollout.id)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        sessions.sweep()


async def _for_ever() -> int:
    await asyncio.Event().wait()
    return 0


async def _command(command: Sequence[str], url: str, keys: Collection[str] | None) -> int:
    """Run a program that finds the gateway in its environment; its exit code, as shells have it:
    128 and the signal's number where one killed it.

    Raises:
        UserError: there is no such program.
    """
    key = next(iter(keys)) if keys else f"rk-{secrets.token_urlsafe(12)}"
    given = variables(url, None, key)
    try:
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **given})
    except OSError as error:
        raise UserError(
            f"{command[0]} cannot be started: {error.strerror}", "Check the command."
        ) from None
    try:
        code = await process.wait()
        return code if code >= 0 else 128 - code
    finally:
        if process.returncode is None:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
