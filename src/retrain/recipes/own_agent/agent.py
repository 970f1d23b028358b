"""An agent as its owner has it: the OpenAI SDK and a calculator. It knows nothing of retrain.

`python agent.py tasks.jsonl` answers a file of questions; `solve` answers one.
"""

import ast
import json
import operator
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI

SYSTEM = "Use the calculator. Answer with the number."
CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def calculate(expression: str) -> int:
    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return int(OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        return int(ast.literal_eval(ast.unparse(node)))

    return value(ast.parse(expression, mode="eval").body)


def use(arguments: str) -> str:
    try:
        return str(calculate(json.loads(arguments)["expression"]))
    except Exception as error:
        return f"error: {type(error).__name__}"


def solve(task: dict[str, Any], client: OpenAI | None = None) -> str:
    client = client or OpenAI()
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task["prompt"]},
    ]
    for _ in range(3):
        answer = client.chat.completions.create(
            model="big-model", messages=messages, tools=[CALCULATOR]
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            break
        messages.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            result = use(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return message.content or ""


def main(path: str) -> None:
    tasks = [json.loads(line) for line in Path(path).read_text().splitlines()]
    client = OpenAI()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda task: solve(task, client), tasks))
    right = sum(a == task["answer"] for a, task in zip(answers, tasks, strict=True))
    print(f"{right} of {len(tasks)} right")


if __name__ == "__main__":
    main(sys.argv[1])
