"""Files outside, descriptors, sockets. `CANARY` is a file of the test's, `DIRECTORY` its place."""

from __future__ import annotations

from sandbox_attacks.attack import Attack

READS = [
    Attack("the canary", "attempt('read', lambda: open(CANARY).read())"),
    Attack(
        "files of the system and the user",
        "for path in ('/etc/passwd', '/etc/shadow', '/etc/hosts', '/root', HOME, REPOSITORY,\n"
        "             HOME + '/.ssh', HOME + '/.bash_history', '/var/log', '/tmp', '/', '/dev',\n"
        "             REPOSITORY + '/pyproject.toml', REPOSITORY + '/.git/config'):\n"
        "  attempt(path, lambda: os.open(path, os.O_RDONLY))\n"
        "  attempt(path, lambda: os.listdir(path))",
    ),
    Attack(
        "packages that it is not given",
        "for path in NOT_GIVEN:\n"
        "  attempt(path, lambda: open(path).read())\n"
        "  sys.path.insert(0, os.path.dirname(os.path.dirname(path)))\n"
        "for name in ('pytest', 'pydantic', 'retrain'):\n"
        "  attempt(name, lambda: __import__(name))",
    ),
    Attack(
        "by way of a path descriptor",
        "fd = os.open(DIRECTORY, os.O_PATH)\n"
        "attempt('openat', lambda: os.open('canary', os.O_RDONLY, dir_fd=fd))\n"
        "os.fchdir(fd)\nattempt('relative', lambda: open('canary').read())\n"
        "attempt('listdir', lambda: os.listdir('.'))\n"
        "path = os.open(CANARY, os.O_PATH)\n"
        "attempt('reopen', lambda: open(f'/proc/self/fd/{path}').read())\n"
        "attempt('read', lambda: os.read(path, 9))\n"
        "attempt('thread', lambda: open(f'/proc/thread-self/fd/{path}', 'r+'))",
    ),
    Attack(
        "by handle",
        "refused(303, 264, -100, CANARY.encode(), bytes(136), bytes(4), 0)\n"
        "refused(304, 265, 3, bytes(136), 0)",
    ),
    Attack("openat2", "refused(437, 437, -100, CANARY.encode(), bytes(24), 24)"),
    Attack(
        "by way of dots",
        "base = os.path.dirname(os.__file__)\n"
        "attempt('dots', lambda: open(base + '/../' * 30 + CANARY).read())\n"
        "os.chdir(base)\nattempt('dots', lambda: open('../' * 30 + CANARY[1:]).read())",
    ),
    Attack(
        "the environment",
        "print(dict(os.environ))\n"
        "pointer = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\ni = 0\n"
        "while pointer and pointer[i]: print(pointer[i]); i += 1",
    ),
    Attack(
        "everything in memory",
        "import gc, sys\n"
        "for thing in gc.get_objects():\n"
        "  if isinstance(thing, (dict, list, tuple)):\n"
        "    for value in list(thing.values() if isinstance(thing, dict) else thing):\n"
        "      if isinstance(value, str) and 'SECRET' in value: print(value)\n"
        "frame = sys._getframe()\n"
        "while frame: print(list(frame.f_locals)); frame = frame.f_back",
    ),
    Attack(
        "the grader",
        "import sys\n"
        "print('BREACH' if any(n.partition('.')[0] in ('retrain', 'pytest') for n in sys.modules)"
        " else 'contained')",
        shows="contained",
    ),
]

_EACH = "attempt({0!r}, lambda: {0})\n"

WRITES = [
    Attack(
        "the canary",
        "for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY\n"
        "              | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):\n"
        "  attempt('open', lambda: os.open(CANARY, flags))",
    ),
    Attack(
        "a new file, anywhere",
        "import sys, tempfile\n"
        "for base in ('/tmp', '/var/tmp', '/dev/shm', '/run', '/', HOME, REPOSITORY,\n"
        "             DIRECTORY, '.', '/run/user/0', '/mnt', '/srv', *sys.path):\n"
        "  name = f'{base}/retrain-attack'\n"
        "  attempt(name, lambda: os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))\n"
        "  attempt('tmpfile', lambda: os.open(base, os.O_WRONLY | os.O_TMPFILE))\n"
        "  attempt('mkdir', lambda: os.mkdir(name))\n"
        "attempt('tempfile', lambda: tempfile.NamedTemporaryFile())",
    ),
    Attack(
        "the modules of others",
        "import numpy, sympy\n"
        "for module in (os, numpy, sympy):\n"
        "  attempt(module.__file__, lambda: open(module.__file__, 'r+'))\n"
        "  cache = os.path.dirname(module.__file__) + '/__pycache__'\n"
        "  attempt(cache, lambda: open(cache + '/retrain_attack.pyc', 'wb'))",
    ),
    Attack(
        "chmod", "attempt('chmod', lambda: os.chmod(CANARY, 0o600))\nrefused(452, 452, -100, 0, 0)"
    ),
    Attack("chown", "attempt('chown', lambda: os.chown(CANARY, os.getuid(), os.getgid()))"),
    Attack("utime", "attempt('utime', lambda: os.utime(CANARY, (1, 1)))"),
    Attack(
        "extended attributes",
        "attempt('set', lambda: os.setxattr(CANARY, 'user.x', b'1'))\n"
        "attempt('list', lambda: os.listxattr(CANARY))",
    ),
    Attack(
        "links and names",
        "attempt('link', lambda: os.link(CANARY, CANARY + '2'))\n"
        "attempt('symlink', lambda: os.symlink(CANARY, CANARY + '3'))\n"
        "attempt('rename', lambda: os.rename(CANARY, CANARY + '4'))\n"
        "attempt('unlink', lambda: os.unlink(CANARY))\n"
        "attempt('rmdir', lambda: os.rmdir(DIRECTORY))\n"
        "attempt('truncate', lambda: os.truncate(CANARY, 0))\n"
        "attempt('fifo', lambda: os.mkfifo(CANARY + '5'))\n"
        "attempt('node', lambda: os.mknod(CANARY + '6'))",
    ),
    Attack(
        "by way of a path descriptor",
        "fd = os.open(CANARY, os.O_PATH)\n"
        "attempt('fchmod', lambda: os.fchmod(fd, 0o600))\n"
        "attempt('chmod', lambda: os.chmod(f'/proc/self/fd/{fd}', 0o600))\n"
        "attempt('linkat', lambda: os.link(f'/proc/self/fd/{fd}', CANARY + '2'))\n"
        "attempt('truncate', lambda: os.ftruncate(fd, 0))",
    ),
    Attack(
        "a shared mapping of a file that it may read",
        "import mmap\nfd = os.open(os.__file__, os.O_RDONLY)\n"
        "attempt('map', lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE))",
    ),
    Attack(
        "fallocate, sendfile, splice, copy",
        "fd = os.open(os.__file__, os.O_RDONLY)\nrefused(285, 47, 1, 0, 0, 10)\n"
        "refused(40, 71, 1, fd, 0, 10)\nrefused(275, 76, fd, 0, 1, 0, 10, 0)\n"
        "refused(326, 285, fd, 0, 1, 0, 10, 0)",
    ),
]

