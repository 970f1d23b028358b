"""Teachers as their config sections describe them, fitted to a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retrain.config.root import TrainingConfig
from retrain.config.teachers import ModelTeacher, SGLangTeacher, TeacherConfig, VLLMTeacher
from retrain.engines.openai import read_key
from retrain.envs import Environment
from retrain.loops.players import codec_of
from retrain.models import Policy, load_policy
from retrain.rendering import Codec, NativeFormat, Renderer, ToolSchema, make_template
from retrain.teachers.base import Teacher
from retrain.teachers.guides import Guide, Guides
from retrain.teachers.local import LocalTeacher
from retrain.teachers.server import ServerTeacher
from retrain.teachers.tokenizers import difference, require_same_tokenizer
from retrain.types import Rollout, UserError


def build_guides(
    teachers: Sequence[TeacherConfig],
    student: Policy,
    renderer: Renderer,
    config: TrainingConfig,
    *,
    environment: Environment | None = None,
    same_tokenizer: bool = False,
) -> Guides:
    """Load the teachers that run here; those on servers are asked for at `Guides.prepare`.

    Args:
        renderer: the student's.
        environment: says which tools a rollout's agent was told of; needed by teachers of another
            tokenizer with the `native` tool format.
        same_tokenizer: whether only teachers with the student's tokenizer will do.

    Raises:
        UserError: a model, a tokenizer or a key that cannot be had, two teachers of one name, a
            teacher whose chat template has no tools where the format is `native`, or one of
            another tokenizer where that will not do.
    """
    fitted: list[Guide] = []
    loaded: dict[str, Policy] = {}
    for index, section in enumerate(teachers):
        place = f"distillation.teachers.{index}"
        name = section.name or f"teacher{index}"
        if any(guide.name == name for guide in fitted):
            raise UserError(f"{place}: another teacher is named {name!r}", "Change its name.")
        fitting = _Fitting(place, name, student, renderer, same_tokenizer)
        if isinstance(section, ModelTeacher):
            fitted.append(fitting.local(section, loaded, config.seed))
        else:
            fitted.append(fitting.server(section))
    return Guides(fitted, renderer, tools=_tools_of(environment))


@dataclass(frozen=True)
class _Fitting:
    """One teacher beside its student."""

    place: str
    name: str
    student: Policy
    renderer: Renderer
    same_tokenizer: bool

    def local(self, section: ModelTeacher, loaded: dict[str, Policy], seed: int) -> Guide:
        key = section.model.model_dump_json()
        if key not in loaded:
            try:
                loaded[key] = load_policy(section.model, seed=seed)
            except UserError as error:
                raise UserError(f"{self.place}: {error.cause}", error.next_step) from error
        policy = loaded[key]
        own = self._renderer(policy.tokenizer, lambda: codec_of(policy))
        teacher = LocalTeacher(
            policy.model,
            batch_tokens=section.batch_tokens,
            vocab_size=len(policy.tokenizer),
        )
        return self._guide(section, teacher, own)

    def server(self, section: VLLMTeacher | SGLangTeacher) -> Guide:
        tokenizer = self.student.tokenizer
        if section.tokenizer is not None:
            tokenizer = _load_tokenizer(section.tokenizer, f"{self.place}.tokenizer")
        own = self._renderer(tokenizer, lambda: Codec(tokenizer))
        teacher = ServerTeacher(
            section.type,
            section.url,
            model=section.model if isinstance(section, VLLMTeacher) else None,
            api_key=read_key(section.api_key_env, f"{self.place}.api_key_env"),
            timeout_s=section.timeout_s,
            retries=section.retries,
            max_concurrency=section.max_concurrency,
            vocab_size=len(tokenizer),
            where=f"{self.place} ({self.name})",
        )
        return self._guide(section, teacher, own)

    def _guide(self, section: TeacherConfig, teacher: Teacher, own: Renderer | None) -> Guide:
        return Guide(self.name, teacher, section.weight, dict(section.when), own)

    def _renderer(self, tokenizer: Any, codec: Callable[[], Codec]) -> Renderer | None:
        """None where the teacher's tokens are the student's."""
        if self.same_tokenizer:
            require_same_tokenizer(self.student.tokenizer, tokenizer, f"{self.place} ({self.name})")
        if difference(self.student.tokenizer, tokenizer) is None:
            return None
        template = make_template(tokenizer)
        tool_format = self.renderer.tool_format
        if isinstance(tool_format, NativeFormat):
            tool_format = NativeFormat(template)
        return Renderer(codec(), template, tool_format)


def _load_tokenizer(name: str, place: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place}: no tokenizer {name} that loads: {said}",
            "Name a hub id that this machine can reach, or a directory.",
        ) from error


def _tools_of(environment: Environment | None) -> Callable[[Rollout], Sequence[ToolSchema]]:
    """What a rollout's agent was told that it may call: of the agents that its task starts, the one
    whose opening the rollout has."""

    def tools(rollout: Rollout) -> Sequence[ToolSchema]:
        if environment is None or rollout.task is None:
            return ()
        for opening, schemas in environment.starts(rollout.task):
            if list(opening) == rollout.messages[: len(opening)]:
                return schemas
        return ()

    return tools
