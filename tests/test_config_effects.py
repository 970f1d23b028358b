"""What keys change of the objects that a run is built from: model, sandbox, tools, rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrain.config import load_config
from retrain.config.model import ModelConfig
from retrain.loops.engines import build_engine
from retrain.loops.world import build_environment, build_renderer, build_sandbox
from retrain.models import load_policy, save_policy
from retrain.models.load import check_origin
from retrain.sandbox import AutoSandbox, HttpSandbox, JailSandbox, MontySandbox
from retrain.types import InfrastructureError, MessageType, Rollout, UserError
from runs import TAGS, model_section, rl_config
from test_envs import TASK, Speaker
from tiny import byte_tokenizer, tiny_qwen3


def config(**sections: Any) -> Any:
    return load_config(rl_config(Path("runs"), **sections))


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy(ModelConfig.model_validate(model_section()))


# Model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, policy: Any) -> str:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_policy(policy, path)
    return str(path)


def loaded(**section: Any) -> Any:
    return load_policy(ModelConfig.model_validate(section)).model


def test_name_or_path_decides_the_weights(saved: str, policy: Any, tmp_path: Path) -> None:
    other = tiny_qwen3()
    other.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for path, expected in ((saved, policy.model), (str(tmp_path), other)):
        found = loaded(name_or_path=path)
        assert torch.equal(found.lm_head.weight, expected.lm_head.weight)


def test_torch_dtype_device_and_attention(saved: str, tmp_path: Path) -> None:
    def dtype(path: str, name: str) -> torch.dtype:
        found: torch.dtype = next(loaded(name_or_path=path, torch_dtype=name).parameters()).dtype
        return found

    assert dtype(saved, "float32") == torch.float32
    assert dtype(saved, "bfloat16") == torch.bfloat16
    half = load_policy(ModelConfig(name_or_path=saved, torch_dtype="bfloat16"))
    save_policy(half, tmp_path / "half")
    path = str(tmp_path / "half")
    assert (dtype(path, "auto"), dtype(path, "float32")) == (torch.bfloat16, torch.float32)
    for name in ("eager", "sdpa"):
        model = loaded(name_or_path=saved, attn_implementation=name)
        assert model.config._attn_implementation == name
    with pytest.raises(UserError, match=r"model\.device: 'warp' is no device"):
        loaded(name_or_path=saved, device="warp")
    assert next(loaded(name_or_path=saved, device="cpu").parameters()).device.type == "cpu"


def test_gradient_checkpointing_is_switched_on(saved: str) -> None:
    for on in (True, False):
        model = loaded(name_or_path=saved, gradient_checkpointing=on)
        assert model.is_gradient_checkpointing is on


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach: what is asked is written down, and answered with a no."""
    asked: list[dict[str, Any]] = []

    def ask(name: str, **how: Any) -> None:
        asked.append({"name": name, **how})
        raise OSError("no such branch")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", ask)
    with pytest.raises(UserError, match="model org/name cannot be loaded: no such branch"):
        loaded(name_or_path="org/name", revision="v2", trust_remote_code=True)
    assert asked == [{"name": "org/name", "revision": "v2", "trust_remote_code": True}]


def test_unsloth_has_to_be_installed() -> None:
    with pytest.raises(UserError, match=r"model\.loader is unsloth, which is not installed"):
        check_origin(ModelConfig(name_or_path="org/name", loader="unsloth"))


def test_an_adapter_has_the_rank_the_scale_and_the_modules_given() -> None:
    def adapted(**peft: Any) -> dict[str, tuple[int, float]]:
        model = loaded(**model_section(), peft=peft)
        return {
            name.rsplit(".", 1)[-1]: (module.r["default"], module.scaling["default"])
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }

    assert adapted(r=4, alpha=8, target_modules=["q_proj"]) == {"q_proj": (4, 2.0)}
    assert adapted(r=2, alpha=8, target_modules=["v_proj", "q_proj"]) == {
        "q_proj": (2, 4.0), "v_proj": (2, 4.0)}  # fmt: skip
    assert len(adapted()) == 7


def words(text: str = "abc") -> Iterator[str]:
    yield f"{text} " * 50


