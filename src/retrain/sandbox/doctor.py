"""What `retrain doctor` says of sandboxes: which work here, how they confine, what would help."""

from __future__ import annotations

from collections.abc import Callable

from retrain.sandbox.base import Capabilities, Sandbox, SandboxUnavailable
from retrain.sandbox.http.sandbox import HttpSandbox
from retrain.sandbox.jail.sandbox import JailSandbox
from retrain.sandbox.monty import MontySandbox
from retrain.types import UserError

_ADVICE = {
    "jail": "needs Linux 5.13 or newer with Landlock and seccomp, on x86_64 or aarch64 (inside a "
    "container: a seccomp profile that allows the landlock_* calls, as current Docker's does)",
    "jail, writable": "needs mount namespaces: unprivileged user namespaces switched on "
    "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), "
    "or CAP_SYS_ADMIN",
    "jail, bubblewrap": "apt install bubblewrap (hides the rest of the file system and of the "
    "machine's processes from the jail)",
    "monty": "pip install pydantic-monty",
}


async def report(url: str | None = None) -> str:
    """A line or more for each executor; every one that can be tried here is tried.

    Args:
        url: of a server to try as `http`.
    """
    tries: dict[str, Callable[[], Sandbox]] = {
        "jail": JailSandbox,
        "jail, writable": lambda: JailSandbox(packages=(), writable=True),
        "jail, bubblewrap": lambda: JailSandbox(packages=(), bubblewrap=True),
        "monty": MontySandbox,
    }
    if url is not None:
        tries["http"] = lambda: HttpSandbox(url)
    lines = ["sandboxes, strongest first (auto takes the first of jail and monty that works):"]
    working = []
    for name, make in tries.items():
        outcome, works = await _try(make)
        lines.append(f"  {name}: {outcome}")
        if works:
            working.append(name)
        elif name in _ADVICE:
            lines.append(f"    {_ADVICE[name]}")
    if url is None:
        lines.append("  http: not tried; retrain doctor --sandbox-url URL tries a server")
    chosen = next((name for name in ("jail", "monty") if name in working), None)
    lines.append(f"auto: {chosen or 'none works, so no code of a model would run'}")
    return "\n".join(lines)


async def _try(make: Callable[[], Sandbox]) -> tuple[str, bool]:
    sandbox = make()
    try:
        await sandbox.start()
    except (UserError, SandboxUnavailable) as error:
        reason = error.cause if isinstance(error, UserError) else str(error)
        return f"does not work here: {' '.join(reason.split())}", False
    finally:
        await sandbox.close()
    return f"works. {_describe(sandbox.capabilities)}", True


def _describe(can: Capabilities) -> str:
    python = "full Python" if can.full_python else "a subset of Python"
    packages = f" with {', '.join(can.packages)}" if can.packages else ""
    memory = "variables last from call to call" if can.stateful else "every call starts afresh"
    return f"{python}{packages}; {memory}. Between code and machine: {can.isolation}"
