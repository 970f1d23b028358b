"""What crosses the jail's sockets, and how it is framed.

The control socket (SEQPACKET, one message each) joins two trusted processes. A session's socket
(STREAM) ends in code that the model wrote: the host takes nothing from it on trust, and the
nonce of a request only tells an answer from what was written before the question.
"""

from __future__ import annotations

import struct
from typing import Literal

SPAWN = struct.Struct("<Q")
"""Host to zygote: session id, with two descriptors: the session's socket and its output file."""

REPLY = struct.Struct("<cQi")
"""Zygote to host: kind, session id, value. SPAWNED comes with a pidfd."""
STARTED, UNUSABLE = b"R", b"X"
"""First message of the zygote: it is ready, or why not, as JSON after the kind."""
SPAWNED, FAILED, ENDED = b"S", b"F", b"E"
"""Value of FAILED: an errno; of ENDED: what waitpid says."""

READY, REFUSED = b"R", b"F"
"""First byte on a session's socket, before any code of the model runs; REFUSED goes on with the
reason as UTF-8 until the end."""

REQUEST = struct.Struct("<16sI")
"""Nonce, length of the code that follows, in bytes of UTF-8."""
RESPONSE = struct.Struct("<16sBI")
"""Nonce, index into STATUSES, length of the error text that follows."""
STATUSES: tuple[Literal["ok", "error", "exit", "memory"], ...] = ("ok", "error", "exit", "memory")
"""What a session may claim; the other ends of a call are seen from outside."""

MAX_ERROR_BYTES = 65_536

FILES_PREFIX = "retrain-files-"
"""How the name of a directory with the sandbox's files begins."""
