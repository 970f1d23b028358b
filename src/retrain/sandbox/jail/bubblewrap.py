"""The command line that puts a zygote inside bubblewrap.

https://github.com/containers/bubblewrap
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from retrain.sandbox.jail.paths import Readable
from retrain.types import UserError

_NAMESPACES = ("--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts")


def bubblewrap_command(readable: Readable) -> list[str]:
    """`bwrap` and its options: only what sessions may read is there, read-only.

    Raises:
        UserError: bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise UserError(
            "sandbox.bubblewrap is on, but there is no bwrap here",
            "install it (Debian, Ubuntu: apt install bubblewrap), or turn it off",
        )
    command = [program, *_NAMESPACES, "--unshare-user-try", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in _needed(readable):
        command += ["--ro-bind", path, path]
    return [*command, "--dir", readable.workplace, "--chdir", "/", "--"]


def _needed(readable: Readable) -> list[str]:
    """Directories before what lies in them; what is covered by one of them is left out."""
    interpreter = [sys.executable, os.path.realpath(sys.executable)]
    loader = [path for path in ("/lib", "/lib64") if os.path.exists(path)]
    source = str(Path(__file__).parent / "inside")
    wanted = {*readable.readable, *readable.listable, *interpreter, *loader, source}
    chosen: list[str] = []
    for path in sorted(path for path in wanted if not path.startswith("/dev/")):
        if not any(path.startswith(f"{parent}/") for parent in chosen):
            chosen.append(path)
    return chosen
