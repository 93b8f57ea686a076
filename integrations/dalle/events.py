"""TensorBoard's events of a run that goes on: those of steps that will be taken again are left out."""

from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

_FILES = "events.out.tfevents.*"


def keep(folder: Path, done: Mapping[str, int]) -> None:
    """Drop events from the files of a folder.

    Args:
        folder: of TensorBoard; need not exist.
        done: stages by name, and the last step of each that is kept; those of other stages are dropped.
    """
    old = sorted(folder.glob(_FILES))
    if done and old:
        # TensorBoard's own way drops by step alone, and stages count their steps anew.
        kept = [event for file in old for event in LegacyEventFileLoader(str(file)).Load() if _is_kept(event, done)]
        writer = EventFileWriter(str(folder))
        for event in kept:
            writer.add_event(event)
        writer.close()
    for file in old:
        file.unlink()


def _is_kept(event: Event, done: Mapping[str, int]) -> bool:
    tags = [value.tag for value in event.summary.value]
    return any(tag.startswith(f"{stage}/") and event.step <= step for tag in tags for stage, step in done.items())
