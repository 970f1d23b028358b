"""The process in which `math_equivalence` parses and compares. Run by file, never imported.

Speaks JSON lines: `{"answers": [...], "text": "..."}` in, `{"equal": bool}` out, after one line
`{"ready": true}`. Expressions can be made to compute without end or to fill the memory, so the
parent kills this process on a time limit and its address space is bounded.
"""

from __future__ import annotations

import json
import logging
import os
import sys

MEMORY_BYTES = 4 << 30


def equal(answers: list[str], text: str) -> bool:
    """math-verify's own time-outs use SIGALRM and are off: the parent has the clock."""
    from math_verify import parse, verify

    found = parse(text, parsing_timeout=None)
    for answer in answers:
        plain = "$" not in answer and "\\boxed" not in answer
        gold = parse(f"${answer}$" if plain else answer, parsing_timeout=None)
        if gold and found and verify(gold, found, timeout_seconds=None):
            return True
    return False


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass
    logging.disable(logging.CRITICAL)
    equal(["1"], "$1$")
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = equal(request["answers"], request["text"])
        except (Exception, RecursionError, MemoryError):
            answer = False
        print(json.dumps({"equal": answer}), file=replies, flush=True)


if __name__ == "__main__":
    main()
