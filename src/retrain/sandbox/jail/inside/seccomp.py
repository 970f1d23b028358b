"""The system calls that jailed code may make: an allow-list, compiled to a seccomp filter.

Whatever is not listed fails with EPERM; `clone3` fails with ENOSYS, so that the C library falls
back to `clone`, whose flags a filter can read. Paths cannot be read by a filter: they are
Landlock's matter.

https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .syscalls import AUDIT_ARCH, number

ALLOW = 0x7FFF0000
ASK = 0x7FC00000
"""`SECCOMP_RET_USER_NOTIF`: the zygote decides."""
KILL = 0x80000000
_ERRNO = 0x00050000
DENY = _ERRNO | errno.EPERM

_LOAD, _AND, _EQUAL, _ABOVE, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
_NUMBER, _ARCH, _ARGS = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
_X32 = 0x40000000
"""Bit of the x32 system calls of x86_64, which would pass by other numbers."""

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True)
class Check:
    """The low 32 bits of one argument, masked, are one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    high: bool = False
    """The high 32 bits are looked at too, and must be 0."""


_PLAIN = """
    read write readv writev pread64 pwrite64 preadv pwritev close open openat
    stat lstat fstat newfstatat statx lseek access faccessat faccessat2 readlink readlinkat
    getdents64 getcwd chdir fchdir statfs fstatfs
    munmap mprotect mremap brk mincore
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend
    sigaltstack restart_syscall pause alarm setitimer getitimer
    dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
    epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
    shutdown getsockname getpeername
    sched_yield sched_getaffinity set_robust_list set_tid_address rseq
    getpid gettid getppid getuid geteuid getgid getegid getgroups getresuid getresgid
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
    getrlimit sysinfo uname getrandom umask arch_prctl exit exit_group
""".split()

_WRITING = """
    ftruncate fsync fdatasync mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
""".split()
"""Only for sessions with a file system of their own. Not chmod, chown, utime and xattr, which
Landlock does not see, and no links."""

_THREAD_FLAGS = 0x00000100 | 0x00000200 | 0x00000400 | 0x00000800 | 0x00010000
"""CLONE_VM | FS | FILES | SIGHAND | THREAD."""
_THREAD_EXTRAS = 0x00040000 | 0x00080000 | 0x00100000 | 0x00200000 | 0x00400000 | 0x01000000
"""CLONE_SYSVSEM | SETTLS | PARENT_SETTID | CHILD_CLEARTID | DETACHED | CHILD_SETTID."""

_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, 0o2000000 | 0o4000
_MSG_OOB = 1
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x1, 0x20, 0x40000