def test_a_model_from_scratch_is_as_described() -> None:
    def made(model_type: str = "qwen3", config: Any = None, **tokenizer: Any) -> Any:
        section = model_section(model_type, **(config or {}))["from_scratch"]
        section["tokenizer"] |= tokenizer
        return load_policy(ModelConfig.model_validate({"from_scratch": section}))

    assert made("gpt2").model.config.model_type == "gpt2"
    assert made(config={"num_hidden_layers": 1}).model.config.num_hidden_layers == 1
    assert len(made(vocab_size=270).tokenizer) == 270
    assert set(TAGS) <= set(made().tokenizer.get_vocab())
    assert not set(TAGS) & set(made(special_tokens=[]).tokenizer.get_vocab())
    learned = made(corpus="test_config_effects:words", params={"text": "xyzzy"}, special_tokens=[])
    assert len(learned.tokenizer.encode("xyzzy")) == 1
    plain = made(corpus="test_config_effects:words", special_tokens=[])
    assert len(plain.tokenizer.encode("xyzzy")) > 1 == len(plain.tokenizer.encode("abc"))


# Engine


async def test_the_engine_is_as_described(policy: Any) -> None:
    def built(**section: Any) -> Any:
        return build_engine(config(engine=section), policy)

    assert (built().context_limit, built(context_limit=50).context_limit) == (192, 50)
    assert built(max_slots=3)._max_slots == 3
    engine = built(num_threads=1)
    assert engine._num_threads == 1 and built()._num_threads is None
    with pytest.raises(UserError, match="context_limit is 500; the model's own limit is 192"):
        built(context_limit=500)


# Sandbox

MONTY = {"type": "monty", "timeout_s": 0.3}


def ran(*codes: str, **section: Any) -> list[Any]:
    async def run() -> list[Any]:
        sandbox = build_sandbox(config(sandbox=MONTY | section))
        session = await sandbox.session()
        try:
            return [await session.run(code) for code in codes]
        finally:
            await session.close()
            await sandbox.close()

    return asyncio.run(run())


def test_the_limits_of_the_sandbox_are_those_given() -> None:
    endless, large = "while True: pass", "x = [0] * 10_000_000"
    assert ran(endless)[0].status == "timeout"
    assert "longer than 0.2 s" in ran(endless, timeout_s=0.2)[0].error
    assert ran(large, memory_mb=16, timeout_s=5)[0].status == "memory"
    assert ran(large, memory_mb=512, timeout_s=5)[0].status == "ok"
    (result,) = ran("print('a' * 500)", max_output_chars=50)
    assert result.truncated and len(result.stdout) < 100
    assert build_sandbox(config(sandbox=MONTY | {"max_concurrency": 3})).max_concurrency == 3


def test_what_only_some_sandboxes_can_do_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1")
    files = {"data.csv": str(tmp_path / "a.csv")}
    plain = build_sandbox(config())
    assert isinstance(plain, AutoSandbox) and list(plain.candidates) == ["jail", "monty"]
    for wish in ({"files": files}, {"packages": ["numpy"]}, {"writable": True},
                 {"bubblewrap": True}):  # fmt: skip
        ((name, value),) = wish.items()
        found = build_sandbox(config(sandbox=wish))
        assert isinstance(found, AutoSandbox) and list(found.candidates) == ["jail"]
        jail = build_sandbox(config(sandbox={"type": "jail", **wish}))
        assert isinstance(jail, JailSandbox)
        if name == "files":
            assert list(jail._files) == ["data.csv"]
        else:
            asked = getattr(jail, name)
            assert (list(asked) if name == "packages" else asked) == value
        with pytest.raises(UserError, match=f"sandbox type 'monty' has no '{name}'"):
            build_sandbox(config(sandbox={"type": "monty", **wish}))
    assert isinstance(build_sandbox(config(sandbox=MONTY)), MontySandbox)
    http = {"type": "http", "url": "http://127.0.0.1:1", "stateful": False}
    assert isinstance(build_sandbox(config(sandbox=http)), HttpSandbox)
    with pytest.raises(UserError, match=r"needs sandbox\.url"):
        build_sandbox(config(sandbox={"type": "http", "stateful": False}))


# Environment


class Counter:
    """A tool that counts from where it is told to."""

    attempts = 0

    def __init__(self, start: int = 0, wait_s: float = 0.0) -> None:
        self.start, self.wait_s = start, wait_s

    async def __call__(self, text: str) -> str:
        """Count.

        Args:
            text: what to count.
        """
        await asyncio.sleep(self.wait_s)
        Counter.attempts += 1
        if text == "away":
            raise InfrastructureError("the counter is away")
        return f"{self.start} {text}"


