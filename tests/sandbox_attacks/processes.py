"""Processes, threads, signals, and the memory of others. `VICTIM` is a child of the test."""

from __future__ import annotations

from sandbox_attacks.attack import ENDS, Attack

FORKS = [
    Attack(
        "fork bomb",
        "for _ in range(1000):\n  if attempt('fork', os.fork) is None: break",
    ),
    Attack("forkpty", "import pty\nattempt('pty', pty.fork)\nattempt('forkpty', os.forkpty)"),
    Attack("vfork", "refused(57, None)\nrefused(58, None)"),
    Attack("clone of a process", "refused(56, 220, 17, 0, 0, 0, 0)"),
    Attack("clone with only shared memory", "refused(56, 220, 0x100 | 17, 0, 0, 0, 0)"),
    Attack("clone into new namespaces", "refused(56, 220, 0x10000000 | 17, 0, 0, 0, 0)"),
    Attack(
        "clone of a thread with a namespace",
        "refused(56, 220, 0x10F00 | 0x40000000, 0, 0, 0, 0)\n"
        "refused(56, 220, 0x10F00 | 0x2000, 0, 0, 0, 0)",
    ),
    Attack("clone of a sibling", "refused(56, 220, 0x8000 | 17, 0, 0, 0, 0)"),
    Attack("clone3", "refused(435, 435, bytes(88), 88)"),
    Attack("execve", "attempt('exec', lambda: os.execv('/bin/true', ['true']))"),
    Attack(
        "execveat of a descriptor",
        "fd = os.open(os.__file__, os.O_RDONLY)\nrefused(322, 281, fd, b'', 0, 0, 0x1000)",
    ),
    Attack(
        "subprocess",
        "import subprocess\nattempt('subprocess', lambda: subprocess.run(['/bin/true']))\n"
        "attempt('shell', lambda: subprocess.check_output('id', shell=True))\n"
        "attempt('vfork', lambda: subprocess.Popen(['/bin/true'], close_fds=False))",
    ),
    Attack("os.system", "print('contained', os.system('true') != 0)", shows="contained True"),
    Attack("posix_spawn", "attempt('spawn', lambda: os.posix_spawn('/bin/true', ['true'], {}))"),
    Attack(
        "multiprocessing",
        "import multiprocessing as m\n"
        "for way in ('fork', 'spawn', 'forkserver'):\n"
        "  attempt(way, lambda: m.get_context(way).Process(target=print).start())",
    ),
    Attack(
        "thread bomb",
        "import threading, time\nthreading.stack_size(32768)\nn = 0\n"
        "try:\n  while True:\n"
        "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "except RuntimeError: print('contained', n < 32)",
        shows="contained True",
        idle=True,
    ),
    Attack(
        "thread bomb of threads that start threads",
        "import threading\nthreading.stack_size(32768)\n"
        "def breed():\n  while True:\n"
        "    try: threading.Thread(target=breed, daemon=True).start()\n"
        "    except RuntimeError: pass\nbreed()",
        ("timeout",),
    ),
    Attack(
        "a stream of questions to the zygote",
        "import threading\nthreading.stack_size(65536)\n"
        "def start():\n  while True:\n"
        "    try:\n      t = threading.Thread(target=int); t.start(); t.join()\n"
        "    except RuntimeError: pass\n"
        "for _ in range(8): threading.Thread(target=start, daemon=True).start()\nstart()",
        ("timeout",),
    ),
    Attack(
        "death between a question and its answer",
        "import threading\nthreading.stack_size(65536)\n"
        "def start():\n  while True:\n"
        "    try: threading.Thread(target=int).start()\n    except RuntimeError: pass\n"
        "for _ in range(8): threading.Thread(target=start, daemon=True).start()\n"
        "import time; time.sleep(0.02); os._exit(3)",
        ("exit",),
    ),
    Attack(
        "questions that a timer takes back",
        "import signal, threading, time\nthreading.stack_size(65536)\n"
        "signal.signal(signal.SIGALRM, lambda *a: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\n"
        "end = time.monotonic() + 0.3\n"
        "while time.monotonic() < end:\n"
        "  try: threading.Thread(target=int).start()\n  except RuntimeError: pass\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)",
        ("ok", "timeout"),
    ),
    Attack(
        "burning threads left behind",
        "import threading\n"
        "def burn():\n  while True: sum(range(1000))\n"
        "for _ in range(4): threading.Thread(target=burn, daemon=True).start()",
        idle=True,
    ),
    Attack(
        "a timer left behind",
        "import signal\nsignal.signal(signal.SIGVTALRM, lambda *a: None)\n"
        "signal.signal(signal.SIGALRM, lambda *a: sum(range(10**6)))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)",
        idle=True,
    ),
]

