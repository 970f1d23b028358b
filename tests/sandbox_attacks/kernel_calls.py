"""System calls, made past Python. Numbers: x86_64, aarch64."""

from __future__ import annotations

from sandbox_attacks.attack import Attack

_CODE = """
import mmap
code = bytes.fromhex(CODE)
page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
page.write(code)
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
returned = ctypes.CFUNCTYPE(ctypes.c_long)(start)()
print("BREACH: returned", returned)
"""

KERNEL = [
    Attack("bpf", "refused(321, 280, 0, bytes(128), 128)"),
    Attack("io_uring", "refused(425, 425, 8, bytes(120))\nrefused(426, 426, 0)\nrefused(427, 427)"),
    Attack("userfaultfd", "refused(323, 282, 1)"),
    Attack("keyctl", "refused(250, 219, 0, -3, 1)\nrefused(248, 217, b'user', b'x', b'y', 1, -3)"),
    Attack("perf_event_open", "refused(298, 241, bytes(128), 0, -1, -1, 0)"),
    Attack(
        "namespaces",
        "for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x400, 0x200):\n"
        "  refused(272, 97, flag)\nrefused(308, 268, 3, 0)",
    ),
    Attack(
        "kexec and modules",
        "refused(246, 104, 0, 0, 0, 0)\nrefused(320, 294, -1, -1, 0, 0, 0)\n"
        "refused(175, 105, 0, 0, b'')\nrefused(313, 273, -1, b'', 0)\nrefused(176, 106, b'x', 0)",
    ),
    Attack("reboot, with magic that is none", "refused(169, 142, 0, 0, 0, 0)"),
    Attack(
        "mount",
        "refused(165, 40, b'none', b'/nowhere', b'tmpfs', 0, 0)\n"
        "refused(166, 39, b'/nowhere', 0)\nrefused(428, 428, -100, b'/', 1)\n"
        "refused(430, 430, b'tmpfs', 0)\nrefused(429, 429, -1, b'', -1, b'', 0)\n"
        "refused(442, 442, -1, b'', 0, 0, 0)",
    ),
    Attack("chroot and pivot_root", "refused(161, 51, b'/')\nrefused(155, 41, b'/', b'/')"),
    Attack(
        "swap and quota",
        "refused(167, 224, b'/nowhere', 0)\nrefused(168, 225, b'/nowhere')\n"
        "refused(179, 60, 0, 0, 0, 0)",
    ),
    Attack(
        "clock and names",
        "refused(227, 112, 0, 0)\nrefused(164, 170, 0, 0)\n"
        "refused(170, 161, b'x', -1)\nrefused(171, 162, b'x', -1)\nrefused(159, 171, -1)",
    ),
    Attack(
        "identity",
        "for x86, arm in ((105, 146), (106, 144), (117, 147), (119, 149)):\n"
        "  refused(x86, arm, 0, 0, 0)\nrefused(116, 159, 0, 0)\nrefused(126, 91, 0, 0)",
    ),
    Attack("another filter", "refused(317, 277, 1, 8, 0)\nrefused(157, 167, 22, 2, 0, 0, 0)"),
    Attack("another ruleset", "refused(444, 444, 0, 0, 1)\nrefused(446, 446, 3, 0)"),
    Attack(
        "prctl",
        "for option in (1, 4, 8, 22, 23, 24, 28, 35, 38, 41, 47, 59, 0x59616D61):\n"
        "  refused(157, 167, option, 1, 0, 0, 0)",
    ),
    Attack("personality", "refused(135, 92, 0xFFFFFFFF)"),
    Attack("fanotify and inotify", "refused(300, 262, 0, 0)\nrefused(294, 26, 0)"),
    Attack(
        "message queues and semaphores",
        "refused(68, 186, 0, 0o1600)\nrefused(64, 190, 0, 1, 0o1600)",
    ),
    Attack(
        # 335 and 336 end a probe, pass every filter and are SIGILL without one.
        "every call that nobody has named",
        "skipped = {*NAMED, 335, 336}\n"
        "for number in range(480):\n"
        "  if number not in skipped:\n"
        "    refused(number, number, -1, -1, -1, -1, -1, -1)",
    ),
    Attack(
        "numbers far out",
        "for number in (-1, 600, 1 << 20, 0x3FFFFFFF): refused(number, number, 0)",
        ("ok", "killed"),
    ),
    Attack("x32 getpid", "print('BREACH', libc.syscall(0x40000000 | 39))", ("killed",)),
    Attack("x32 execve", "print('BREACH', libc.syscall(0x40000000 | 520, b'', 0, 0))", ("killed",)),
    # mov eax, 20 (getpid); int 0x80; ret
    Attack("int 0x80", f"CODE = 'b814000000cd80c3'\n{_CODE}", ("killed",)),
    # mov eax, 57 (fork); syscall; ret
    Attack(
        "fork in machine code",
        "CODE = 'b8390000000f05c3'"
        + _CODE.replace(
            'print("BREACH: returned", returned)', "print('BREACH' if returned != -1 else 'held')"
        ),
        shows="held",
    ),
]
X86_ONLY = {"x32 getpid", "x32 execve", "int 0x80", "fork in machine code"}
