"""Environments with an agent whose words are given: the loop, and when it stops."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from retrain.envs import DialogueEnvironment, Environment, ScriptedUser, Step, ToolEnvironment
from retrain.rendering import Codec, Renderer, TagFormat, ToolSchema, make_template
from retrain.tools import resolve_tools
from retrain.types import (
    FinishReason,
    InfrastructureError,
    Message,
    MessageType,
    Prompt,
    Rollout,
    TagConfig,
    Task,
    ToolCall,
    Turn,
    UserError,
)
from runs import Countdown
from tiny import byte_tokenizer

TASK = Task("t", (Message("hello", MessageType.MESSAGE),), metadata={"lines": ["a", "b"]})


@dataclass
class Speaker:
    """Says its lines; the renderer reads its calls. `cut` ends the last line that way."""

    lines: Sequence[str]
    renderer: Renderer | None = None
    cut: FinishReason = "stop_token"
    seen: list[list[str]] = field(default_factory=list)
    schemas: list[str] = field(default_factory=list)

    def start(self, task: Task) -> Rollout:
        return Rollout(task=task)

    async def act(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Message:
        said = len(rollout.model_messages)
        self.seen.append([m.content for m in rollout.messages])
        self.schemas = [tool["function"]["name"] for tool in tools]
        text = self.lines[said]
        calls: tuple[ToolCall, ...] = ()
        if self.renderer is not None:
            calls = self.renderer.message(self.renderer.codec.encode(text), tools).tool_calls
        finish = self.cut if said == len(self.lines) - 1 else "stop_token"
        parent = len(rollout.segments) - 1 if rollout.segments else None
        length = len(rollout.segments[-1]) if rollout.segments else 0
        turn = Turn(
            Prompt(parent, length, [1], [0]), array("i", [2]), array("f", [0.0]), array("i", [0]),
            finish,
        )  # fmt: skip
        message = Message(text, MessageType.MODEL, tool_calls=calls, turn=turn)
        rollout.add_messages(message)
        return message


def tagged() -> Renderer:
    special = ("<eos>", "<code>", "</code>", "<interpreter>", "</interpreter>")
    tokenizer = byte_tokenizer(special=special)
    return Renderer(Codec(tokenizer), make_template(tokenizer), TagFormat(TagConfig()))


def double(x: int) -> int:
    """Twice a number."""
    if x > 100:
        raise InfrastructureError("the adder is away")
    return 2 * x


def tools_of(renderer: Renderer, **settings: object) -> ToolEnvironment:
    return ToolEnvironment(resolve_tools("test_envs:double"), renderer, **settings)  # type: ignore[arg-type]


async def test_one_question_one_answer() -> None:
    rollout = await Environment().spawn().run(TASK, Speaker(["hi"]))
    assert [m.content for m in rollout.messages] == ["hello", "hi"]
    assert (rollout.stop_reason, rollout.env_rewards) == ("answered", [0.0])


@pytest.mark.parametrize("cut", ["length", "context"])
async def test_a_cut_turn_ends_the_rollout(cut: FinishReason) -> None:
    rollout = await Countdown(3).spawn().run(TASK, Speaker(["1", "2"], cut=cut))
    assert (rollout.stop_reason, rollout.env_rewards) == (cut, [1.0, 0.0])


async def test_reset_and_step_of_ones_own() -> None:
    environment = Countdown(3)
    speaker = Speaker(["7", "none", "1"])
    rollout = await environment.spawn().run(TASK, speaker)
    assert rollout.env_rewards == [1.0, 0.0, 1.0] and rollout.stop_reason == "environment"
    assert speaker.seen[0] == ["hello", "3 turns left"]
    assert speaker.seen[2] == [
        "hello", "3 turns left", "7", "2 turns left", "none", "1 turns left",
    ]  # fmt: skip
    assert environment.left == 0, "rollouts work on their own copies"


async def test_max_steps() -> None:
    class Endless(Environment):
        max_steps = 2

        async def step(self, rollout: Rollout, message: Message) -> Step:
            return Step([Message("go on", MessageType.MESSAGE)], reward=0.5)

    rollout = await Endless().spawn().run(TASK, Speaker(["a", "b", "c"]))
    assert (rollout.stop_reason, rollout.env_rewards) == ("max_steps", [0.5, 0.5])


async def test_finish_is_called_after_a_failure() -> None:
    finished: list[str] = []

    class Failing(Environment):
        async def step(self, rollout: Rollout, message: Message) -> Step:
            raise InfrastructureError("away")

        async def finish(self, rollout: Rollout) -> None:
            finished.append(rollout.id)

    with pytest.raises(InfrastructureError):
        await Failing().spawn().run(TASK, Speaker(["a"]))
    assert len(finished) == 1


async def test_tools_are_called_until_an_answer() -> None:
    renderer = tagged()
    speaker = Speaker(["<code>21</code>", "It is 42"], renderer)
    rollout = await tools_of(renderer).spawn().run(TASK, speaker)
    assert [(m.type.value, m.content) for m in rollout.messages] == [
        ("message", "hello"),
        ("model", "<code>21</code>"),
        ("tool", "42"),
        ("model", "It is 42"),
    ]
    assert rollout.stop_reason == "answered" and speaker.schemas == ["double"]
    assert rollout.metrics["tool_calls/ok"] == 1.0


async def test_tools_out_of_steps() -> None:
    renderer = tagged()
    speaker = Speaker(["<code>1</code>", "<code>2</code>", "no"], renderer)
    rollout = await tools_of(renderer, max_steps=2).spawn().run(TASK, speaker)
    assert rollout.stop_reason == "max_steps" and len(rollout.model_messages) == 2


async def test_the_models_fault_is_shown_to_it() -> None:
    renderer = tagged()
    speaker = Speaker(["<code>x</code>", "sorry"], renderer)
    rollout = await tools_of(renderer).spawn().run(TASK, speaker)
    assert rollout.messages[2].type is MessageType.TOOL and "x" in rollout.messages[2].content
    assert rollout.metrics["tool_calls/model_error"] == 1.0


async def test_a_tools_infrastructure_masks() -> None:
    renderer = tagged()
    with pytest.raises(InfrastructureError, match="away"):
        environment = tools_of(renderer, retries=0)
        await environment.spawn().run(TASK, Speaker(["<code>101</code>"], renderer))


async def test_tools_switched_off() -> None:
    renderer = tagged()
    speaker = Speaker(["<code>21</code>", "no"], renderer)
    rollout = await tools_of(renderer, enabled=False).spawn().run(TASK, speaker)
    assert rollout.messages[2].content == "The tools are switched off."
    assert rollout.metrics["tool_calls/tool_error"] == 1.0


async def test_describing_the_tools_opens_with_a_system_message() -> None:
    renderer = tagged()
    environment = tools_of(renderer, describe_tools=True)
    (system, question) = environment.opening(TASK)
    assert system.type is MessageType.SYSTEM and "double" in system.content
    assert question.content == "hello"
    given = Task("t", (Message("Be brief.", MessageType.SYSTEM), *TASK.prompt))
    joined = (await environment.spawn().reset(given))[0].content
    assert joined == f"Be brief.\n\n{system.content}"


async def test_a_task_has_the_tools_that_its_column_lists() -> None:
    renderer = tagged()
    tools = [*resolve_tools("test_envs:double"), *resolve_tools("python")]
    environment = ToolEnvironment(tools, renderer, tools_column="tools", describe_tools=True)
    own = Task("t", TASK.prompt, metadata={"tools": ["double"]})
    speaker = Speaker(["<code>21</code>", "ok"], renderer)
    rollout = await environment.spawn().run(own, speaker)
    assert speaker.schemas == ["double"] and "python" not in rollout.messages[0].content
    assert rollout.messages[3].content == "42"
    assert rollout.metrics["tool/double/ok"] == 1.0
    none = Task("t", TASK.prompt, metadata={"tools": []})
    assert environment.opening(none) == TASK.prompt and environment.tools_for(none) == []
    for column, message in (("double", "must list names"), (["duble"], "'duble'.*no tool")):
        with pytest.raises(UserError, match=message):
            environment.opening(Task("t", TASK.prompt, metadata={"tools": column}))


async def test_a_script_for_all_and_a_script_of_the_tasks_own() -> None:
    for user in (ScriptedUser(["a", "b"]), ScriptedUser(column="lines")):
        rollout = await DialogueEnvironment(user).spawn().run(TASK, Speaker(["1", "2", "3"]))
        assert [m.content for m in rollout.messages] == ["hello", "1", "a", "2", "b", "3"]
        assert rollout.stop_reason == "user_done"


async def test_a_dialogue_ends_at_the_phrase_or_the_limit() -> None:
    user = ScriptedUser(["go on", "bye now", "again"])
    rollout = await DialogueEnvironment(user, stop_phrase="bye").run(TASK, Speaker(["1"] * 9))
    assert [m.content for m in rollout.messages][-1] == "bye now"
    assert rollout.stop_reason == "user_done"
    rollout = await DialogueEnvironment(user, max_turns=2).run(TASK, Speaker(["1"] * 9))
    assert [m.content for m in rollout.messages] == ["hello", "1", "go on", "1"]
    assert rollout.stop_reason == "max_steps"


def test_a_missing_script_is_found_before_the_run() -> None:
    environment = DialogueEnvironment(ScriptedUser(column="missing"))
    with pytest.raises(UserError, match="column 'missing' must hold a list"):
        environment.opening(TASK)
