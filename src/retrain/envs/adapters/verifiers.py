"""Environments of the package `verifiers` 0.4, which run their own rollouts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from retrain.envs.base import Agent, Environment
from retrain.gateway.ask import RequestRefused
from retrain.gateway.recorder import Policy, Recorder
from retrain.gateway.server import GatewayServer
from retrain.gateway.session import Session
from retrain.importing import import_object
from retrain.rendering import Renderer
from retrain.rewards.failures import describe_rollout
from retrain.types import InfrastructureError, Message, MessageType, Rollout, Task, UserError

COLUMN = "verifiers"
"""The metadata column that holds a task's own data."""

_INFRASTRUCTURE = (
    "ProviderError",
    "HarnessError",
    "ToolsetError",
    "SandboxError",
    "InterceptionError",
    "TunnelError",
)
"""The package's names for what fails around an environment; anything else is the environment's own
code."""

_START_S = 300.0
"""How long an environment's servers may take to start."""


class VerifiersEnvironment(Environment):
    """`type: verifiers`: an episode of a `verifiers.v1.Env` a rollout.

    The environment runs as it is: its harness, tools, stops and scoring are its own. Its harness
    finds the policy at a local chat endpoint; each answer is the policy's turn, token for token
    (see `Recorder`). The sampling settings are the run's, whatever the harness asks for. A
    trace's reward goes to its last turn; `verifiers/<name>` among the rollout's metrics are its
    rewards before their weights, and its metrics. Where an episode has several traces of the
    policy, each is a branch of the one rollout; those of agents that do not train are left out.

    Scoring and hooks that raise are the user's to mend; the harness, tool servers and sandboxes are
    infrastructure.

    Args:
        renderer: of the policy.
        env: the package's own `env` block.
        path, params: instead, the import path of a function that returns the environment, and its
            keyword arguments.

    Raises:
        UserError: there is no such environment, or the package is missing.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        env: Mapping[str, Any] | None = None,
        path: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.renderer = renderer
        self.env = load(env, path, params)
        self._service = _Service(self.env)

    async def run(self, task: Task, agent: Agent) -> Rollout:
        """
        Raises:
            UserError: the environment's own code raised, or the task is not one of its own.
            InfrastructureError: what it runs on failed.
        """
        rollout = agent.start(task)
        with self._blamed("run", lambda: describe_rollout(rollout)):
            own = _own_task(self.env, task)
            await self._service.start()
            assert isinstance(agent, Policy)
            episode = _Episode(task, agent, self.renderer, self._service.traces)
            played = await episode.play(self.env, own, self._service.context)
            _check(played, episode)
            episode.enter(played, rollout)
        return rollout

    async def close(self) -> None:
        await self._service.close()


class _Traces:
    """A `SessionBook`: each trace under way by its id, all with one key."""

    def __init__(self) -> None:
        self.key = f"rk-{secrets.token_urlsafe(24)}"
        self.sessions: dict[str, Recorder] = {}

    def check(self, *, name: str | None, key: str | None) -> None:
        """
        Raises:
            RequestRefused: as `find`.
        """
        self.find(name=name, key=key)

    def find(self, *, name: str | None, key: str | None) -> Session:
        """
        Raises:
            RequestRefused: the key is wrong, or there is no such trace.
        """
        if not secrets.compare_digest((key or "").encode(), self.key.encode()):
            raise RequestRefused("unknown caller", status=401)
        if name not in self.sessions:
            raise RequestRefused("there is no such rollout, or it is over", status=404)
        return self.sessions[name]


class _Service:
    """What all rollouts share: the environment's servers, and the endpoint of the policy."""

    def __init__(self, env: Any) -> None:
        from verifiers.v1.clients.client import SESSION_ID_HEADER

        self._env = env
        self.traces = _Traces()
        self.server = GatewayServer(self.traces, session_header=SESSION_ID_HEADER)
        self.context: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._over = asyncio.Event()

    async def start(self) -> None:
        """Once; all callers wait for it.

        Raises:
            InfrastructureError, UserError: a server did not start.
        """
        if self._serving is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve())
        assert self._ready is not None
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise InfrastructureError(
                f"the environment's servers did not start within {_START_S:g} s"
            ) from None

    async def close(self) -> None:
        self._over.set()
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)

    async def _serve(self) -> None:
        """One task begins and ends it: what the environment opens is bound to a task."""
        from verifiers.v1 import EvalClientConfig, ModelContext

        assert self._ready is not None
        try:
            await self.server.start()
            async with self._env.serving():
                client = EvalClientConfig(
                    base_url=f"{self.server.url}/v1",
                    api_key_var="RETRAIN_POLICY_KEY",
                    headers={"x-api-key": self.traces.key},
                )
                self.context = ModelContext(model="policy", client=client)
                self._ready.set_result(None)
                await self._over.wait()
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(_fault(type(error).__name__, str(error)))
        finally:
            await self.server.close()


