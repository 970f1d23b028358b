"""Values, errors and output that hurt who reads them; answers forged on the session's socket."""

from __future__ import annotations

from sandbox_attacks.attack import ENDS, Attack

_VALUE_OR_ERROR = ("ok", "error", "memory", "timeout", "exit", "killed")

VALUES = [
    Attack("shared lists", "x = []\nfor _ in range(60): x = [x, x]\nx", ("timeout", "memory")),
    Attack(
        "repr without end",
        "class A:\n  def __repr__(self):\n    while True: pass\nA()",
        ("timeout",),
    ),
    Attack(
        "repr that raises",
        "class A:\n  def __repr__(self): raise KeyboardInterrupt\nA()",
        ("error",),
    ),
    Attack(
        "repr that leaves", "class A:\n  def __repr__(self): raise SystemExit(5)\nA()", ("exit",)
    ),
    Attack("repr that is no string", "class A:\n  def __repr__(self): return 5\nA()", ("error",)),
    Attack(
        "repr of a string that is none",
        "class S(str):\n  def __format__(self, s): return 'x' * 10**6\n"
        "  def __len__(self): return -1\n  def encode(self, *a): return 5\n"
        "class A:\n  def __repr__(self): return S('y')\nA()",
        ("ok", "error"),
    ),
    Attack("huge repr", "'x' * 3 * 10**7", ("output", "memory", "error")),
    Attack(
        "a class that lies",
        "class M(type):\n  __name__ = property(lambda c: 1/0)\n"
        "  def __instancecheck__(c, x): raise KeyboardInterrupt\n"
        "class E(Exception, metaclass=M):\n  def __str__(self): raise BaseException\nraise E",
        ("error", "exit"),
    ),
    Attack(
        "str of an error without end",
        "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
        ("timeout",),
    ),
    Attack(
        "str of an error that raises",
        "class E(Exception):\n  def __str__(self): raise BaseException\nraise E",
        ("error",),
    ),
    Attack(
        "attributes of an error that raise",
        "class E(ModuleNotFoundError):\n  name = property(lambda s: 1/0)\nraise E",
        ("error", "exit"),
    ),
    Attack(
        "an exit code that raises",
        "class I(int):\n  def __str__(self): raise KeyboardInterrupt\n  __format__ = __str__\n"
        "raise SystemExit(I(3))",
        ("exit",),
    ),
    Attack(
        "a cycle of causes",
        "a, b = ValueError('a'), ValueError('b')\na.__cause__ = b; b.__cause__ = a\nraise a",
        ("error",),
    ),
    Attack(
        "a long chain of causes",
        "e = None\nfor i in range(10**5):\n  n = ValueError(i); n.__cause__ = e; e = n\nraise e",
        _VALUE_OR_ERROR,
    ),
    Attack(
        "groups in groups",
        "e = ValueError('x')\nfor _ in range(3000): e = ExceptionGroup('g', [e])\nraise e",
        _VALUE_OR_ERROR,
    ),
    Attack(
        "a name of a million characters", "raise type('A' * 10**6, (Exception,), {})", ("error",)
    ),
    Attack(
        "a NameError that looks for suggestions",
        "for i in range(10**5): globals()['a' * 500 + str(i)] = 1\n" + "a" * 500,
        _VALUE_OR_ERROR,
    ),
    Attack("a traceback as long as the stack", "def f(): f()\nf()", ("error",)),
    Attack(
        "a pickle that runs a program",
        "import pickle\n"
        "class A:\n  def __reduce__(self): return os.system, ('touch /tmp/retrain-attack',)\n"
        "pickle.loads(pickle.dumps(A()))",
        ("ok", "error"),
    ),
    Attack("SystemExit with anything", "raise SystemExit([10**6 * 'x'])", ("exit",)),
    Attack("GeneratorExit", "raise GeneratorExit", ("error",)),
    Attack("a syntax error with a giant line", "x = '" + "y" * 10**5, ("error",)),
    Attack("a decoding error", "b'\\xff'.decode()", ("error",)),
    Attack("a lone surrogate in an error", "raise ValueError('\\ud800')", ("error",)),
]

