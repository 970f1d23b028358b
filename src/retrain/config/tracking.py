"""Section tracking: what a run writes down, shows, and sends to trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrain.config.base import Section


class WandbConfig(Section):
    """Weights & Biases."""

    type: Literal["wandb"] = "wandb"
    project: str = "retrain"
    """The project that the run is in."""
    entity: str | None = None
    """User or team; None: the one that the login has as its default."""
    name: str | None = None
    """Of the run; None: that of the run directory."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: list[str] = Field(default_factory=list)
    """Of the run."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes into the run directory, for `wandb sync` later; `disabled`: as if this
    tracker were not listed."""


class TensorboardConfig(Section):
    """TensorBoard."""

    type: Literal["tensorboard"] = "tensorboard"
    directory: str | None = None
    """The run is a directory of its name in it; None: `tensorboard` in the run directory."""


class TrackioConfig(Section):
    """trackio: a local database, or a Hugging Face Space."""

    type: Literal["trackio"] = "trackio"
    project: str = "retrain"
    """The project that the run is in."""
    name: str | None = None
    """Of the run; None: that of the run directory, and four characters that set it apart."""
    directory: str | None = None
    """Where the database is; None: trackio's own place."""
    space_id: str | None = None
    """A Hugging Face Space to log to, made if it is not there; None: the local database only."""


class MLflowConfig(Section):
    """MLflow."""

    type: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = None
    """Of a server, a database or a directory; None: the directory `mlruns` beside the run
    directory."""
    experiment: str = "retrain"
    """The experiment that the run is in, made if it is not there."""
    name: str | None = None
    """Of the run; None: that of the run directory."""


class PythonTrackerConfig(Section):
    """A `retrain.tracking.trackers.Tracker` of your own, by import path."""

    type: Literal["python"] = "python"
    path: str
    """`pkg.module:Class` or `path/to/file.py:Class`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor, of plain values."""


TrackerConfig = Annotated[
    WandbConfig | TensorboardConfig | TrackioConfig | MLflowConfig | PythonTrackerConfig,
    Field(discriminator="type"),
]

_OF_TRACKERS = ("rollouts_logged", "rollouts_logged_every", "artifacts", "finish_timeout_s")


class TrackingConfig(Section):
    rollouts: bool = True
    """Write every rollout, tokens included."""
    plots: bool = True
    """Draw `plots/curves.png` at the end."""
    transcripts: int = Field(3, ge=0)
    """Rollouts written out as text after each evaluation."""
    progress: Literal["auto", "on", "off"] = "auto"
    """`auto`: a live display when standard output is a terminal."""
    trackers: list[TrackerConfig] = Field(default_factory=list)
    """What metrics, rollouts and results are also sent to, at most one of a type; a name such as
    `tensorboard` stands for it with its defaults. One that fails does not stop the run."""
    rollouts_logged: int = Field(16, ge=0)
    """Rollouts that the trackers get of a step or of a mode of an evaluation, spread over it."""
    rollouts_logged_every: int = Field(10, ge=1)
    """They get those of each step of RL that this divides, and of each evaluation."""
    artifacts: bool = False
    """Give them the last checkpoint, too, once the run is complete."""
    finish_timeout_s: float = Field(20.0, gt=0)
    """How long the end of a run waits for them to send what is left."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [{"type": item} if isinstance(item, str) else item for item in given]

    @model_validator(mode="after")
    def _trackers_fit(self) -> TrackingConfig:
        types = [tracker.type for tracker in self.trackers]
        active = {tracker.type for tracker in active_trackers(self)}
        if twice := sorted({name for name in types if types.count(name) > 1}):
            raise ValueError(f"trackers: {', '.join(twice)} is there twice; keep one of a type")
        off = ", and those that are listed are disabled" if types else ""
        if not active and (idle := self.changed(*_OF_TRACKERS)):
            raise ValueError(f"{' and '.join(idle)}: nothing of it acts without trackers{off}")
        if self.rollouts_logged == 0 and self.changed("rollouts_logged_every"):
            raise ValueError("rollouts_logged_every does nothing where rollouts_logged is 0")
        if self.artifacts and active == {"tensorboard"}:
            raise ValueError("artifacts does nothing: tensorboard holds no checkpoints; remove it")
        return self


def active_trackers(section: TrackingConfig) -> list[TrackerConfig]:
    """Those that are not switched off."""
    return [
        config
        for config in section.trackers
        if not (isinstance(config, WandbConfig) and config.mode == "disabled")
    ]
