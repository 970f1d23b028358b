"""The toy experts behind a real OpenAI-compatible server, and the tool that asks them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from retrain.recipes.router_r1.route import RouteTool
from retrain.recipes.router_r1.toy import BY_NAME, EXPERTS, Expert
from retrain.tools.base import ToolSession


class _Handler(BaseHTTPRequestHandler):
    """`POST /v1/chat/completions`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    """Head and body leave together: apart, the second waits for the first to be acknowledged."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        expert = BY_NAME.get(body.get("model", ""))
        if not self.path.endswith("/chat/completions") or expert is None:
            self._answer(404, {"error": {"message": f"no model {body.get('model')!r} here"}})
            return
        self._answer(200, completion(expert, body["messages"][-1]["content"]))

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        return None


def completion(expert: Expert, query: str) -> dict[str, Any]:
    """What the server sends; a character is a token."""
    said = expert.reply(query)
    return {
        "object": "chat.completion",
        "model": expert.name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(query),
            "completion_tokens": len(said),
            "total_tokens": len(query) + len(said),
        },
    }


class PoolServer:
    """A server of the experts, at a port that is free."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class ToyRoute:
    """`RouteTool` over a server of its own, which runs from the first session to the end."""

    name = RouteTool.name
    description = RouteTool.description
    parameters = RouteTool.parameters
    timeout_s = RouteTool.timeout_s

    def __init__(self) -> None:
        self._running: tuple[PoolServer, RouteTool] | None = None

    def session(self) -> ToolSession:
        if self._running is None:
            server = PoolServer()
            models = [{"name": e.name, "price": e.price, "url": server.url} for e in EXPERTS]
            self._running = server, RouteTool(models, prompt="{query}")
        return self._running[1].session()

    async def close(self) -> None:
        if self._running is not None:
            server, route = self._running
            self._running = None
            await route.close()
            server.close()
