"""`distillation` from teachers: models whose log-probabilities are asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section, VariableName
from retrain.config.imitation import TraceData
from retrain.config.model import ModelConfig


class BaseTeacher(Section):
    """What every teacher has, wherever it runs."""

    name: str | None = Field(None, min_length=1)
    """In metrics and messages; by default its place in the list, as `teacher0`."""
    weight: float = Field(1.0, gt=0)
    """Its share of the mixture, relative to those of the teachers that speak for the same task."""
    when: dict[str, Any] = Field(default_factory=dict)
    """The tasks that it speaks for: those whose columns have these values. A list names several
    values, of which one must match. Empty: all tasks."""

    @field_validator("when")
    @classmethod
    def _can_match(cls, when: dict[str, Any]) -> dict[str, Any]:
        for column, value in when.items():
            if value == []:
                raise ValueError(f"{column}: [] matches no task; name a value")
        return when


class ModelTeacher(BaseTeacher):
    """`model`: in the run's own process."""

    type: Literal["model"] = "model"
    model: ModelConfig
    """Loaded beside the student, and frozen."""
    batch_tokens: int = Field(16_384, ge=1)
    """Most tokens of one forward pass, padding included; a longer sequence goes alone."""

    @field_validator("model")
    @classmethod
    def _frozen(cls, model: ModelConfig) -> ModelConfig:
        if idle := model.changed("peft", "gradient_checkpointing"):
            raise ValueError(
                f"{' and '.join(idle)}: does nothing for a teacher, which never trains; remove it"
            )
        return model


class ServerTeacher(BaseTeacher):
    """A server that runs already. It scores at temperature 1 only."""

    type: str
    url: str
    """Such as `http://127.0.0.1:8000`."""
    tokenizer: str | None = None
    """The teacher's, as a hub id or a directory; null says that it is the student's."""
    api_key_env: VariableName | None = None
    """The environment variable that holds the key. The key itself has no place in a config."""
    timeout_s: float = Field(120.0, gt=0)
    """Of one attempt at one sequence, once it has its turn."""
    retries: int = Field(3, ge=0)
    """Further attempts where the server fails or is busy; after them the rollout is left out."""
    max_concurrency: int = Field(32, ge=1)
    """Most requests at once; further ones wait for their turn."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a web address; write http://host:port")
        return url


class VLLMTeacher(ServerTeacher):
    """`vllm`: its prompt log-probabilities."""

    type: Literal["vllm"] = "vllm"
    model: str | None = None
    """As the server names it; null asks for the first that it lists."""


class SGLangTeacher(ServerTeacher):
    """`sglang`: its input log-probabilities. A server has one model."""

    type: Literal["sglang"] = "sglang"


TeacherConfig = Annotated[ModelTeacher | VLLMTeacher | SGLangTeacher, Field(discriminator="type")]


class OnPolicyDistillation(Section):
    """`on_policy`: the student acts, teachers say how likely each of its tokens was.

    The loop, and all of its keys, are those of RL.
    """

    type: Literal["on_policy"] = "on_policy"
    teachers: list[TeacherConfig] = Field(min_length=1)
    """Who speaks of what the student did."""
    coefficient: float = Field(1.0, gt=0)
    """Weight of the reverse KL from the student to its teachers, in nats a token, beside the
    advantages of task rewards."""
    task_reward: float = Field(0.0, ge=0)
    """Weight of the advantages that `reward_setup` and `algorithm` give. 0: rewards, where there
    are any, are reported and do not train."""
    estimator: Literal["sampled", "top_k"] = "sampled"
    """`sampled`: a policy gradient in which each token's advantage is by how much its teacher finds
    it likelier than the student does. `top_k`: the KL itself, over the teacher's likeliest tokens
    and the rest as one; needs the student's tokenizer, and has less variance."""
    top_k: int | None = Field(None, ge=1)
    """How many of them, for `top_k`."""

    @model_validator(mode="after")
    def _top_k_acts(self) -> OnPolicyDistillation:
        if self.estimator == "top_k" and self.top_k is None:
            raise ValueError("estimator: top_k needs top_k, such as 32")
        if self.estimator == "sampled" and self.top_k is not None:
            raise ValueError(
                f"top_k {self.top_k} does nothing for estimator: sampled; remove it, or use "
                "estimator: top_k"
            )
        return self


class LogitsDistillation(TraceData):
    """`logits`: the teachers' distributions over the tokens of traces."""

    type: Literal["logits"] = "logits"
    teachers: list[TeacherConfig] = Field(min_length=1)
    """Who says what else might have stood in the traces; they need the student's tokenizer."""
    top_k: int = Field(32, ge=1)
    """How many of their likeliest tokens are kept at each place; all others count as one."""
    temperature: float = Field(1.0, gt=0)
    """Of the teachers' distributions and of the student's, in the KL; the loss is not multiplied
    by its square."""
    cross_entropy: float = Field(0.0, ge=0, lt=1)
    """Share of the loss that is SFT's, at temperature 1; the KL has the rest."""
    cache: str | None = Field(None, min_length=1)
    """A file that keeps what teachers said, for other runs too; by default one in the run
    directory."""

    @model_validator(mode="after")
    def _speak_for_all(self) -> LogitsDistillation:
        for index, teacher in enumerate(self.teachers):
            if teacher.when:
                raise ValueError(
                    f"teachers.{index}.when matches no trace: traces are no tasks, and have no "
                    "columns; remove it"
                )
        return self
