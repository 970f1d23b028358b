"""Web APIs as tools: what is sent, what comes back, and what no argument can do."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from retrain.config import load_config
from retrain.tools import ToolResult, ToolRunner, resolve_tools
from retrain.tools.http import HttpTool
from retrain.tools.path import find
from retrain.types import InfrastructureError, ToolCall, UserError
from runs import rl_config

KEY = "very-secret-4711"
QUERY = {"query": {"type": "string", "description": "what to look for"}}
FOUND = {
    "web": {
        "results": [
            {"title": "A", "url": "http://a", "age": 1},
            {"title": "B", "url": "http://b", "extra": {"snippet": "b"}},
        ]
    }
}


class Server:
    """Answers with what a test writes: a status, a body and headers for each request."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.answer: Callable[[str], tuple[int, Any, dict[str, str]]] = lambda path: (
            200,
            FOUND,
            {},
        )
        self.delay_s = 0.0
        self.drop = 0
        self.peak = self.now = 0
        self.url = ""


@contextmanager
def serving() -> Iterator[Server]:
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                body = json.loads(raw) if raw else None
                state.asked.append((self.command, self.path, headers, body))
                state.now += 1
                state.peak = max(state.peak, state.now)
                drop, state.drop = state.drop > 0, max(0, state.drop - 1)
                status, body, extra = (
                    state.answers.pop(0) if state.answers else state.answer(self.path)
                )
            time.sleep(state.delay_s)
            with lock:
                state.now -= 1
            if drop:
                self.close_connection = True
                return
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in extra.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()


def build(server: Server, path: str = "/search", **params: Any) -> Any:
    base = {"name": "search", "description": "Search the web.", "parameters": QUERY}
    base |= {"url": server.url + path, "backoff_s": 0.001}
    [tool] = resolve_tools("http", base | params)
    return tool


async def call(tool: Any, *arguments: dict[str, Any], **options: Any) -> list[ToolResult]:
    try:
        async with ToolRunner([tool], **{"retries": 0, **options}) as runner:
            return await runner.run([ToolCall(tool.name, given) for given in arguments])
    finally:
        await tool.close()


async def test_a_search_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", KEY)
    with serving() as server:
        tool = build(
            server,
            query={"q": "{query}", "count": 5},
            headers={"Accept": "application/json"},
            headers_env={"X-Token": "SEARCH_KEY", "Authorization": "Bearer ${SEARCH_KEY}"},
            result="web.results[].{title, link: url, about: extra.snippet}",
            max_results=1,
        )
        [result] = await call(tool, {"query": "a b&count=9#?"})
        assert tool.parameters["required"] == ["query"]
        [(method, path, headers, body)] = server.asked
    assert (method, body) == ("GET", None)
    assert urlsplit(path).path == "/search"
    assert parse_qsl(urlsplit(path).query) == [("q", "a b&count=9#?"), ("count", "5")]
    assert headers["x-token"] == KEY
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["accept"] == "application/json"
    assert (result.status, json.loads(result.text)) == ("ok", [{"title": "A", "link": "http://a"}])


async def test_a_body_holds_arguments_as_they_are() -> None:
    parameters = {
        "text": {"type": "string"},
        "n": {"type": "integer", "default": 3},
        "tags": {"type": "array", "default": None},
        "lang": {"type": "string", "enum": ["de", "fr"], "default": None},
    }
    body = {"q": "<{text}>", "n": "{n}", "tags": "{tags}", "deep": [{"l": "{lang}"}], "x": "{{y}}"}
    with serving() as server:
        tool = build(server, method="POST", parameters=parameters, json=body, query={"l": "{lang}"})
        results = await call(
            tool,
            {"text": '"},{n}', "tags": [1, "b"], "lang": "de"},
            {"text": "t"},
            {"text": "t", "lang": "it"},
        )
        asked = {path: body for method, path, _, body in server.asked if method == "POST"}
    assert asked == {
        "/search?l=de": {
            "q": '<"},{n}>',
            "n": 3,
            "tags": [1, "b"],
            "deep": [{"l": "de"}],
            "x": "{y}",
        },
        "/search": {"q": "<t>", "n": 3, "deep": [{}], "x": "{y}"},
    }
    assert json.loads(results[0].text) == FOUND
    assert results[2].status == "model_error"