DESCRIPTORS = [
    Attack(
        "those that are open",
        "print('open', [fd for fd in range(4096) if syscall(72, 25, fd, 1) >= 0])",
        shows="open [0, 1, 2, 3]",
    ),
    Attack(
        "all of them, read, written and asked",
        "import fcntl\n"
        "for fd in [0, *range(4, 4096)]:\n"
        "  attempt(f'write {fd}', lambda: os.write(fd, b'x'))\n"
        "  attempt(f'ioctl {fd}', lambda: fcntl.ioctl(fd, 0xC0502100, bytes(80)))\n"
        "  if fd: attempt(f'read {fd}', lambda: os.read(fd, 1))",
    ),
    Attack(
        "a listener of the filter's own kind",
        "import fcntl\n"
        "for fd in range(64):\n"
        "  for request in (0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104):\n"
        "    attempt(f'{fd} {request:x}', lambda: fcntl.ioctl(fd, request, bytes(80)))",
    ),
    Attack(
        "sent over a socket",
        "import array, socket\na, b = socket.socketpair()\n"
        "attempt('sendmsg', lambda: a.sendmsg([b'x'], [(1, 1, array.array('i', [1]))]))\n"
        "attempt('recvmsg', lambda: b.recvmsg(1, 99))",
    ),
    Attack(
        "as many as there are",
        "x = []\ntry:\n  while True: x.append(os.dup(1))\n"
        "except OSError: print('contained', len(x) <= 64)",
        shows="contained True",
    ),
]

SOCKETS = [
    Attack(
        "TCP connect",
        "import socket\nattempt('tcp', lambda: socket.create_connection(('127.0.0.1', TCP), 1))",
    ),
    Attack("TCP listen", "import socket\nattempt('listen', lambda: socket.create_server(('', 0)))"),
    Attack(
        "UDP",
        "import socket\n"
        "attempt('udp', lambda: socket.socket(2, 2).sendto(b'x', ('127.0.0.1', UDP)))",
    ),
    Attack("IPv6", "import socket\nattempt('six', lambda: socket.socket(10, 1))"),
    Attack(
        "Unix path",
        "import socket\ns = attempt('unix', lambda: socket.socket(1, 1))\n"
        "a, b = socket.socketpair()\nattempt('connect', lambda: a.connect(UNIX))",
    ),
    Attack(
        "Unix abstract",
        "import socket\na, b = socket.socketpair()\n"
        "attempt('connect', lambda: a.connect(ABSTRACT))\n"
        "attempt('bind', lambda: a.bind(b'\\0retrain-attack'))",
    ),
    Attack(
        "datagram pair with an address",
        "import socket\nattempt('pair', lambda: socket.socketpair(1, 2))\n"
        "attempt('pair', lambda: socket.socketpair(1, 5))\na, b = socket.socketpair()\n"
        "attempt('sendto', lambda: a.sendto(b'x', ABSTRACT))\n"
        "attempt('sendto', lambda: a.sendto(b'x', UNIX))",
    ),
    Attack(
        "raw, packet, netlink, vsock, alg, bluetooth",
        "import socket\n"
        "for family, kind, protocol in ((2, 3, 1), (17, 3, 768), (16, 3, 0), (40, 1, 0),\n"
        "                               (38, 5, 0), (31, 3, 1), (44, 3, 0), (15, 3, 2)):\n"
        "  attempt(family, lambda: socket.socket(family, kind, protocol))",
    ),
    Attack(
        "name lookup",
        "import socket\nattempt('lookup', lambda: socket.getaddrinfo('localhost.invalid', 80))",
    ),
    Attack(
        "asyncio server",
        "import asyncio\nasync def main():\n"
        "  server = await asyncio.start_server(print, '127.0.0.1', 0)\n"
        "  if server.sockets: print('BREACH')\n"
        "try: asyncio.run(main())\nexcept OSError: pass",
    ),
]
