"""A server on this machine that speaks SandboxFusion's `POST /run_code`, for tests.

It runs what it is sent without any isolation: send it benign code only. It can be told to
misbehave.
"""

from __future__ import annotations

import base64
import json
import select
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_LIMITED = 'ulimit -v "$1"; shift; exec "$@"'


class RunCodeServer:
    """As a context manager it serves on 127.0.0.1, on a free port, until it is left."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        """What was asked, as parsed JSON."""
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.running = 0
        self.peak = 0
        """Most requests at once so far."""
        self.hung_up = threading.Event()
        """A client closed its connection while its answer was waited for."""
        self.status_code = 200
        self.body: bytes | None = None
        """Answered in place of what the code gives."""
        self.delay_s = 0.0
        """Passes before an answer, unless the client hangs up."""
        self.endless = False
        """The answer never ends."""
        self.drop = False
        """The connection is closed in place of an answer."""
        self.lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def answer(self, **fields: Any) -> None:
        """Answer with these fields, whatever is asked."""
        self.body = json.dumps(fields).encode()

    def finish(self, return_code: int | None = 0, **ran: Any) -> None:
        """Answer as if the code had run so."""
        ran = {"status": "Finished", "return_code": return_code, "stdout": "", "stderr": ""} | ran
        status = "Success" if return_code == 0 else "Failed"
        self.answer(status=status, message="", compile_result=None, run_result=ran, files={})

    def __enter__(self) -> RunCodeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: RunCodeServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_POST(self) -> None:
        owner = self.server.owner
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests.append(request)
            owner.headers.append({key.lower(): value for key, value in self.headers.items()})
            owner.paths.append(self.path)
            owner.running += 1
            owner.peak = max(owner.peak, owner.running)
        try:
            self._answer(owner, request)
        except OSError:
            owner.hung_up.set()
        finally:
            with owner.lock:
                owner.running -= 1

    def _answer(self, owner: RunCodeServer, request: dict[str, Any]) -> None:
        if owner.delay_s and select.select([self.connection], [], [], owner.delay_s)[0]:
            owner.hung_up.set()
            self.close_connection = True
            return
        if owner.drop:
            self.close_connection = True
            return
        if self.path.partition("?")[0] != "/run_code":
            self._send(404, b'{"detail":"Not Found"}')
        elif owner.endless:
            self.send_response(owner.status_code)
            self.end_headers()
            while True:
                self.wfile.write(b"x" * 2**16)
        elif owner.body is not None:
            self._send(owner.status_code, owner.body)
        else:
            self._send(owner.status_code, json.dumps(run_code(request)).encode())

    def _send(self, status_code: int, body: bytes) -> None:
        self.send_response(status_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def run_code(request: dict[str, Any]) -> dict[str, Any]:
    """What SandboxFusion answers, field by field; its `isolation: none`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in request["files"].items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        script = Path(folder, "tmp_script.py")
        script.write_text(request["code"], encoding="utf-8")
        limit = str(request["memory_limit_MB"] * 1024)
        command = ["sh", "-c", _LIMITED, "sh", limit, sys.executable, str(script)]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        ran: dict[str, Any] = {"status": "Finished"}
        try:
            stdout, stderr = process.communicate(timeout=request["run_timeout"])
            ran["return_code"] = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            ran |= {"status": "TimeLimitExceeded", "return_code": None}
    ran |= {
        "stdout": stdout.decode(),
        "stderr": stderr.decode(),
        "execution_time": time.perf_counter() - start,
    }
    return {
        "status": "Success" if ran["return_code"] == 0 else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": ran,
        "executor_pod_name": None,
        "files": {},
    }