_CHECKED: dict[str, tuple[Check, ...]] = {
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (Check(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC: not SETOWN, SETSIG, SETPIPE_SZ, NOTIFY
    "fcntl": (Check(1, (0, 1, 2, 3, 4, 1030)),),
    # NORMAL to DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, DONTDUMP, DODUMP
    "madvise": (Check(2, (0, 1, 2, 3, 4, 8, 14, 15, 16, 17)),),
    # memory that is shared and has no file stays when all but a page of it is unmapped: the limit
    # on address space does not see it
    "mmap": (
        Check(
            3,
            (0, _MAP_SHARED, _MAP_ANONYMOUS),
            mask=_MAP_SHARED | _MAP_ANONYMOUS | _MAP_HUGETLB,
        ),
    ),
    # none or CLOEXEC: with UNSHARE each thread would have a table of descriptors
    "close_range": (Check(2, (0, 4)),),
    # WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET: no priorities, which name
    # threads of other processes
    "futex": (Check(1, (0, 1, 3, 4, 5, 9, 10), mask=0x7F),),
    # PR_SET_NAME, PR_GET_NAME
    "prctl": (Check(0, (15, 16)),),
    # one's own limits only
    "prlimit64": (Check(0, (0,)),),
    # asyncio's way to wake itself; a datagram socket could write to any other
    "socketpair": (Check(0, (_AF_UNIX,)), Check(1, (_SOCK_STREAM,), mask=~_SOCK_FLAGS & 2**32 - 1)),
    # without an address, nothing urgent
    "sendto": (Check(4, (0,), high=True), Check(3, (0,), mask=_MSG_OOB)),
    "recvfrom": (Check(3, (0,), mask=_MSG_OOB),),
    # of SOL_SOCKET: TYPE, ERROR, SNDBUF, RCVBUF, ACCEPTCONN, PROTOCOL, DOMAIN; not who is the peer
    "getsockopt": (Check(1, (1,)), Check(2, (3, 4, 7, 8, 30, 38, 39))),
    # threads only
    "clone": (Check(0, (_THREAD_FLAGS,), mask=~_THREAD_EXTRAS & 2**32 - 1),),
}
_LOCKS_TOO = Check(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030))


def session_filter(machine: str, *, writable: bool) -> bytes:
    """The filter of a session, as an array of `struct sock_filter`."""
    plain = [*_PLAIN, *(_WRITING if writable else ())]
    checked = dict(_CHECKED)
    if writable:
        checked["fcntl"] = (_LOCKS_TOO,)
    program = _prologue(machine)
    for name, checks in checked.items():
        program += _when(number(name, machine), [*_checks(checks), _return(ALLOW)])
    program += _when(number("clone3", machine), [_return(_ERRNO | errno.ENOSYS)])
    numbers = sorted(n for n in (number(name, machine) for name in plain) if n is not None)
    return _assemble([*program, *_search(_ranges(numbers))])


def clone_filter(machine: str) -> bytes:
    """A filter that asks about `clone` and allows the rest; `session_filter` comes on top."""
    program = _prologue(machine)
    program += _when(number("clone", machine), [_return(ASK)])
    return _assemble([*program, _return(ALLOW)])


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    ranges: list[tuple[int, int]] = []
    for value in numbers:
        if ranges and ranges[-1][1] == value - 1:
            ranges[-1] = (ranges[-1][0], value)
        else:
            ranges.append((value, value))
    return ranges


def _search(ranges: Sequence[tuple[int, int]]) -> list[Instruction]:
    """Binary search for the loaded number: ALLOW in one of the ranges, else DENY.

    When a filter is installed, the kernel runs it for every system call there is, to remember
    which are always allowed; a search in a line would be most of what locking in costs.
    """
    if len(ranges) == 1:
        [(first, last)] = ranges
        return [(_AT_LEAST, 0, 2, first), (_ABOVE, 1, 0, last), _return(ALLOW), _return(DENY)]
    middle = len(ranges) // 2
    below, rest = _search(ranges[:middle]), _search(ranges[middle:])
    return [(_AT_LEAST, len(below), 0, ranges[middle][0]), *below, *rest]


def _prologue(machine: str) -> list[Instruction]:
    """Kill a call of another architecture; then load the number."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        _return(KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), _return(KILL)]
    return program


def _when(value: int | None, block: Sequence[Instruction]) -> list[Instruction]:
    """Run the block, which must end in a return, when the loaded number is `value`."""
    return [] if value is None else [(_EQUAL, 0, len(block), value), *block]


def _checks(checks: Iterable[Check]) -> list[Instruction]:
    """Go past the end when all hold, else return DENY."""
    block: list[Instruction] = []
    for check in checks:
        low = _ARGS + 8 * check.argument
        if check.high:
            block += [(_LOAD, 0, 0, low + 4), (_EQUAL, 1, 0, 0), _return(DENY)]
        block.append((_LOAD, 0, 0, low))
        if check.mask != 0xFFFFFFFF:
            block.append((_AND, 0, 0, check.mask))
        count = len(check.values)
        block += [(_EQUAL, count - i, 0, value) for i, value in enumerate(check.values)]
        block.append(_return(DENY))
    return block


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _assemble(program: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
