"""A stand-in for a closed model: an endpoint of OpenAI's shape that answers by rules.

It reads two kinds of question well; where things break it often adds what should be taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from typing import Any

PORT = 8764

_READINGS = (
    # a question, the right expression of its numbers, a wrong one, how often it is the right one
    (r"(\d+) boxes of (\d+) .* and (\d+) loose", "{1}*{0}+{2}", "{1}+{0}*{2}", 0.95),
    (r"(\d+) boxes of (\d+) .* but (\d+) .* break", "{1}*{0}-{2}", "{1}*{0}+{2}", 0.4),
    (r"Of (\d+) .* (\d+) are lost.* (\d+) each", "({0}-{1})*{2}", "({0}+{1})*{2}", 0.95),
)


def expression(question: str) -> str:
    """What it computes for a question, the same every time.

    Raises:
        ValueError: it cannot read the question.
    """
    for pattern, right, wrong, share in _READINGS:
        if found := re.search(pattern, question):
            well = random.Random(question).random() < share
            return (right if well else wrong).format(*found.groups())
    raise ValueError(f"cannot read {question!r}")


def reply(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message: a call of the calculator, then what that said."""
    last = messages[-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": last["content"]}
    arguments = json.dumps({"expression": expression(last["content"])})
    function = {"name": "calculator", "arguments": arguments}
    call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def serve(port: int) -> None:
    """Until it is interrupted."""
    from aiohttp import web

    async def completions(request: web.Request) -> web.Response:
        message = reply((await request.json())["messages"])
        finish = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "finish_reason": finish, "message": message}
        about = {"id": "0", "object": "chat.completion", "created": 0, "model": "big-model"}
        return web.json_response({**about, "choices": [choice]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", completions)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    serve(parser.parse_args().port)
