"""An MCP server of the protocol's first version, without the SDK: it starts in no time.

It is one loop over standard input: a call that blocks blocks all. Its tools come on two pages.
`python mcp_raw_server.py deaf` goes on when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

NUMBERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/N"}, "b": {"$ref": "#/$defs/N"}, "any": {}},
    "required": ["a"],
    "$defs": {"N": {"type": "integer"}},
}
NAMES = ["process_id", "note", "read_notes", "die", "wedge", "add", "add/2", "weird"]
notes: list[str] = []


def call(name: str, arguments: dict[str, Any]) -> object:
    if name == "process_id":
        return os.getpid()
    if name == "note":
        notes.append(arguments["text"])
        return len(notes)
    if name == "read_notes":
        return ",".join(notes)
    if name == "wedge":
        time.sleep(3600)
    if name == "die":
        print("dying as told", file=sys.stderr, flush=True)
        os._exit(3)
    return arguments["a"] + arguments.get("b", 1)


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        about = {"name": "raw", "version": "1"}
        offered = {"protocolVersion": "2024-11-05", "capabilities": {"tools": {}}}
        return {"result": {**offered, "serverInfo": about}}
    if method == "tools/list":
        start = int(params.get("cursor", 0))
        page = [
            {"name": name, "inputSchema": NUMBERS if "add" in name else {"type": "object"}}
            for name in NAMES[start : start + 6]
        ]
        return {"result": {"tools": page, **({} if start else {"nextCursor": "6"})}}
    if method == "tools/call":
        kind = "hologram" if params["name"] == "weird" else "text"
        text = "" if kind != "text" else str(call(params["name"], params["arguments"]))
        return {"result": {"content": [{"type": kind, "text": text}]}}
    return {"error": {"code": -32601, "message": "Method not found"}}


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" in asked:
            reply = answer(asked["method"], asked.get("params") or {})
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **reply}), flush=True)
    if "deaf" in sys.argv:
        time.sleep(3600)