class _Episode:
    """One episode's traces, each a session of the gateway."""

    def __init__(self, task: Task, agent: Policy, renderer: Renderer, traces: _Traces) -> None:
        self._task = task
        self._agent = agent
        self._renderer = renderer
        self._traces = traces
        self._lock = asyncio.Lock()
        self._stirred = asyncio.Event()
        self.recorders: dict[str, Recorder] = {}

    async def play(self, env: Any, task: Any, context: Any) -> Any:
        """The episode, once it is over.

        Raises:
            UserError, InfrastructureError: as soon as the policy could not answer.
        """
        work = asyncio.ensure_future(env.run_episode(task, context, on_trace=self._sit))
        stirred = asyncio.ensure_future(self._stirred.wait())
        try:
            await asyncio.wait({work, stirred}, return_when=asyncio.FIRST_COMPLETED)
            for recorder in self.recorders.values():
                if recorder.failed is not None:
                    raise recorder.failed
            return await work
        finally:
            stirred.cancel()
            if not work.done():
                work.cancel()
                with suppress(BaseException):
                    await asyncio.gather(work, return_exceptions=True)
            for name in self.recorders:
                self._traces.sessions.pop(name, None)

    def _sit(self, trace: Any) -> None:
        self.recorders[trace.id] = self._traces.sessions[trace.id] = Recorder(
            self._agent,
            self._task,
            self._renderer,
            describe_tools=False,
            lock=self._lock,
            number=len(self.recorders),
            stirred=self._stirred,
        )

    def full(self, trace: Any) -> bool:
        """Whether the context limit cut the trace short."""
        last = self.recorders[trace.id].last
        return last is not None and last.finish_reason == "context"

    def enter(self, played: Any, rollout: Rollout) -> None:
        """
        Raises:
            UserError: the policy said nothing that could be rewarded.
        """
        entered = [t for t in played.traces if t.agent.trainable and self.recorders[t.id].last]
        if not entered:
            raise UserError(
                f"the environment's harness did not ask the policy for anything in task "
                f"{self._task.id}",
                "Let an agent that trains ask the run's model, without a client of its own.",
            )
        for trace in entered:
            before = len(rollout.model_messages)
            self.recorders[trace.id].enter(rollout)
            turns = len(rollout.model_messages) - before
            rollout.env_rewards += [0.0] * (turns - 1) + [float(trace.reward)]
            place = "" if len(entered) == 1 else f"{trace.agent.name}/"
            figures = {name: r and r.score for name, r in trace.rewards.items()} | trace.metrics
            for name, value in figures.items():
                if value is not None:
                    rollout.metrics[f"verifiers/{place}{name}"] = float(value)
        last = self.recorders[entered[-1].id].last
        assert last is not None
        rollout.stop_reason = (
            "length" if last.finish_reason == "length"
            else "context" if last.finish_reason == "context"
            else "max_steps" if entered[-1].stop_condition == "max_turns"
            else "answered" if entered[-1].stop_condition == "agent_completed"
            else "environment"
        )  # fmt: skip


