"""`python -m sglang.launch_server`, as a test server."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[3]

if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]
    from engine_servers.launch import main

    main("sglang")
