"""State that is left for the next session, and what a session looks like when there is none."""

from __future__ import annotations

POISON = {
    "builtins": "import builtins\nbuiltins.len = lambda x: 7\nbuiltins.print = builtins.repr = str",
    "the standard library": "import math, json, os\nmath.sqrt = json.dumps = os.getcwd = int",
    "packages": "import numpy, sympy\nnumpy.sum = sympy.solve = sympy.Symbol.__add__ = int",
    "sys.modules": "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
    "import hooks": "import sys\nsys.meta_path.clear(); sys.path.clear(); sys.path_hooks.clear()",
    "generators": "import random, numpy\nrandom.seed(9); numpy.random.seed(9)",
    "names": "mine = _ = 5\n5",
    "runtime settings": (
        "import gc, locale, os, sys, threading, warnings\n"
        "sys.setswitchinterval(9); sys.setrecursionlimit(99); gc.disable()\n"
        "sys.set_int_max_str_digits(0); os.umask(0); os.environ['X'] = 'y'; os.chdir('/')\n"
        "locale.setlocale(locale.LC_ALL, 'C'); warnings.simplefilter('error')\n"
        "threading.stack_size(65536); sys.settrace(print); sys.stdout = None"
    ),
    "signals and timers": (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); signal.alarm(9)"
    ),
    "limits": "import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (5, 5))",
    "numbers in memory": (
        "import ctypes\nctypes.memset(id(7) + 24, 8, 1)\nctypes.memset(id(b'x') + 32, 121, 1)"
    ),
    "classes of C": (
        "import ctypes, gc\ngc.get_referents(int.__dict__)[0]['bit_length'] = lambda s: 5\n"
        "gc.get_referents(str.__dict__)[0]['upper'] = lambda s: 'poison'\n"
        "ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))"
    ),
    "the pages of loaded libraries": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "start = ctypes.cast(libc.getuid, ctypes.c_void_p).value\n"
        "libc.mprotect(ctypes.c_void_p(start & -4096), 8192, 7)\n"
        "ctypes.memset(start, 0xc3, 1)"
    ),
}

FINGERPRINT = """
import builtins, gc, json, locale, math, os, random, resource, signal, sys, threading, warnings
import numpy, sympy
here = {
    "builtins": sorted(f"{k}={v!r}"[:60] for k, v in vars(builtins).items() if callable(v)
                       and "0x" not in repr(v)),
    "results": [len("abc"), math.sqrt(9), json.dumps([1]), (6).bit_length(), "a".upper(), 3 + 4,
                int(numpy.sum([1, 2])), str(sympy.Symbol("x") + 1), str(b"x"), os.getuid()],
    "generators": [random.random(), float(numpy.random.rand())],
    "modules": [sorted(n for n, m in sys.modules.items() if m is None), len(sys.meta_path),
                sys.path, len(sys.path_hooks)],
    "settings": [sys.getswitchinterval(), sys.getrecursionlimit(), gc.isenabled(),
                 sys.get_int_max_str_digits(), os.umask(0o22), dict(os.environ), os.getcwd(),
                 locale.setlocale(locale.LC_ALL), len(warnings.filters), threading.stack_size(),
                 sys.gettrace() is None, threading.active_count()],
    "signals": [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
    "blocked": str(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "timer": signal.getitimer(signal.ITIMER_REAL),
    "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    "names": sorted(n for n in globals() if not n.startswith("__")),
}
print(json.dumps(here))
"""