OUTPUT = [
    Attack("100 MB", "for _ in range(100): print('x' * 10**6)", ("output",)),
    Attack(
        "100 MB, errors swallowed",
        "for _ in range(100):\n  try: os.write(1, b'x' * 10**6)\n  except OSError: pass",
        ("output",),
    ),
    Attack("lines without end", "while True: print('x')", ("output", "timeout")),
    Attack("not UTF-8", "os.write(1, b'\\xff\\x00\\xc3\\x1b[2J\\x1b]0;x\\x07\\r' * 50)", ("ok",)),
    Attack("a lone surrogate", "print('\\ud800')", ("ok",)),
    Attack("standard output closed", "os.close(1); os.close(2); print('x')", ("error",)),
    Attack(
        "standard output replaced",
        "class Odd:\n  def write(self, s): raise BaseException\n  flush = write\n"
        "sys.stdout = Odd()\nsys.stderr = 7\n5",
        ("error",),
    ),
    Attack("standard output replaced by nothing", "sys.stdout = None\n5", ("error",)),
    Attack(
        "far behind the end",
        "import fcntl\nfcntl.fcntl(1, 4, 0)\n"
        "attempt('pwrite', lambda: os.pwrite(1, b'x', 1 << 40))\n"
        "os.lseek(1, 1 << 40, 0)\nattempt('write', lambda: os.write(1, b'x'))\nos.lseek(1, 0, 0)",
    ),
    Attack("made longer", "attempt('truncate', lambda: os.ftruncate(1, 1 << 40))"),
    Attack(
        "mapped and written behind the host's back",
        "import mmap, threading\nos.write(1, b'x' * 4096)\n"
        "page = mmap.mmap(1, 4096, mmap.MAP_SHARED)\n"
        "def scribble():\n  while True: page[0:5] = b'y' * 5\n"
        "threading.Thread(target=scribble, daemon=True).start()",
        ("ok", "error"),
        scribbles=True,
    ),
    Attack(
        "standard input",
        "print('contained', sys.stdin.read() == '', os.read(0, 9) == b'')",
        shows="contained True True",
    ),
]

NONCE = """
import struct, sys
def nonces():
  frame = sys._getframe()
  while frame:
    yield from (v for v in frame.f_locals.values() if isinstance(v, bytes) and len(v) == 16)
    frame = frame.f_back
nonce = next(nonces())
def say(status=0, error=b'', nonce=nonce, length=None):
  length = len(error) if length is None else length
  os.write(3, struct.pack('<16sBI', nonce, status, length) + error)
"""

PROTOCOL = [
    Attack("garbage", "os.write(3, b'x' * 100)", ("killed",)),
    Attack(
        "garbage without end",
        "try:\n  while True: os.write(3, b'x' * 65536)\nexcept OSError: pass",
        ("killed", "timeout"),
    ),
    Attack(
        "half an answer, then silence",
        "os.write(3, b'x' * 5)\nimport time; time.sleep(60)",
        ("timeout",),
    ),
    Attack("a wrong nonce", NONCE + "say(nonce=bytes(16))", ("killed",)),
    Attack("a status that there is not", NONCE + "say(status=200)", ("killed",)),
    Attack("a length beyond all bounds", NONCE + "say(length=2**32 - 1)", ("killed",)),
    Attack(
        "a length that never comes",
        NONCE + "say(length=60_000)\nimport time; time.sleep(9)",
        ("timeout",),
    ),
    Attack("two answers", NONCE + "say()\nsay()", ("ok",)),
    Attack("an error that is not UTF-8", NONCE + "say(1, b'\\xff\\x00' * 1000)", ("error",)),
    Attack(
        "a right answer, and work that goes on",
        NONCE + "import threading\ndef burn():\n  while True: pass\n"
        "threading.Thread(target=burn, daemon=True).start()\nsay()\nburn()",
        ("ok",),
    ),
    Attack("a right answer, then the socket closed", NONCE + "say()\nos.close(3)", ENDS),
    Attack(
        "the socket closed, and work that goes on",
        "os.close(3)\nwhile True: pass",
        ("killed", "timeout"),
    ),
    Attack(
        "the socket shut down",
        "import socket\nsocket.socket(fileno=3).shutdown(2)",
        ("killed", "exit", "timeout"),
    ),
    Attack("the socket put to other uses", "os.dup2(1, 3); os.close(0)", ("killed", "exit")),
    Attack(
        "the request read again",
        "import socket\ns = socket.socket(fileno=os.dup(3))\n"
        "s.setblocking(False)\nattempt('recv', lambda: s.recv(9))\ns.setblocking(True)",
    ),
    Attack(
        "urgent data",
        "import socket\ns = socket.socket(fileno=os.dup(3))\n"
        "attempt('urgent', lambda: s.send(b'x', socket.MSG_OOB))",
        ("ok",),
    ),
    Attack("an end that says what it likes", "os._exit(-1)", ("exit",)),
    Attack(
        "the way out blocked",
        "os._exit = exit = print\nimport inspect\n"
        "frame = sys._getframe()\nwhile frame: frame.f_globals['_exit'] = print; frame = "
        "frame.f_back\nraise SystemExit",
        ("exit",),
    ),
    Attack(
        "the runner's own functions replaced",
        "frame = sys._getframe()\n"
        "while frame:\n  frame.f_globals.update(dict.fromkeys(list(frame.f_globals)))\n"
        "  frame = frame.f_back",
        ENDS,
    ),
]
