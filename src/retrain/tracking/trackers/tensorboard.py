"""TensorBoard: event files, written without TensorFlow and without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.tracking.trackers.base import RolloutRow, RunInfo, Status, flat

_FLUSH_S = 10


class TensorboardTracker:
    """Metrics as scalars, rollouts and the config as text, plots as images.

    A resumed run writes a further file, which begins by purging the scalars of steps that are made
    again.
    """

    def __init__(self, *, directory: str | None = None) -> None:
        self._directory = directory
        self._writer: Any = None

    def start(self, run: RunInfo) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        place = run.directory / "tensorboard"
        if self._directory is not None:
            place = Path(self._directory) / run.name
        self._writer = EventFileWriter(str(place), flush_secs=_FLUSH_S)
        if run.rewound_to is not None:
            log = SessionLog(status=SessionLog.START)
            first = run.rewound_to + 1
            self._writer.add_event(Event(wall_time=time.time(), step=first, session_log=log))
        lines = [f"    {key}: {value}" for key, value in flat(run.config)]
        self._text("config", max(run.rewound_to or 0, 0), ["\n".join(lines)])
        return f"tensorboard --logdir {place}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, *(Summary.Value(tag=n, simple_value=v) for n, v in metrics.items()))

    def log_rollouts(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        self._text(f"traces/{name}", step, [_markdown(row) for row in rows])

    def log_artifact(self, name: str, path: Path) -> None:
        """Pictures and text only; others have no place here."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if path.suffix == ".png":
            data = path.read_bytes()
            width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
            image = Summary.Image(
                encoded_image_string=data, width=width, height=height, colorspace=3
            )
            self._add(0, Summary.Value(tag=name, image=image))
        elif path.suffix == ".md":
            self._text(name, 0, [path.read_text(encoding="utf-8")])

    def finish(self, status: Status) -> None:
        self._writer.close()

    def _text(self, tag: str, step: int, texts: Sequence[str]) -> None:
        """Markdown, [len(texts)]."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        values = [text.encode() for text in texts]
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))])
        value = Summary.Value(
            tag=tag,
            metadata=create_summary_metadata(display_name="", description=""),
            tensor=TensorProto(dtype="DT_STRING", string_val=values, tensor_shape=shape),
        )
        self._add(step, value)

    def _add(self, step: int, *values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=values)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _markdown(row: RolloutRow) -> str:
    """What was said stays as it is: indented, so that it is no Markdown."""
    reward = "not scored" if row.reward is None else f"{row.reward:g}"
    advantage = "" if row.advantage is None else f", advantage {row.advantage:g}"
    said = f"{row.prompt}\n{row.completion}".splitlines()
    return "\n".join(
        [
            f"**{row.id}**: reward {reward}{advantage}, stopped: {row.stop_reason}; "
            f"parts: {json.dumps(row.reward_parts)}",
            "",
            *(f"    {line}" for line in said),
        ]
    )
