"""The environment that is a user's program, from its config section."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from retrain.config.external import ExternalConfig
from retrain.envs.external import ExternalEnvironment
from retrain.envs.external.service import Service
from retrain.rendering import Renderer


def build_external(section: ExternalConfig, renderer: Renderer) -> ExternalEnvironment:
    """
    Raises:
        UserError: there is no such program, file or variable.
    """
    return ExternalEnvironment(
        renderer,
        command=section.command,
        function=section.function,
        preload=section.preload,
        working_dir=section.working_dir,
        env=section.env,
        pass_answer=section.pass_answer,
        timeout_s=section.timeout_s,
        kill_after_s=section.kill_after_s,
        ends_on_reward=section.ends_on_reward,
        on_failure=section.on_failure,
        output_dir=section.output_dir,
        describe_tools=section.describe_tools,
    )


def describe_external(section: ExternalConfig) -> str:
    """One line on what runs. A function is imported, in a process of its own; nothing is called.

    Raises:
        UserError: as `build_external`, or the function cannot be used.
    """
    service = Service(
        command=section.command,
        function=section.function,
        preload=section.preload,
        working_dir=section.working_dir,
        env=section.env,
    )
    with ThreadPoolExecutor(1) as thread:  # there may be a running event loop in this one
        thread.submit(asyncio.run, service.check()).result()
    found = "" if service.program is None else f" ({service.program})"
    return f"{service.name}{found}; at most {section.timeout_s:g} s; failures: {section.on_failure}"
