"""Teachers as a config describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from engine_servers.server import EngineServer
from retrain.config import load_config
from retrain.config.teachers import TeacherConfig
from retrain.loops.teachers import build_guides
from retrain.loops.world import build_renderer
from retrain.models import Policy, load_policy
from retrain.rollout import to_samples
from retrain.teachers.guides import Guides
from retrain.teachers.local import LocalTeacher
from retrain.types import (
    InfrastructureError,
    Rollout,
    Sample,
    Task,
    UserError,
)
from runs import model_section, rl_config
from scripted import play
from tiny import tiny_gpt2

SECTIONS = TypeAdapter(list[TeacherConfig])


@pytest.fixture(scope="module")
def student() -> Policy:
    return load_policy(load_config(rl_config(Path("runs"))).model)


def build(student: Policy, *sections: dict[str, Any], **more: Any) -> Guides:
    config = load_config(rl_config(Path("runs")))
    renderer = build_renderer(config, student)
    return build_guides(SECTIONS.validate_python(list(sections)), student, renderer, config, **more)


def local(**changed: Any) -> dict[str, Any]:
    return {"type": "model", "model": model_section(hidden_size=16)} | changed


def other_tokenizer() -> dict[str, Any]:
    section = model_section("gpt2")
    section["from_scratch"]["tokenizer"]["vocab_size"] = 264
    return section


async def said(student: Policy, **metadata: Any) -> tuple[Rollout, Sample]:
    renderer = build_renderer(load_config(rl_config(Path("runs"))), student)
    rollout, _ = await play(renderer, ["It is 46.<|endoftext|>"])
    rollout.task = Task("t", rollout.task.prompt, metadata=metadata)
    return rollout, to_samples(rollout)[0]


@pytest.fixture(scope="module")
def served(student: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's own tokenizer, another model."""
    path = tmp_path_factory.mktemp("served")
    tiny_gpt2(7, len(student.tokenizer)).save_pretrained(path)
    student.tokenizer.save_pretrained(path)
    return path


async def test_a_model_of_ones_own_is_loaded_and_frozen(student: Policy) -> None:
    guides = build(student, local())
    rollout, sample = await said(student)
    await guides.attach([rollout], [sample])
    same = load_policy(load_config(rl_config(Path("r"), model=local()["model"])).model)
    expected = await LocalTeacher(same.model).score(sample.token_ids)
    mask = np.array(sample.loss_mask, dtype=bool)
    np.testing.assert_allclose(
        np.array(sample.teacher_logprobs)[mask], np.array(expected)[mask], atol=1e-5
    )
    assert not any(p.requires_grad for p in same.model.parameters())
    await guides.close()


