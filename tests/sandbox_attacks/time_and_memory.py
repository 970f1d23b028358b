"""Time that is not given back, and memory in every form."""

from __future__ import annotations

from sandbox_attacks.attack import Attack

_OUT_OF_MEMORY = ("memory", "error", "killed", "timeout", "exit")
_STOPPED = ("timeout",)

TIME = [
    Attack("loop", "while True: pass", _STOPPED),
    Attack(
        "loop that swallows exceptions",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        _STOPPED,
    ),
    Attack("loop in finally", "try:\n  1/0\nfinally:\n  while True: pass", _STOPPED),
    Attack(
        "loop in __del__",
        "class A:\n  def __del__(self):\n    while True: pass\na = A()\ndel a",
        _STOPPED,
    ),
    Attack(
        "loop in a signal handler",
        "import signal, time\n"
        "def handler(*a):\n  while True: pass\n"
        "signal.signal(signal.SIGALRM, handler); signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "time.sleep(60)",
        _STOPPED,
    ),
    Attack(
        "loop in atexit and threading shutdown",
        "import atexit, threading\n"
        "def burn():\n  while True: pass\n"
        "atexit.register(burn); threading._register_atexit(burn)\nburn()",
        _STOPPED,
    ),
    Attack("endless sum in C", "sum(iter(int, 1))", _STOPPED),
    Attack("endless membership in C", "import itertools\n1 in itertools.repeat(0)", _STOPPED),
    Attack("regex backtracking", "import re; re.match(r'(a|a|aa)+$', 'a' * 60 + 'b')", _STOPPED),
    Attack("integer power", "10 ** 10 ** 8", (*_STOPPED, "memory")),
    Attack(
        "integer to string",
        "import sys; sys.set_int_max_str_digits(0); str((1 << 9_000_000) + 1)[0]",
        _STOPPED,
    ),
    Attack("sleep", "import time; time.sleep(10**6)", _STOPPED),
    Attack("wait for input", "import os; r, w = os.pipe(); os.read(r, 1)", _STOPPED),
    Attack(
        "wait for a lock",
        "import threading; a = threading.Lock(); a.acquire(); a.acquire()",
        _STOPPED,
    ),
    Attack(
        "all signals blocked",
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "for n in range(1, 65):\n"
        "  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\n"
        "while True: pass",
        _STOPPED,
    ),
    Attack(
        "import lock held by a thread that hangs",
        "import _imp, time\n_imp.acquire_lock()\ntime.sleep(60)",
        _STOPPED,
    ),
    Attack(
        "the interpreter never switches threads",
        "import sys, threading\nsys.setswitchinterval(1e9)\n"
        "def burn():\n  while True: pass\nthreading.Thread(target=burn, daemon=True).start()\n"
        "import time; time.sleep(0); burn()",
        _STOPPED,
    ),
    Attack(
        "a timer of its own that interrupts everything",
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\nwhile True: pass",
        _STOPPED,
    ),
    Attack(
        "the first thread leaves, another goes on",
        "import threading\n"
        "def burn():\n  while True: pass\n"
        "threading.Thread(target=burn, daemon=True).start()\n"
        "syscall(60, 93, 0)",
        _STOPPED,
    ),
    Attack(
        "recursion without a limit",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        (*_OUT_OF_MEMORY, "killed"),
    ),
    Attack(
        "recursion in C",
        "import sys, json; sys.setrecursionlimit(10**9)\nx = []\n"
        "for _ in range(10**6): x = [x]\nrepr(x); json.dumps(x)",
        (*_OUT_OF_MEMORY, "killed"),
    ),
    Attack("a hostile parser input", "eval('(' * 10**5)\n", ("error", "memory", "killed")),
]

