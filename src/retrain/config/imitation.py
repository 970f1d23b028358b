"""What every stage has that learns from traces."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from retrain.config.algorithm import Optimization


class Imitation(Optimization):
    """How often, how many at a time, and what is kept out to be scored."""

    steps: int | None = Field(None, ge=1)
    """None: as many as `epochs` takes."""
    epochs: int = Field(1, ge=1)
    """Passes over the traces."""
    batch_size: int = Field(16, ge=1)
    """Traces of one update."""
    shuffle: bool = True
    """A new order in every epoch, from the run's seed."""
    validation: str | None = Field(None, min_length=1)
    """Traces that do not train: their loss is reported as `validation/loss`. In a file, directory,
    dataset or function of their own, with the columns of those that train."""
    holdout: float | None = Field(None, gt=0.0, lt=1.0)
    """This share of the traces is such instead, by a hash of what they say before the model's first
    word: traces of one prompt stay together, and adding further ones moves none."""
    validation_every_steps: int | None = Field(None, ge=1)
    """Also on the way; None reports it before the first step and after the last."""

    @model_validator(mode="after")
    def _one_length(self) -> Imitation:
        if self.steps is None:
            return self
        if self.changed("epochs"):
            raise ValueError(
                f"epochs {self.epochs} does nothing with steps {self.steps}, which ends the stage; "
                "remove one of them (steps: null where a section above sets it)"
            )
        self._refuse_long_warmup(self.steps)
        return self

    @model_validator(mode="after")
    def _one_validation(self) -> Imitation:
        if self.validation is not None and self.holdout is not None:
            raise ValueError("validation and holdout both say what is held out; remove one of them")
        nothing = self.validation is None and self.holdout is None
        if nothing and self.validation_every_steps is not None:
            raise ValueError(
                "validation_every_steps does nothing without traces to score; set validation or "
                "holdout"
            )
        return self


class TraceData(Imitation):
    """Where traces are, and how a row becomes one."""

    dataset: str
    """JSONL, JSON or Parquet of messages or prompt/completion rows, or an import path
    `pkg.module:name` of a function that returns such rows."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that function."""
    messages_column: str = Field("messages", min_length=1)
    """A whole conversation, in the OpenAI format."""
    prompt_column: str = Field("prompt", min_length=1)
    """Text or messages, where a row has no `messages_column`."""
    completion_column: str = Field("completion", min_length=1)
    """What the model is to answer: text or messages."""
    system_prompt: str | None = Field(None, pattern=r"\S")
    """Opens conversations that have no system message."""
    streaming: bool = False
    """Read row by row in every epoch, in memory of one size. `steps` says where it ends."""
    shuffle_buffer: int | None = Field(None, ge=1)
    """Traces among which a stream is shuffled; 1,000 by default."""

    @model_validator(mode="after")
    def _params_have_a_function(self) -> TraceData:
        if self.params and ":" not in self.dataset:
            raise ValueError("params needs dataset to be an import path, pkg.module:name")
        return self

    @model_validator(mode="after")
    def _streams(self) -> TraceData:
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle):
            raise ValueError("shuffle_buffer acts only with streaming: true and shuffle: true")
        if self.streaming and self.steps is None:
            raise ValueError("streaming needs steps: how long a stream is shows at its end only")
        if self.streaming and self.holdout is not None:
            raise ValueError(
                "holdout needs every trace in memory; name a file of held-out traces under "
                "validation, or set streaming: false"
            )
        return self
