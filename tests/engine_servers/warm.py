"""Server processes that need not import anything first: one that has forks them.

`with warm() as variables:` starts it; servers launched with these variables in their environment
hand themselves over. The process launched and the fork live and die together.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "ENGINE_SERVER_WARM"
"""Environment variable with the address of the process that forks."""

TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def warm() -> Iterator[dict[str, str]]:
    """Variables for the environment of servers; none where this cannot be had."""
    if not hasattr(os, "pidfd_open"):
        yield {}
        return
    with tempfile.TemporaryDirectory() as directory:
        address = str(Path(directory, "s"))
        path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
        forker = subprocess.Popen(
            [sys.executable, "-m", "engine_servers.warm", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert forker.stdin is not None and forker.stdout is not None
        with forker:
            assert forker.stdout.readline() == b"ready\n"
            try:
                yield {SOCKET: address}
            finally:
                forker.stdin.close()
                forker.wait()


def hand_over(dialect: str) -> NoReturn:
    """Be a fork from now on, with this process's arguments, environment and output."""
    asked = json.dumps({"dialect": dialect, "argv": sys.argv, "environment": dict(os.environ)})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        socket.send_fds(connection, [asked.encode() + b"\n"], [1, 2])
        code = connection.recv(16)
    os._exit(int(code or b"1"))


def main(address: str) -> None:
    import peft  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3ForCausalLM,
    )

    from engine_servers.server import EngineServer  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as waiting:
        listener.bind(address)
        listener.listen(16)
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(0, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in waiting.select():
                if key.fileobj == 0:
                    return
                if key.fileobj is listener:
                    _fork(listener, waiting)
                else:
                    _end(waiting, *key.data)


def _fork(listener: socket.socket, waiting: selectors.BaseSelector) -> None:
    connection, _ = listener.accept()
    text, outputs, *_ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        try:
            _serve(json.loads(text), outputs)
        finally:
            os._exit(1)
    for output in outputs:
        os.close(output)
    handle = os.pidfd_open(pid)
    ending = (pid, handle, connection)
    waiting.register(connection, selectors.EVENT_READ, ending)
    waiting.register(handle, selectors.EVENT_READ, ending)


def _serve(asked: dict[str, Any], outputs: list[int]) -> None:
    from engine_servers.launch import main as serve

    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    sys.argv = asked["argv"]
    os.environ.clear()
    os.environ.update({k: v for k, v in asked["environment"].items() if k != SOCKET})
    serve(asked["dialect"])


def _end(waiting: selectors.BaseSelector, pid: int, handle: int, connection: socket.socket) -> None:
    """The process launched is gone, or the fork is: the other one follows."""
    if handle not in waiting.get_map():
        return
    waiting.unregister(handle)
    waiting.unregister(connection)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())
    connection.close()
    os.close(handle)


if __name__ == "__main__":
    main(sys.argv[1])
