"""Runs a command until it ends, or until whoever started this does; then nothing of it is left.

Started as a script: `python -I keeper.py COMMAND...`. Its standard input is a pipe whose other end
only the starter holds: it ends with the starter, however that dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""Between asking the command to end and killing it."""

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, where it can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(command: list[str]) -> int:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - there is one thread yet
    )

    def signal_all(number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)

    def stop() -> None:
        signal_all(signal.SIGCONT)  # what is stopped would not hear of it
        child.terminate()  # it ends its own workers, in the order that lets them clean up
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            signal_all(signal.SIGKILL)

    def wait_for_the_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        stop()

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stop, daemon=True).start())
    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    code = child.wait()
    signal_all(signal.SIGKILL)
    return code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]) & 0xFF)
