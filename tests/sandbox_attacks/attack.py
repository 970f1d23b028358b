"""What an attack is, and the little language that they are written in."""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
ARM = os.uname().machine == "aarch64"

def syscall(x86, arm, *arguments):
    ctypes.set_errno(0)
    number = arm if ARM else x86
    if number is None:
        return -1
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return libc.syscall(ctypes.c_long(number), *wide)

def refused(x86, arm, *arguments):
    "The call must not get past the filter: only its errno, EPERM, or ENOSYS for clone3."
    returned, code = syscall(x86, arm, *arguments), ctypes.get_errno()
    if (arm if ARM else x86) is not None and (returned >= 0 or code not in (1, 38)):
        print("BREACH: call", x86, "returned", returned, "errno", code)

def attempt(name, function):
    try:
        value = function()
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        return error
    print("BREACH:", name, repr(value)[:200])
"""
"""Comes before every attack. `BREACH` in the output is the attack's own word that it got through;
the test checks the rest of the machine as well."""


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    status: tuple[str, ...] = ("ok",)
    """How the call may end."""
    idle: bool = False
    """The session lives on and must use no processor time until the next call."""
    scribbles: bool = False
    """Its own threads may write over what the next call prints."""
    shows: str = ""
    """What a contained attack prints, where its silence could mean that it never ran."""


ENDS = ("ok", "error", "exit", "timeout", "memory", "output", "killed")
"""For an attack that may end as it likes, as long as nothing outside notices."""