async def test_another_tokenizer_is_aligned_or_refused(student: Policy) -> None:
    guides = build(student, local(model=other_tokenizer()))
    rollout, sample = await said(student)
    metrics = await guides.attach([rollout], [sample])
    assert metrics["teacher/no_signal"] == 0
    assert metrics["teacher/span_tokens"] >= 1
    await guides.close()
    with pytest.raises(UserError, match=r"teachers.0 \(big\) has another tokenizer than"):
        build(student, local(model=other_tokenizer(), name="big"), same_tokenizer=True)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_a_server_is_asked_with_the_key_and_the_name(
    student: Policy, served: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    rollout, sample = await said(student)
    with EngineServer(served, kind, name="big") as server:
        section = {"type": kind, "url": server.url, "api_key_env": "TEACHER_KEY"}
        if kind == "vllm":
            section["model"] = "big"
        guides = build(student, section | {"tokenizer": str(served)})
        await guides.prepare()
        await guides.attach([rollout], [sample])
        path = {"vllm": "/v1/completions", "sglang": "/generate"}[kind]
        assert server.asked(path)[-1].get("model") == ("big" if kind == "vllm" else None)
        assert server.headers[-1]["authorization"] == "Bearer sesame"
        expected = await LocalTeacher(tiny_gpt2(7, len(student.tokenizer))).score(sample.token_ids)
        mask = np.array(sample.loss_mask, dtype=bool)
        np.testing.assert_allclose(
            np.array(sample.teacher_logprobs)[mask], np.array(expected)[mask], atol=1e-5
        )
        await guides.close()


async def test_patience_and_turns_of_a_server(student: Policy, served: Path) -> None:
    rollout, sample = await said(student)
    with EngineServer(served, "vllm", delay_s=0.05) as server:
        section = {"type": "vllm", "url": server.url, "retries": 0, "max_concurrency": 2}
        guides = build(student, section)
        await guides.prepare()
        await guides.attach([rollout], [sample] * 6)
        assert server.peak == 2
        server.knobs.fail_next = 1
        with pytest.raises(InfrastructureError, match="answered 500"):
            await guides.attach([rollout], [sample])
        await guides.close()
        hasty = build(student, section | {"timeout_s": 0.3})
        await hasty.prepare()
        server.knobs.hang = True
        with pytest.raises(InfrastructureError, match=r"no answer within 0.3 s"):
            await hasty.attach([rollout], [sample])
        server.knobs.hang = False
        await hasty.close()


async def test_weights_and_tasks(student: Policy) -> None:
    """Two teachers, one of which speaks for even numbers only."""
    second = local(model=model_section(hidden_size=64))
    heavy = second | {"weight": 3, "when": {"parity": "0"}, "name": "second"}
    guides, first, other = (build(student, *s) for s in ([local(), heavy], [local()], [second]))
    columns = []
    for asked, parity in ((guides, "0"), (guides, "1"), (first, "0"), (other, "0")):
        rollout, sample = await said(student, parity=parity)
        await asked.attach([rollout], [sample])
        columns.append(np.array(sample.teacher_logprobs)[np.array(sample.loss_mask, dtype=bool)])
        await asked.close() if asked is not guides else None
    mixture = np.log(0.25 * np.exp(columns[2]) + 0.75 * np.exp(columns[3]))
    np.testing.assert_allclose(columns[0], mixture, atol=1e-5)
    np.testing.assert_allclose(columns[1], columns[2], atol=1e-6)
    await guides.close()
    with pytest.raises(UserError, match=r"distillation.teachers.1: another .* named 'teacher1'"):
        build(student, local(name="teacher1"), local())


async def test_batch_tokens_bound_a_forward_pass(
    student: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    run = LocalTeacher._run

    def watched(self: LocalTeacher, batch: Any) -> Any:
        sizes.append(len(batch))
        return run(self, batch)

    monkeypatch.setattr(LocalTeacher, "_run", watched)
    rollout, sample = await said(student)
    for limit, largest in ((2 * len(sample), 2), (100_000, 6)):
        guides = build(student, local(batch_tokens=limit))
        sizes.clear()
        await guides.attach([rollout], [sample] * 6)
        assert max(sizes) == largest and sum(sizes) == 6
        await guides.close()


REFUSED = [
    ({"type": "torch"}, "type"),
    (local(weight=0), "weight"),
    (local(when={"kind": []}), "matches no task"),
    (local(name=""), "name"),
    (local(model=model_section() | {"peft": {"r": 2}}), "peft: does nothing for a teacher"),
    (local(model=model_section() | {"gradient_checkpointing": True}), "gradient_checkpointing"),
    ({"type": "vllm", "url": "localhost:8000"}, "is not a web address"),
    ({"type": "vllm", "url": "http://a", "api_key_env": "sk-123 4"}, "environment variable"),
    ({"type": "sglang", "url": "http://a", "model": "big"}, "model"),
    ({"type": "vllm", "url": "http://a", "batch_tokens": 5}, "batch_tokens"),
]


@pytest.mark.parametrize(("section", "said"), REFUSED)
def test_sections_that_cannot_be_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        SECTIONS.validate_python([section])
    assert "sk-123" not in str(refused.value.errors(include_input=False, include_url=False))


def test_what_cannot_be_had_is_said_early(student: Policy, tmp_path: Path) -> None:
    missing = {"name_or_path": str(tmp_path / "none")}
    with pytest.raises(UserError, match=r"distillation.teachers.0: model directory .* not exist"):
        build(student, local(model=missing))
    server = {"type": "vllm", "url": "http://127.0.0.1:1"}
    with pytest.raises(UserError, match=r"teachers.1.tokenizer: no tokenizer .*none that loads"):
        build(student, local(), server | {"tokenizer": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"teachers.0.api_key_env: .* NO_SUCH_KEY is not set"):
        build(student, server | {"api_key_env": "NO_SUCH_KEY"})


async def test_a_server_that_is_not_there_is_said_when_teachers_are_prepared(
    student: Policy,
) -> None:
    guides = build(student, {"type": "vllm", "url": "http://127.0.0.1:1", "retries": 0})
    with pytest.raises(UserError, match=r"distillation.teachers.0 \(teacher0\): .* no vllm server"):
        await guides.prepare()
    await guides.close()
