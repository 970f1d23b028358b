"""Tools of smolagents, the real package's, as tools here."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from retrain.tools import ToolRunner, as_tool, resolve_tools
from retrain.tools.smolagents import SmolagentsTool
from retrain.types import InfrastructureError, ToolCall, UserError

smolagents = pytest.importorskip("smolagents")

MODULE = '''
from smolagents import Tool, tool


@tool
def add(a: int, b: int = 10) -> int:
    """Add two integers.

    Args:
        a: the first
        b: the second
    """
    return a + b


class Weather(Tool):
    name = "weather"
    description = "Tells the weather."
    inputs = {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "integer", "description": "how many", "nullable": True},
        "unit": {"type": ["string", "number"], "description": "of degrees", "nullable": True},
        "more": {"type": "any", "description": "whatever", "nullable": True},
    }
    output_type = "object"

    def __init__(self, country="CH"):
        super().__init__()
        self.country = country
        self.set_up = 0

    def setup(self):
        self.set_up += 1  # and does not call that of its base

    def forward(self, city: str, days: int | None, unit: str | float | None = None, more=None):
        if city == "Atlantis":
            raise LookupError("it has sunk")
        return {"at": f"{city}, {self.country}", "days": days, "unit": unit, "set_up": self.set_up}


class Look(Tool):
    name = "look"
    description = "Looks."
    inputs = {"picture": {"type": "image", "description": "a picture"}}
    output_type = "string"

    def forward(self, picture):
        return "nice"


class Down(Tool):
    name = "down"
    description = "Fails."
    inputs = {"whose": {"type": "string", "description": "fault"}}
    output_type = "string"

    def forward(self, whose):
        from retrain import types

        raise getattr(types, whose)("down")


class Broken(Tool):
    name = "broken"
    description = "Has an input that forward does not take."
    inputs = {"x": {"type": "string", "description": "x"}}
    output_type = "string"

    def forward(self):
        return ""


weather = Weather("FR")
'''


@pytest.fixture
def module(tmp_path: Path) -> str:
    path = tmp_path / "tools_of_smolagents.py"
    path.write_text(MODULE)
    return str(path)


async def call(tool: object, **arguments: object) -> tuple[str, str]:
    async with ToolRunner([tool]) as runner:  # type: ignore[list-item]
        [result] = await runner.run([ToolCall(next(iter(runner.tools)), arguments)])
    return result.status, result.text


async def test_a_decorated_function_by_its_import_path(module: str) -> None:
    [add] = resolve_tools(f"{module}:add")
    assert add.name == "add"
    assert add.description == "Add two integers."
    assert add.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first"},
            "b": {"type": ["integer", "null"], "description": "the second"},
        },
        "required": ["a"],
    }
    assert await call(add, a=2, b=3) == ("ok", "5")
    assert await call(add, a="2") == ("ok", "12")  # between tags all is text
    assert await call(add, b=1) == ("model_error", "argument 'a' is missing")
    assert await call(add, a="two") == (
        "model_error",
        "argument 'a' must be integer, got 'two'",
    )
    assert await call(add, a=True) == ("model_error", "argument 'a' must be integer, got True")
    assert await call(add, a=1, c=2) == (
        "model_error",
        "unknown argument 'c' (arguments: a, b)",
    )


@pytest.mark.parametrize("fault", [InfrastructureError, UserError])
async def test_a_fault_that_a_tool_types_keeps_its_type(module: str, fault: type) -> None:
    [down] = resolve_tools(f"{module}:Down")
    with pytest.raises(fault, match="down"):
        async with ToolRunner([down], retries=0) as runner:
            await runner.run([ToolCall("down", {"whose": fault.__name__})])


async def test_a_class_with_nullable_inputs_is_set_up_once(module: str) -> None:
    [tool] = resolve_tools(f"{module}:Weather", {"country": "IT"})
    assert tool.parameters["required"] == ["city"]
    assert tool.parameters["properties"] == {
        "city": {"type": "string", "description": "where"},
        "days": {"type": ["integer", "null"], "description": "how many"},
        "unit": {"type": ["string", "number", "null"], "description": "of degrees"},
        "more": {"description": "whatever"},
    }
    text = '{"at": "Rome, IT", "days": null, "unit": null, "set_up": 1}'
    assert await call(tool, city="Rome") == ("ok", text)  # days has no default: it is given None
    assert await call(tool, city="Rome", days=None, more=[1]) == ("ok", text)
    status, text = await call(tool, city="Rome", days=2.5, unit=[1])
    assert status == "model_error"
    assert text == (
        "argument 'days' must be integer or null, got 2.5; "
        "argument 'unit' must be string or number or null, got [1]"
    )
    assert await call(tool, city="Atlantis") == ("tool_error", "LookupError: it has sunk")


async def test_an_instance_keeps_what_it_was_made_with(module: str) -> None:
    [tool] = resolve_tools(f"{module}:weather")
    assert '"at": "Nice, FR"' in (await call(tool, city="Nice"))[1]
    with pytest.raises(UserError, match="takes no parameters"):
        resolve_tools(f"{module}:weather", {"country": "IT"})


def test_what_cannot_be_used_is_refused(module: str) -> None:
    with pytest.raises(UserError, match="'picture' is of type image"):
        resolve_tools(f"{module}:Look")
    with pytest.raises(UserError, match=r"tool class Broken cannot be made: Exception: .*forward"):
        resolve_tools(f"{module}:Broken")
    with pytest.raises(UserError, match=r"tool class Weather cannot be made: TypeError.*\n.*count"):
        resolve_tools(f"{module}:Weather", {"city": "x"})


async def test_calls_run_in_threads_and_setup_only_once_among_them() -> None:
    both = threading.Barrier(2, timeout=10)
    made: list[int] = []

    class Meet(smolagents.Tool):  # type: ignore[misc, name-defined]
        name = "meet"
        description = "Waits for another."
        inputs: ClassVar[dict[str, Any]] = {}
        output_type = "string"

        def setup(self) -> None:
            made.append(1)

        def forward(self) -> str:
            both.wait()
            return "met"

    async with ToolRunner([as_tool(Meet)]) as runner:
        results = await runner.run([ToolCall("meet", {}), ToolCall("meet", {})])
    assert [r.text for r in results] == ["met", "met"]
    assert made == [1]


def test_tools_of_other_kinds_do_not_import_it() -> None:
    code = (
        "import sys; from retrain.tools import as_tool\n"
        "def f(x: int) -> int: return x\n"
        "as_tool(f); assert 'smolagents' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_of_the_package_itself() -> None:
    tool = as_tool(smolagents.FinalAnswerTool())
    assert isinstance(tool, SmolagentsTool)
    assert tool.name == "final_answer"
    assert "type" not in tool.parameters["properties"]["answer"]