SIGNALS = [
    Attack("kill", "attempt('kill', lambda: os.kill(VICTIM, 15))"),
    Attack(
        "kill the parent, or only ask for it",
        "for pid in (os.getppid(), HOST, 1): attempt('signal 0', lambda: os.kill(pid, 0))",
    ),
    Attack("kill everyone", "attempt('signal 0 to all', lambda: os.kill(-1, 0))"),
    Attack(
        "kill the group", "attempt('signal 0', lambda: os.killpg(0, 0))\nrefused(62, 129, 0, 0)"
    ),
    Attack(
        "tkill and tgkill", "refused(200, 130, VICTIM, 15)\nrefused(234, 131, VICTIM, VICTIM, 15)"
    ),
    Attack(
        "sigqueue",
        "refused(129, 138, VICTIM, 15, bytes(128))\nrefused(297, 240, VICTIM, VICTIM, 15, 0)",
    ),
    Attack("pidfd", "refused(434, 434, VICTIM, 0)\nrefused(424, 424, 3, 15, 0, 0)"),
    Attack(
        "the pidfd of the peer",
        "import socket\ns = socket.socket(fileno=os.dup(3))\n"
        "try: fd = int.from_bytes(s.getsockopt(1, 77, 4), 'little')\nexcept OSError: fd = 3\n"
        "refused(424, 424, fd, 0, 0, 0)\nrefused(438, 438, fd, 0, 0)\nrefused(440, 440, fd, 0, 0)\n"
        "import fcntl\nattempt('pidfd ioctl', lambda: fcntl.ioctl(fd, 0xFF01))",
    ),
    Attack(
        "a descriptor's owner",
        "import fcntl\nr, w = os.pipe()\n"
        "attempt('SETOWN', lambda: fcntl.fcntl(r, 8, VICTIM))\n"
        "attempt('SETSIG', lambda: fcntl.fcntl(r, 10, 15))\n"
        "attempt('SETOWN_EX', lambda: fcntl.fcntl(r, 15, bytes(8)))\n"
        "attempt('FIOSETOWN', lambda: fcntl.ioctl(3, 0x8901, bytes(4)))\n"
        "fcntl.fcntl(r, 4, fcntl.fcntl(r, 3) | os.O_ASYNC); os.write(w, b'x')",
        ("ok", "error"),
    ),
    Attack(
        "alarm",
        "import signal, time\nsignal.alarm(1)\nsignal.setitimer(0, 0.05); time.sleep(9)",
        ("killed",),
    ),
    Attack(
        "another signal on the parent's death",
        "refused(157, 167, 1, 0, 0, 0, 0)\nrefused(157, 167, 36, 1, 0, 0, 0)",
    ),
    Attack("a timer with a signal", "refused(222, 107, 0, bytes(64), bytes(8))"),
    Attack("an interpreter that aborts", "os.abort()", ("killed",)),
    Attack("a segmentation fault", "ctypes.string_at(0)", ("killed",)),
    Attack("an illegal instruction", "import faulthandler; faulthandler._sigabrt()", ENDS),
]

OTHERS = [
    Attack("ptrace", "for pid in (VICTIM, HOST, os.getppid()): refused(101, 117, 16, pid, 0, 0)"),
    Attack("ptrace of oneself", "refused(101, 117, 0, 0, 0, 0)"),
    Attack(
        "memory of another process",
        "refused(310, 270, VICTIM, 0, 0, 0, 0, 0)\nrefused(311, 271, VICTIM, 0, 0, 0, 0, 0)",
    ),
    Attack(
        "/proc of another process",
        "for pid in (VICTIM, HOST, os.getppid(), 1):\n"
        "  for name in ('mem', 'environ', 'cmdline', 'maps', 'status', 'root/etc/passwd', 'fd/0',\n"
        "               'cwd/x', 'auxv', 'stack', 'task', 'fd', 'ns/user'):\n"
        "    attempt(f'/proc/{pid}/{name}', lambda: os.open(f'/proc/{pid}/{name}', os.O_RDONLY))\n"
        "  attempt('exe', lambda: os.readlink(f'/proc/{pid}/exe'))",
    ),
    Attack(
        "/proc of its own",
        "for name in ('mem', 'environ', 'cmdline', 'maps', 'oom_score_adj', 'uid_map', 'fd/3'):\n"
        "  attempt(name, lambda: os.open(f'/proc/self/{name}', os.O_RDWR))",
    ),
    Attack(
        "switches of the kernel",
        "for name in ('sys/kernel/core_pattern', 'sysrq-trigger', 'sys/kernel/modprobe',\n"
        "             'sys/vm/drop_caches', 'self/attr/current', 'sys/kernel/hostname'):\n"
        "  attempt(name, lambda: os.open(f'/proc/{name}', os.O_WRONLY))\n"
        "for name in ('/sys/power/state', '/sys/kernel/mm/transparent_hugepage/enabled',\n"
        "             '/sys/fs/cgroup/cgroup.procs', '/dev/mem', '/dev/kmsg', '/dev/tty',\n"
        "             '/dev/ptmx', '/dev/fuse', '/dev/kvm', '/dev/loop-control'):\n"
        "  attempt(name, lambda: os.open(name, os.O_WRONLY))",
    ),
    Attack(
        "comparison with, moving and advising another process",
        "refused(312, 272, VICTIM, HOST, 0, 0, 0)\nrefused(256, 238, VICTIM, 8, 0, 0)\n"
        "refused(279, 239, VICTIM, 0, 0, 0, 0, 0)\nrefused(141, 140, 0, VICTIM, 19)\n"
        "refused(203, 122, VICTIM, 8, bytes(8))\nrefused(144, 119, VICTIM, 0, bytes(4))",
    ),
]
