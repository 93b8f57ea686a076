"""TensorBoard's events of a run that goes on: those of steps that will be taken again are left out."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

_FILES = "events.out.tfevents.*"
# TensorBoard reads files in the order of their names, which begin with the second of their making.
_KEPT = "events.out.tfevents.0000000000.kept"
_VERSION = "brain.Event:2"


def keep(folder: Path, done: Mapping[str, int]) -> None:
    """Drop events from the files of a folder; what is left lies in one file, which is read before those to come.

    Args:
        folder: of TensorBoard; need not exist.
        done: stages by name, and the last step of each that is kept; those of other stages are dropped.
    """
    old = sorted(folder.glob(_FILES))
    kept = folder / _KEPT
    if done and old:
        # TensorBoard's own way drops by step alone, and stages count their steps anew.
        events = [event for file in old for event in LegacyEventFileLoader(str(file)).Load() if _is_kept(event, done)]
        partial = folder / "kept.partial"
        with partial.open("wb") as stream:
            writer = RecordWriter(stream)
            for event in [Event(wall_time=time.time(), file_version=_VERSION), *events]:
                writer.write(event.SerializeToString())
        partial.replace(kept)
        old = [file for file in old if file != kept]
    for file in old:
        file.unlink()


def _is_kept(event: Event, done: Mapping[str, int]) -> bool:
    tags = [value.tag for value in event.summary.value]
    return any(tag.startswith(f"{stage}/") and event.step <= step for tag in tags for stage, step in done.items())
