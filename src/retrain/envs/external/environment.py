"""`type: external`: for each rollout a program of the user's runs, which asks the policy."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrain.envs.base import Agent, Environment
from retrain.envs.external.given import fill, session_variables, task_record
from retrain.envs.external.programs import Ended, Running
from retrain.envs.external.service import Service
from retrain.gateway.recorder import Policy, Recorder
from retrain.rendering import Renderer, ToolSchema
from retrain.types import (
    FailureKind,
    InfrastructureError,
    Message,
    Rollout,
    StopReason,
    Task,
    UserError,
)

TRY_AGAIN = 75
"""The exit code by which a program says that infrastructure of its own failed (`EX_TEMPFAIL`)."""

SHOWN_CHARS = 2000
"""Of the end of what a program printed, in an error."""

Cause = Literal["ended", "rewarded", "late", "failed"]
"""Why a program is over: by itself, by its reward call, by its time, or the policy has failed."""


class ProgramLate(InfrastructureError):
    """It did not end in its time; not tried again."""

    kind: FailureKind | None = "deadline"


class ExternalEnvironment(Environment):
    """Each rollout starts a program, and is over when it ends.

    The program finds the policy by the variables that the SDKs of OpenAI and Anthropic read, and
    its task in `RETRAIN_TASK`. What it says of its reward is that of the last turn. Its
    conversations, also several at a time, are branches of the one rollout.

    Args:
        command: the program and its arguments, in which `{prompt}` and names of metadata stand for
            those of the task; no shell reads it.
        function: instead, the import path of what is called with the task as a dictionary, in a
            process of its own that is forked from one which has imported it.
        preload: import the function's module once; False imports it for each task.
        working_dir: where programs run.
        env: further variables; None passes on this process's own value.
        pass_answer: the program is told the task's answer.
        timeout_s: of a program.
        kill_after_s: between SIGTERM and SIGKILL.
        ends_on_reward: its reward call ends a program.
        on_failure: `mask` counts a program that fails or is late, after the policy has spoken, as
            failed infrastructure; `score` counts its rollout as it stands.
        output_dir: keeps what each program printed.
        describe_tools: see `Recorder`.

    Raises:
        UserError: there is no such program, or a variable is missing.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        command: Sequence[str] | None = None,
        function: str | None = None,
        preload: bool = True,
        working_dir: str | None = None,
        env: Mapping[str, str | None] | None = None,
        pass_answer: bool = False,
        timeout_s: float = 600.0,
        kill_after_s: float = 5.0,
        ends_on_reward: bool = False,
        on_failure: Literal["mask", "score"] = "mask",
        output_dir: str | None = None,
        describe_tools: bool = False,
    ) -> None:
        self.renderer = renderer
        self.pass_answer = pass_answer
        self.timeout_s = timeout_s
        self.ends_on_reward = ends_on_reward
        self.on_failure = on_failure
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.describe_tools = describe_tools
        self.service = Service(
            command=command,
            function=function,
            preload=preload,
            working_dir=working_dir,
            env=env,
            kill_after_s=kill_after_s,
        )

    def starts(self, task: Task) -> Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]:
        """What the policy reads first is for the program to say."""
        return ()

    async def run(self, task: Task, agent: Agent) -> Rollout:
        """
        Raises:
            UserError: the program cannot be started, does not ask the policy, or failed before.
            InfrastructureError: the engine failed; or, with `on_failure: mask`, the program.
        """
        assert isinstance(agent, Policy)
        record = task_record(task, with_answer=self.pass_answer)
        command = None if self.service.command is None else fill(self.service.command, record)
        server = await self.service.started()
        recorder = Recorder(agent, task, self.renderer, describe_tools=self.describe_tools)
        rollout = agent.start(task)
        async with self.service.seat(recorder) as (url, seat):
            running = server.launch(
                command=command,
                task=record,
                variables=session_variables(url, seat.name, seat.key, record),
            )
            began = time.monotonic()
            try:
                cause = await self._watch(running, recorder)
                running.end()
                ended = await running.ended
            finally:
                running.end()
        seconds = time.monotonic() - began
        self._keep(ended, rollout.id)
        play = _Play(self, recorder, task, cause, ended)
        play.judge()
        play.enter(rollout, seconds)
        return rollout

    async def close(self) -> None:
        await self.service.close()

    async def _watch(self, running: Running, recorder: Recorder) -> Cause:
        """Wait until the program is over or is to be."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.timeout_s
        while True:
            stirred = asyncio.ensure_future(recorder.stirred.wait())
            either: set[asyncio.Future[Any]] = {running.ended, stirred}
            try:
                left = end - loop.time()
                await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stirred.cancel()
            recorder.stirred.clear()
            if recorder.failed is not None:
                return "failed"
            if running.ended.done():
                return "ended"
            if self.ends_on_reward and recorder.reward is not None:
                return "rewarded"
            if loop.time() >= end:
                return "late"

    def _keep(self, ended: Ended, rollout_id: str) -> None:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in rollout_id)
            (self.output_dir / f"{name}.txt").write_text(ended.output, encoding="utf-8")


@dataclass(frozen=True)
class _Play:
    """One program's run, once it is over."""

    world: ExternalEnvironment
    recorder: Recorder
    task: Task
    cause: Cause
    ended: Ended

    def judge(self) -> None:
        """
        Raises:
            UserError, InfrastructureError: see `ExternalEnvironment.run`.
        """
        ended, recorder = self.ended, self.recorder
        if recorder.failed is not None:
            raise recorder.failed
        if ended.fault is not None:
            raise UserError(f"{self._who()} failed: {ended.fault}", self._printed("Mend it."))
        if self.cause == "ended" and ended.code == TRY_AGAIN:
            raise InfrastructureError(self._failure())
        if recorder.turns == 0:
            self._judge_silence()
        elif self.cause == "late" and self.world.on_failure == "mask":
            raise ProgramLate(self._failure())
        elif (
            self.cause == "ended"
            and ended.code != 0
            and self.world.on_failure == "mask"
            and not self._full()
        ):
            raise InfrastructureError(self._failure())

    def _judge_silence(self) -> None:
        """The policy has said nothing, so that there is nothing to train on."""
        if self._full():
            raise UserError(
                f"{self._who()} opens with a prompt that leaves no room in the context",
                "Shorten it, or raise engine.context_limit if the model allows it.",
            )
        if self.cause == "late":
            raise ProgramLate(self._failure())
        if self.ended.code < 0 and self.cause == "ended":
            raise InfrastructureError(self._failure())
        if self.recorder.requests:
            said = f"was answered none of its {self.recorder.requests} requests"
        else:
            said = "ended without asking the model"
        raise UserError(
            f"{self._who()} {said} in task {self.task.id}; exit code {self.ended.code}",
            self._printed("It finds the model by OPENAI_BASE_URL or ANTHROPIC_BASE_URL."),
        )

    def _full(self) -> bool:
        """Whether the context limit left no room for a further turn: the program was told so."""
        last = self.recorder.last
        return last is not None and last.finish_reason == "context"

    def _who(self) -> str:
        return f"the program ({self.world.service.name})"

    def _failure(self) -> str:
        if self.cause == "late":
            how = f"did not end within {self.world.timeout_s:g} s (environment.timeout_s)"
        elif self.ended.code < 0:
            how = f"was killed by signal {-self.ended.code}"
        else:
            how = f"ended with exit code {self.ended.code}"
        asked = self.recorder.requests
        return self._printed(f"{self._who()} {how}, after {asked} requests.")

    def _printed(self, before: str) -> str:
        """With the end of what the program printed."""
        text = self.ended.output.strip()
        shown = text if len(text) <= SHOWN_CHARS else f"... {text[-SHOWN_CHARS:]}"
        return f"{before} It printed:\n{shown}" if shown else f"{before} It printed nothing."

    def enter(self, rollout: Rollout, seconds: float) -> None:
        """
        Raises:
            UserError: its reward, or a figure, is no number.
        """
        if self.cause == "ended":
            self._note()
        recorder = self.recorder
        recorder.enter(rollout)
        turns = len(rollout.model_messages)
        if turns == 0:
            raise InfrastructureError(f"{self._who()} was gone before it got the model's answer")
        rollout.env_rewards = [0.0] * (turns - 1) + [recorder.reward or 0.0]
        figures = {name: value for name, value in recorder.metadata.items() if _is_figure(value)}
        rollout.metrics |= {f"external/{name}": float(value) for name, value in figures.items()}
        rollout.metrics |= {
            "external/seconds": seconds,
            "external/requests": float(recorder.requests),
            "external/turns": float(turns),
        }
        if self.cause == "ended":
            rollout.metrics["external/exit_code"] = float(self.ended.code)
        rollout.stop_reason = self._stop_reason()

    def _note(self) -> None:
        """What the function returned counts like a reward call, the last one."""
        reward, metadata = self.ended.reward, self.ended.metadata
        if reward is not None and not math.isfinite(reward):
            raise UserError(
                f"{self._who()} returned the reward {reward}", "Return a finite number."
            )
        self.recorder.note(reward, metadata)

    def _stop_reason(self) -> StopReason:
        last = self.recorder.last
        reason = None if last is None else last.finish_reason
        if reason in ("length", "context"):
            return "length" if reason == "length" else "context"
        return "environment"


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