def played(policy: Any, *said: str, params: dict[str, Any] | None = None, **section: Any) -> Any:
    """A rollout of the environment in which the model says the lines."""
    tool = {"name": "test_config_effects:Counter", "params": params or {}}
    sandbox = section.pop("sandbox", {})
    environment = {"type": "smolagent", "tools": [tool], **section}
    given = config(environment=environment, sandbox=sandbox)
    renderer = build_renderer(given, policy)
    environment = build_environment(given, renderer, build_sandbox(given))
    return asyncio.run(environment.run(TASK, Speaker(said, renderer)))


CALL = "<code>x</code>"


def results(rollout: Any) -> list[str]:
    return [m.content for m in rollout.messages if m.type is MessageType.TOOL]


def test_tools_are_those_named_with_the_params_given(policy: Any) -> None:
    assert results(played(policy, CALL, "ok")) == ["0 x"]
    assert results(played(policy, CALL, "ok", params={"start": 7})) == ["7 x"]
    with pytest.raises(UserError, match="sercher"):
        environment = {"type": "smolagent", "tools": ["sercher"]}
        given = config(environment=environment)
        build_environment(given, build_renderer(given, policy), build_sandbox(given))


def test_variables_last_over_calls_where_the_sandbox_is_stateful(policy: Any) -> None:
    for stateful, last in ((True, "42"), (False, "NameError")):
        sandbox = MONTY | {"stateful": stateful}
        said = ("<code>x = 41</code>", "<code>x + 1</code>", "ok")
        assert last in results(played(policy, *said, tools=["python"], sandbox=sandbox))[1]


def test_calls_are_read_and_answered_in_the_format_given(policy: Any) -> None:
    tags = {"tool_start": "<t>", "tool_end": "</t>", "response_start": "<r>",
            "response_end": "</r>"}  # fmt: skip
    for fmt, call, around in (
        ({"type": "tags"}, "<code>x</code>", "<interpreter>0 x</interpreter>"),
        ({"type": "tags", **tags}, "<t>x</t>", "<r>0 x</r>"),
        ({"type": "fenced", "language": "count", "output": "counted"}, "```count\nx\n```",
         "```counted\n0 x\n```"),
    ):  # fmt: skip
        rollout = played(policy, call, "ok", tool_format=fmt)
        assert results(rollout) == ["0 x"] and rollout.stop_reason == "answered"
        given = config(environment={"type": "smolagent", "tools": ["python"], "tool_format": fmt})
        renderer = build_renderer(given, policy)
        whole = Rollout(task=TASK)
        whole.add_messages(*rollout.messages[:3])
        text = "".join(renderer.tool_format.render_result("0 x").split())
        assert text == "".join(around.split())
    with pytest.raises(UserError, match="template"):
        played(policy, CALL, "ok", tool_format={"type": "native"})


def test_the_limits_of_calls_are_those_given(policy: Any) -> None:
    assert played(policy, CALL, CALL, CALL, max_steps=2).stop_reason == "max_steps"
    slow = {"wait_s": 5.0}
    late = played(policy, CALL, "ok", params=slow, tool_timeout_s=0.05)
    assert late.metrics["tool_calls/timeout"] == 1
    for retries in (0, 2):
        Counter.attempts = 0
        with pytest.raises(InfrastructureError, match="the counter is away"):
            played(policy, "<code>away</code>", "ok", tool_retries=retries)
        assert Counter.attempts == retries + 1
    (cut,) = results(played(policy, f"<code>{'y' * 400}</code>", "ok", max_output_chars=40))
    assert 40 <= len(cut) < 120
    twice = (CALL, CALL, "ok")
    assert results(played(policy, *twice, max_tool_calls=1)) == [
        "0 x", "No tool calls are left: there were 1 in all.",
    ]  # fmt: skip
    tools = [{"name": "test_config_effects:Counter", "max_calls": 1}]
    assert results(played(policy, *twice, tools=tools))[1] == (
        "No calls of Counter are left: there were 1."
    )
    with pytest.raises(UserError, match="column 'own' must list names of tools, got None"):
        played(policy, "ok", tools_column="own")
    opening = played(policy, "ok", describe_tools=True).messages[0]
    assert opening.type is MessageType.SYSTEM and "Count." in opening.content
    assert played(policy, "ok").messages[0].type is MessageType.MESSAGE
