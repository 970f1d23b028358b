"""The two servers as processes of their own, with the command lines of the real ones."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

from engine_servers.knobs import VARIABLE, KnobFile, Knobs
from engine_servers.warm import SOCKET, hand_over

FAKE = Path(__file__).parent / "fake"
"""What makes `python -m vllm.entrypoints.openai.api_server` and `python -m sglang.launch_server`
mean these servers, on PYTHONPATH."""


def environment(knobs: Path | None = None, **more: str) -> dict[str, str]:
    """This process's environment, with the two packages in front and a file of knobs."""
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(FAKE), *([before] if before else [])])
    named = {} if knobs is None else {VARIABLE: str(knobs)}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **named, **more}


def free_port() -> int:
    """One that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def flags(arguments: list[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and `--key`, whatever the keys; underscores are dashes."""
    found: dict[str, str] = {}
    key = ""
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("_", "-")
            found[key] = value if equals else ""
        elif key:
            found[key] = f"{found[key]} {argument}".strip()
    return found


def main(dialect: Literal["vllm", "sglang"]) -> None:
    if SOCKET in os.environ:
        hand_over(dialect)
    given = flags(sys.argv[1:])
    knob_file = KnobFile(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None
    knobs = Knobs()
    if knob_file is not None:
        knob_file.bind(knobs)
        knob_file.read()
    if knobs.exit_at_start is not None:
        print("told not to come up", file=sys.stderr, flush=True)
        raise SystemExit(knobs.exit_at_start)
    time.sleep(knobs.start_delay_s)
    _serve(dialect, given, knob_file)


def _serve(
    dialect: Literal["vllm", "sglang"], given: dict[str, str], knob_file: KnobFile | None
) -> None:
    from engine_servers.server import EngineServer

    directory = given.get("model") or given["model-path"]
    limit = given.get("max-model-len") or given.get("context-length")
    options: dict[str, Any] = {}
    if dialect == "vllm":
        # vLLM's own defaults.
        options["logprobs_mode"] = given.get("logprobs-mode", "raw_logprobs")
        options["cache_prefixes"] = "no-enable-prefix-caching" not in given
    else:
        options["cache_prefixes"] = "disable-radix-cache" not in given
    rank = int(given.get("max-lora-rank") or 16)  # vLLM's default
    server = EngineServer(
        directory,
        dialect,
        name=(given.get("served-model-name") or directory).split(" ")[0],
        environment=os.environ,
        context_limit=int(limit) if limit else None,
        host=given.get("host") or "127.0.0.1",
        port=int(given.get("port") or (8000 if dialect == "vllm" else 30000)),
        lora_rank=rank if "enable-lora" in given else 0,
        knob_file=knob_file,
        may_die=True,
        **options,
    )
    with server:
        print(f"{dialect} serves {directory} on {server.url}, pid {os.getpid()}", flush=True)
        server.wait()
