"""`POST /v1/chat/completions`: of a server's model, or of replies that a test writes."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from engine_servers.backend import Backend, Job
from engine_servers.knobs import Knobs
from engine_servers.wire import Answer, Call, Dialect, Routes, Wire

PATH = "/v1/chat/completions"


def chat_routes(backend: Backend, name: str) -> Routes:
    """The path that a server's own model answers."""

    async def chat(call: Call) -> Answer:
        body = call.body
        if body.get("model") not in (name, *backend.adapters):
            return Answer(404, {"error": {"message": f"no model {body.get('model')}"}})
        prompt = backend.tokenizer.encode(_render(backend.tokenizer, body["messages"]))
        room = backend.context_limit - len(prompt)
        if room < 1:
            return Answer(400, {"error": {"message": "the messages exceed the context length"}})
        seed, stop = body.get("seed"), body.get("stop") or ()
        job = Job(
            prompt,
            min(body.get("max_tokens") or room, room),
            temperature=body.get("temperature", 1.0),
            seed=uuid.uuid4().int if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            eos=backend.eos,
            adapter=backend.adapters.get(body["model"]),
        )
        await backend.generate(job)
        text = backend.text(job.token_ids, skip_special_tokens=True)
        finish = "length" if job.reason == "length" else "stop"
        return Answer(body=reply(body["model"], text, finish, len(prompt), len(job.token_ids)))

    return {("POST", PATH): chat}


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if tokenizer.chat_template:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def reply(
    model: str, text: str | None, finish: str, prompt_tokens: int, completion_tokens: int
) -> dict[str, Any]:
    """An answer, as OpenAI's API shapes it."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


class ChatServer(Dialect):
    """An endpoint without a model, as a context manager.

    Args:
        say: the reply to a request's messages; its length in words counts as tokens.
        model: the only one there is.
        api_key: asked for, if it is given.
    """

    generating = frozenset({PATH})

    def __init__(
        self,
        say: Callable[[list[dict[str, str]]], str] = lambda messages: "Good.",
        *,
        model: str = "small",
        api_key: str | None = None,
    ) -> None:
        self.say = say
        self.model = model
        self.api_key = api_key
        self.answers: list[Answer] = []
        """Sent first, one each."""
        self.knobs = Knobs()
        self.cancelled = threading.Event()
        self._loop = asyncio.new_event_loop()
        self.wire = Wire(self, self.knobs, self._loop)
        self.url = f"http://127.0.0.1:{self.wire.port}/v1"
        self._threads = [
            threading.Thread(target=self._loop.run_forever, daemon=True),
            threading.Thread(target=self.wire.serve, daemon=True),
        ]

    @property
    def bodies(self) -> list[Any]:
        return [body for _, body in self.wire.requests]

    def __enter__(self) -> ChatServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join()
        self._loop.close()

    def routes(self) -> Routes:
        return {("POST", PATH): self._chat}

    def without(self, answer: Any, name: str) -> Any:
        return {key: value for key, value in answer.items() if key != name}

    def failure(self, message: str) -> Any:
        return {"error": {"message": message, "type": "server_error"}}

    async def _chat(self, call: Call) -> Answer:
        if self.knobs.delay_s:
            try:
                await asyncio.sleep(self.knobs.delay_s)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if self.answers:
            return self.answers.pop(0)
        key = call.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and key != self.api_key:
            message = f"Incorrect API key provided: {key}."
            return Answer(401, {"error": {"message": message, "code": "invalid_api_key"}})
        if call.body["model"] != self.model:
            message = f"The model `{call.body['model']}` does not exist."
            return Answer(404, {"error": {"message": message, "code": "model_not_found"}})
        messages = call.body["messages"]
        text = self.say(messages)
        prompt_tokens = sum(len(message["content"].split()) for message in messages)
        return Answer(body=reply(self.model, text, "stop", prompt_tokens, len(text.split())))