@pytest.mark.parametrize(
    "title",
    [
        "Ada Lovelace",
        "a/b",
        "x?y=1",
        "#x",
        "@evil.example",
        "//evil.example",
        "%2e%2e",
        "\r\nX: y",
        "ü",
    ],
)
async def test_an_argument_stays_in_its_place_in_the_path(title: str) -> None:
    with serving() as server:
        tool = build(server, "/wiki/{query}/summary?lang=en", result=None)
        [result] = await call(tool, {"query": title})
        [(_, path, headers, _)] = server.asked
    assert result.status == "ok"
    parts = urlsplit(path)
    assert [unquote(part) for part in parts.path.split("/")] == ["", "wiki", title, "summary"]
    assert parts.query == "lang=en"
    assert headers["host"] == server.url.removeprefix("http://")


@pytest.mark.parametrize("title", ["..", ".", "../../admin", "a/../b", "..\\admin"])
async def test_an_argument_does_not_lead_up(title: str) -> None:
    with serving() as server:
        [result] = await call(build(server, "/wiki/{query}"), {"query": title})
        assert server.asked == []
    assert result.status == "model_error"
    assert "part of a path" in result.text


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_no_argument_changes_the_host_or_the_other_parameters(text: str) -> None:
    tool = HttpTool("t", "", "https://host/a/{query}?k={query}", QUERY, query={"q": "{query}"})
    try:
        url = tool._request({"query": text}).url
    except Exception as error:
        assert "part of a path" in str(error)
        return
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.fragment) == ("https", "host", "")
    assert parse_qsl(parts.query, keep_blank_values=True) == [("k", text), ("q", text)]
    assert unquote(parts.path) == f"/a/{text}"


async def test_redirects_stay_on_the_host() -> None:
    with serving() as server, serving() as other:
        server.answers = [
            (302, "", {"Location": "/moved?x=1"}),
            (307, "", {"Location": server.url}),
        ]
        [result] = await call(build(server), {"query": "q"})
        assert result.status == "ok"
        assert [path for _, path, _, _ in server.asked] == ["/search", "/moved?x=1", "/"]
        server.answers = [(302, "", {"Location": f"{other.url}/x"})]
        [refused] = await call(build(server), {"query": "q"})
        assert other.asked == []
        server.answer = lambda path: (302, "", {"Location": "/again"})
        [endless] = await call(build(server), {"query": "q"})
    assert (refused.status, endless.status) == ("tool_error", "tool_error")
    assert "redirects to another host or port" in refused.text
    assert "without end" in endless.text


async def test_refusals_are_shown_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", KEY)
    with serving() as server:
        env = {"Authorization": "Bearer ${SEARCH_KEY}"}
        server.answers = [(403, f"the key {KEY} is not valid", {}), (200, f"You sent {KEY}", {})]
        tool = build(server, headers_env=env)
        first, second = [
            (await call(build(server, headers_env=env), {"query": "q"}))[0] for _ in "ab"
        ]
        assert len(server.asked) == 2
    assert (first.status, first.text) == (
        "tool_error",
        "search answered 403: the key *** is not valid",
    )
    assert (second.status, second.text) == ("ok", "You sent ***")
    assert KEY not in json.dumps(tool.parameters) + tool.description


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_passes_is_tried_again_and_masks_in_the_end(status: int) -> None:
    with serving() as server:
        server.answers = [(status, "busy", {"Retry-After": "0.01"})] * 2
        [result] = await call(build(server, retries=2), {"query": "q"})
        assert (result.status, len(server.asked)) == ("ok", 3)
        server.answer = lambda path: (status, "busy", {"Retry-After": "0"})
        with pytest.raises(InfrastructureError, match=rf"answered {status}: busy \(2 attempts\)"):
            await call(build(server, retries=1), {"query": "q"})


async def test_hang_ups_silence_and_a_closed_port() -> None:
    with serving() as server:
        server.drop = 1
        [result] = await call(build(server, retries=1), {"query": "q"})
        assert (result.status, len(server.asked)) == ("ok", 2)
        server.delay_s = 0.5
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.1 s"):
            await call(build(server, retries=0, timeout_s=0.1), {"query": "q"})
        server.delay_s = 0.0
    with pytest.raises(InfrastructureError, match=r"Connect.*\(2 attempts\)"):
        await call(build(server, retries=1), {"query": "q"})


async def test_answers_that_hold_no_result() -> None:
    with serving() as server:
        path = {"result": "web.results[].title"}
        server.answers = [(200, "<html>", {}), (200, {"web": {}}, {}), (200, "x" * 5000, {})]
        results = []
        for params in (path, path, {**path, "max_bytes": 99}):
            results += await call(build(server, **params), {"query": "q"})
        server.answers = [(200, "x" * 5000, {})]
        results += await call(build(server, max_bytes=99), {"query": "q"})
    assert [(r.status, r.text) for r in results] == [
        ("tool_error", "the answer of search is no JSON"),
        ("ok", "No results."),
        ("tool_error", "the answer of search is longer than 99 bytes"),
        ("ok", "x" * 99),
    ]