def load(
    env: Mapping[str, Any] | None = None,
    path: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> Any:
    """The `verifiers.v1.Env` of an `env` block, or that a function returns.

    Raises:
        UserError: there is none, or the package is missing.
    """
    try:
        import verifiers.v1 as vf
    except ImportError as error:
        raise UserError(
            "environment.type verifiers needs the package verifiers, 0.4 or later",
            "Run: pip install 'retrain[verifiers]'",
        ) from error
    where = "environment.env" if path is None else f"environment.path: {path}"
    function: Any = None if path is None else import_object(path, "environment")
    try:
        if function is None:
            made: Any = vf.load_environment(vf.resolve_env_config(dict(env or {})))
        else:
            made = function(**(params or {}))
    except Exception as error:
        raise UserError(
            f"{where} makes no environment: {type(error).__name__}: {error}",
            "A taskset or harness is named by the module that exports its class in __all__.",
        ) from error
    if not isinstance(made, vf.Env):
        raise UserError(
            f"{where} gave {type(made).__name__}, not a verifiers.v1.Env", "Return one."
        )
    return made


def tasks(
    env: Mapping[str, Any] | None = None,
    path: str | None = None,
    params: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Iterator[Task]:
    """A prompt source: the tasks of an environment's taskset, at most `limit`.

    Raises:
        UserError: there is no such environment, or it has tasks without end and `limit` is None.
    """
    taskset = load(env, path, params).taskset
    if limit is None and not taskset.bounded:
        raise UserError(
            f"{type(taskset).__name__} has tasks without end", "Set prompt_source.params.limit."
        )
    for task in taskset if limit is None else taskset.take(limit):
        own = task.key
        yield Task(
            own[:16] if own == task.hash else own,
            tuple(_prompt(task)),
            metadata={COLUMN: task.data.model_dump(mode="json")},
        )


def _prompt(task: Any) -> Sequence[Message]:
    """What the task says; where the environment is to open the conversation, what describes it."""
    from verifiers.v1.types import content_text

    data, messages = task.data, []
    if data.system_prompt:
        messages.append(Message(data.system_prompt, MessageType.SYSTEM))
    given = data.prompt or data.description or data.name or task.key
    if isinstance(given, str):
        return [*messages, Message(given, MessageType.MESSAGE)]
    for message in given:
        kind = MessageType.SYSTEM if message.role == "system" else MessageType.MESSAGE
        role = None if message.role in ("system", "user") else message.role
        messages.append(Message(content_text(message.content), kind, role=role))
    return messages


def _own_task(env: Any, task: Task) -> Any:
    """The package's task, made again from its data as its own server does it.

    Raises:
        UserError: the task is not one of `tasks`.
    """
    data = task.metadata.get(COLUMN)
    if not isinstance(data, Mapping):
        raise UserError(
            f"task {task.id} has no column {COLUMN!r} with its own data",
            "Use prompt_source.type python with function retrain.envs.adapters.verifiers:tasks.",
        )
    kind = type(env.taskset).task_type()
    return kind(kind.data_type().model_validate(dict(data)), env.taskset.config.task)


def _check(played: Any, episode: _Episode) -> None:
    """
    Raises:
        InfrastructureError, UserError: the episode, or one of its traces, failed.
    """
    failed = [trace for trace in played.traces if not trace.ok and not episode.full(trace)]
    errors = [*played.errors, *(trace.last_error for trace in failed if trace.last_error)]
    if errors:
        raise _fault(errors[0].type, errors[0].message)


def _fault(kind: str, message: str) -> InfrastructureError | UserError:
    if kind in _INFRASTRUCTURE:
        return InfrastructureError(f"{kind}: {message}")
    return UserError(f"the environment failed: {kind}: {message}", "Mend the environment.")
