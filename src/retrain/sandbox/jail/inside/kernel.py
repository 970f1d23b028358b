"""The kernel's own means of confinement, called through ctypes: nothing to install.

Every function raises OSError with the kernel's errno, naming the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Any

from .syscalls import number

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 24, 28
_PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE, _PR_CAP_AMBIENT = 38, 41, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_NOROOT_AND_LOCKED = 0b11_1111_0011
"""Securebits: uid 0 brings no capabilities, set-user-id fixes none; all of it for good."""

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 1 << 18

_MADV_COLLAPSE, _HUGE = 25, 2 << 20
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_NOTIF_RECV, _NOTIF_SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _REFER = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 13
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
READABLE = READ_FILE | READ_DIR
WRITABLE = (
    READABLE | WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER
)
"""Ordinary files and directories: no devices, sockets, pipes and links."""
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEV
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
"""File system rights that each version of Landlock added up to (`LANDLOCK_ACCESS_FS_*`)."""
_BIND_TCP_CONNECT_TCP = 3
_ABSTRACT_SOCKETS_SIGNALS = 3
_NO_LOG = 1


def syscall(name: str, *arguments: Any) -> int:
    value = number(name, os.uname().machine)
    if value is None:
        raise OSError(38, f"{name}: no such system call")
    return _checked(name, _libc.syscall(ctypes.c_long(value), *arguments))


def _checked(name: str, returned: int) -> int:
    if returned < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return returned


def _prctl(option: int, first: int = 0, second: int = 0) -> None:
    _checked(f"prctl({option})", _libc.prctl(option, first, second, 0, 0))


def close_from(lowest: int) -> None:
    """Close every descriptor from `lowest` on."""
    syscall("close_range", ctypes.c_uint(lowest), ctypes.c_uint(0xFFFFFFFF), 0)


def die_with_parent(parent: int) -> None:
    """SIGKILL when the parent ends. Lost by a change of uid: call it after that.

    Raises:
        OSError: `parent` is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        raise OSError(3, "the zygote has ended")


def no_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def not_dumpable() -> None:
    """No core file, and /proc/<pid> belongs to root: no other process of the user may look in."""
    _prctl(_PR_SET_DUMPABLE, 0)


def small_pages() -> None:
    """No new huge pages: a session that touches one byte would own two megabytes."""
    _prctl(_PR_SET_THP_DISABLE, 1)


def huge_pages() -> None:
    """Gather this process's own memory in huge pages, where the kernel can (6.1 and later).

    A fork then copies fewer page tables. It is done once, so it may take its time.
    """
    for line in _lines("/proc/self/maps"):
        region, rights, _, _, inode = line.split()[:5]
        if rights == "rw-p" and inode == "0":
            start, end = (int(address, 16) for address in region.split("-"))
            start, end = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if start < end:
                for piece in range(start, end, _HUGE):
                    _libc.madvise(ctypes.c_void_p(piece), ctypes.c_size_t(_HUGE), _MADV_COLLAPSE)


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return file.readlines()


def drop_capabilities() -> None:
    """All of them, from every set."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break
    with contextlib.suppress(OSError):  # without CAP_SETPCAP there is nothing to lock
        _prctl(_PR_SET_SECUREBITS, _NOROOT_AND_LOCKED)
    header = struct.pack("<Ii", 0x20080522, 0)
    _checked("capset", _libc.capset(header, bytes(24)))


def unshare(flags: int) -> None:
    _checked("unshare", _libc.unshare(flags))


def mount(source: bytes, target: bytes, kind: bytes, flags: int, options: bytes = b"") -> None:
    _checked("mount", _libc.mount(source, target, kind, flags, options))


def landlock_version() -> int:
    """The kernel's Landlock ABI version.

    Raises:
        OSError: it has none (before 5.13, or switched off).
    """
    return syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def landlock_ruleset(version: int, rules: Iterable[tuple[str, int]]) -> int:
    """The descriptor of a ruleset that forbids every access but what `rules` grant.

    Args:
        version: as `landlock_version` says.
        rules: a path, and the rights on it and below; what is not there is left out.
    """
    handled = next(_RIGHTS[v] for v in sorted(_RIGHTS, reverse=True) if v <= version)
    network = _BIND_TCP_CONNECT_TCP if version >= 4 else 0
    scoped = _ABSTRACT_SOCKETS_SIGNALS if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("<QQQ", handled, network, scoped)[:size]
    ruleset = syscall("landlock_create_ruleset", attributes, ctypes.c_size_t(size), 0)
    os.set_inheritable(ruleset, False)
    for path, rights in rules:
        _allow(ruleset, path, rights & handled)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _OF_FILES
        syscall("landlock_add_rule", ruleset, 1, struct.pack("<Qi", rights, fd), 0)
    finally:
        os.close(fd)


def landlock_enter(ruleset: int, version: int) -> None:
    """Confine this thread, and its descendants, for good."""
    syscall("landlock_restrict_self", ruleset, ctypes.c_uint32(_NO_LOG if version >= 7 else 0))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def seccomp_filter(program: bytes, *, listener: bool = False) -> int:
    """Install a filter for good; with `listener`, the descriptor that its questions come by."""
    structure = _Program(len(program) // 8, program)
    flags = _NEW_LISTENER if listener else 0
    return syscall("seccomp", _SET_MODE_FILTER, flags, ctypes.byref(structure))


def read_question(listener: int) -> tuple[int, int]:
    """The id of a question from a filter, and the thread that waits for the answer."""
    import fcntl

    buffer = bytearray(80)
    fcntl.ioctl(listener, _NOTIF_RECV, buffer)
    identity, thread = struct.unpack_from("<QI", buffer)
    return identity, thread


def answer_question(listener: int, identity: int, error: int = 0) -> None:
    """Let the call go on, or make it fail with `error`."""
    import fcntl

    answer = struct.pack("<QqiI", identity, 0, -error, 0 if error else _CONTINUE)
    fcntl.ioctl(listener, _NOTIF_SEND, bytearray(answer))