async def test_no_more_requests_at_once_than_allowed() -> None:
    with serving() as server:
        server.delay_s = 0.1
        results = await call(
            build(server, max_concurrency=2), *[{"query": "q"}] * 5, timeout_s=0.15
        )
        assert server.peak == 2
    assert [r.status for r in results] == ["ok"] * 5


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({"url": "https://{query}/x"}, "cannot be one"),
        ({"url": "https://host{query}"}, "cannot be one"),
        ({"url": "{query}"}, "cannot be one"),
        ({"url": "https://user:pw@host/"}, "cannot be one"),
        ({"url": "https://host/a/../b"}, "cannot be one"),
        ({"url": "https://host/#x"}, "cannot be one"),
        ({"url": "ftp://host/"}, "cannot be one"),
        ({"url": "https://host/{page}"}, "names {page}, which is no parameter"),
        ({"query": {"q": "{page}"}}, r"query\.q names {page}"),
        ({"method": "POST", "json": {"a": ["{b}"]}}, r"json\.a names {b}"),
        ({"json": {"a": 1}}, "json does nothing in a GET"),
        ({"method": "PUT"}, "method is 'PUT'"),
        ({"result": "a..b"}, r"cannot be read from '\.\.b' on"),
        ({"result": "a[].{b}.c"}, "cannot be read"),
        ({"max_results": 0}, "max_results is 0"),
        ({"max_results": 2.5}, "max_results is 2.5"),
        ({"max_bytes": 1e6}, "max_bytes is 1000000.0"),
        ({"max_concurrency": 1.5}, "max_concurrency is 1.5"),
        ({"retries": 1.5}, "retries is 1.5"),
        ({"headers": {"X": 1}}, r"headers\.X: its value"),
        ({"headers": {"X": "caf\u00e9"}}, r"headers\.X: its value"),
        ({"headers": {"X": "a\nb"}}, r"headers\.X: its value"),
        ({"headers": {"X": "a "}}, r"headers\.X: its value"),
        ({"headers": {"X Y": "a"}}, "'X Y' cannot be a header's name"),
        ({"headers": {"caf\u00e9": "a"}}, "cannot be a header's name"),
        ({"headers": ["X"]}, "headers is"),
        ({"headers_env": {"X": "LINES_4711"}}, r"headers_env\.X: its value"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout_s": "long"}, "timeout_s is 'long'"),
        ({"headers_env": {"A": "NOT_SET_4711"}}, "NOT_SET_4711 is not set"),
        ({"headers_env": {"A": "Bearer sk-1"}}, "names no variable"),
        ({"parameters": None}, "declares none"),
        ({"name": "web search"}, "cannot be a tool's name"),
        ({"verb": "GET"}, "has no parameter 'verb'"),
    ],
)
def test_what_cannot_be_is_refused(
    params: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES_4711", f"{KEY}\nX: y")
    server = Server()
    server.url = "http://127.0.0.1:1"
    with pytest.raises(UserError, match=cause) as refused:
        build(server, **params)
    assert "sk-1" not in str(refused.value)


def test_a_path_into_json() -> None:
    value = {"a": [{"b": 1, "c": {"d": [5, 6]}}, {"b": None}, 7], "e": "x"}
    for path, found in (
        ("", value),
        ("e", "x"),
        ("a[].b", [1]),
        ("a[0].c.d[-1]", 6),
        ("a[0].c.d", [5, 6]),
        ("a[9].b", None),
        ("a[].{b, last: c.d[1]}", [{"b": 1, "last": 6}]),
        ("{x: e, none}", {"x": "x"}),
        ("e.b[].c", []),
        ("[]", []),
    ):
        assert find(path, value) == found, path


def test_the_examples_of_the_page_are_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("POOL_KEY", "SEARCH_KEY"):
        monkeypatch.setenv(variable, KEY)
    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text(encoding="utf-8")
    built = []
    for text in re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if any(f"name: {name}\n" in text for name in ("llm_pool", "http", "simulated")):
            section = YAML(typ="safe", pure=True).load(text)
            load_config(rl_config(Path("runs"), **section))
            for tool in section["environment"]["tools"]:
                params = tool.get("params", {})
                built += [made.name for made in resolve_tools(tool["name"], params)]
    assert built == ["python", "price", "llm_pool", "web_search", "weather", "book_flight"]