MEMORY = [
    Attack("list", "x = [0] * 10**10", ("memory",)),
    Attack("list in steps", "x = []\nwhile True: x.append(bytes(10**6))", ("memory",)),
    Attack(
        "list that swallows MemoryError",
        "x = []\nwhile True:\n  try: x.append('a' * 10**6 + str(len(x)))\n"
        "  except MemoryError: pass",
        ("timeout", "memory"),
    ),
    Attack("string repeats", "x = 'a' * 10**6\nwhile True: x += x", ("memory",)),
    Attack("bytes", "x = bytearray(2**34)", ("memory",)),
    Attack("range to list", "list(range(10**10))", ("memory", "timeout")),
    Attack("dict", "{i: str(i) * 50 for i in range(10**9)}", ("memory", "timeout")),
    Attack(
        "numpy", "import numpy as n\nx = [n.ones(10**7) for _ in range(100)]", ("memory", "error")
    ),
    Attack(
        "numpy through an operator",
        "import numpy as n\nn.ones(10**5)[:, None] * n.ones(10**5)",
        ("memory", "error"),
    ),
    Attack("big shift", "1 << 10**11", ("memory", "error")),
    Attack(
        "private mappings",
        "import mmap\nx = []\n"
        "while True:\n  m = mmap.mmap(-1, 2**24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "  m.write(b'x' * 2**24); x.append(m)",
        ("error", "memory"),
    ),
    Attack(
        "shared mappings",
        "import mmap\nx = []\n"
        "while True:\n  m = mmap.mmap(-1, 2**24); m.write(b'x' * 2**24); x.append(m)",
        ("error", "memory"),
    ),
    Attack(
        "shared mappings, unmapped but for a page, whose memory stays",
        "libc.mmap.restype = ctypes.c_void_p\n"
        "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + "
        "[ctypes.c_long]\n"
        "libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]\n"
        "size = 32 << 20\n"
        "for _ in range(12):\n"
        "  start = libc.mmap(None, size, 3, 0x8021, -1, 0)\n"
        "  if start == 2**64 - 1: break\n"
        "  libc.munmap(start + 4096, size - 4096)\n"
        "import time; time.sleep(0.1)",
        ("ok", "timeout"),
    ),
    Attack(
        "the same with /dev/zero",
        "import mmap, time\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + "
        "[ctypes.c_long]\n"
        "libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]\n"
        "size = 32 << 20\n"
        "for _ in range(12):\n"
        "  fd = os.open('/dev/zero', os.O_RDONLY)\n"
        "  start = libc.mmap(None, size, 1, 0x8001, fd, 0)\n"
        "  if start == 2**64 - 1: break\n"
        "  libc.munmap(start + 4096, size - 4096)\n"
        "time.sleep(0.1)",
        ("ok", "timeout", "error"),
    ),
    Attack("huge pages", "refused(9, 222, 0, 1 << 21, 3, 0x40022, -1, 0)"),
    Attack("locked memory", "refused(151, 230, 3); refused(149, 228, 0, 4096)"),
    Attack("memory file", "attempt('memfd', lambda: os.memfd_create('x'))"),
    Attack("secret memory", "refused(447, 447, 0)"),
    Attack(
        "System V and POSIX shared memory",
        "refused(29, 194, 0, 1 << 20, 0o1600)\nrefused(240, 180, b'/x', 0o102, 0o600, 0)\n"
        "attempt('shm', lambda: os.open('/dev/shm/retrain-attack', os.O_RDWR | os.O_CREAT))",
    ),
    Attack(
        "full pipes",
        "x = []\ntry:\n  while True:\n    r, w = os.pipe(); x.append((r, w))\n"
        "    os.set_blocking(w, False)\n"
        "    attempt('pipe size', lambda: __import__('fcntl').fcntl(w, 1031, 1 << 20))\n"
        "    try:\n      while True: os.write(w, bytes(4096))\n    except BlockingIOError: pass\n"
        "except OSError as error: print('contained', len(x) < 64)",
        shows="contained True",
    ),
    Attack(
        "full socket pairs",
        "import socket\nx = []\ntry:\n  while True:\n    x.append(socket.socketpair())\n"
        "    for s in x[-1]:\n"
        "      attempt('size', lambda: s.setsockopt(1, socket.SO_SNDBUF, 1 << 24))\n"
        "      s.setblocking(False)\n      try:\n        while True: s.send(bytes(4096))\n"
        "      except BlockingIOError: pass\n"
        "except OSError: print('contained', len(x) < 64)",
        shows="contained True",
    ),
    Attack(
        "a descriptor table for every thread",
        "import socket, threading, time\nthreading.stack_size(65536)\n"
        "def fill():\n"
        "  if syscall(436, 436, 1000, 1001, 2) < 0: return\n"
        "  print('BREACH')\n"
        "  x = []\n"
        "  try:\n    while True: x.append(socket.socketpair())\n"
        "  except OSError: pass\n"
        "  time.sleep(0.3)\n"
        "t = [threading.Thread(target=fill, daemon=True) for _ in range(20)]\n"
        "for a in t: a.start()\n"
        "for a in t: a.join()",
    ),
    Attack(
        "thread stacks",
        "import threading, time\nthreading.stack_size(2**30)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()",
        ("error",),
    ),
    Attack(
        "a stack that grows",
        "import resource\n"
        "attempt('limit', lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))\n"
        "import sys, re; sys.setrecursionlimit(10**9)\n"
        "def f(n): return [f(n + 1) for _ in (1,)]\nf(0)",
        ("memory", "error", "killed", "timeout"),
    ),
    Attack(
        "what is loaded, swept away and used again",
        "x = []\nlibc.mmap.restype = ctypes.c_void_p\n"
        "while True:\n"
        "  p = libc.mmap(None, ctypes.c_size_t(2**22), 3, 0x8022, -1, ctypes.c_long(0))\n"
        "  if p == 2**64 - 1: break\n",
        ("ok", "memory", "timeout"),
    ),
    Attack(
        "higher limits",
        "import resource as r\n"
        "for kind in ('AS', 'FSIZE', 'NOFILE', 'MEMLOCK', 'CORE', 'SIGPENDING', 'MSGQUEUE'):\n"
        "  number = getattr(r, 'RLIMIT_' + kind)\n"
        "  hard = r.getrlimit(number)[1]\n"
        "  attempt(kind, lambda: r.setrlimit(number, (hard + 1, hard + 1)))\n"
        "attempt('another', lambda: r.prlimit(VICTIM, r.RLIMIT_NOFILE, (10, 10)))",
    ),
]
