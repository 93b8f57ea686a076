"""The scalars of a run's event files, of ours and of anybody's: curves by tag, and word of what could not be read."""

import dataclasses
import functools
import importlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distopt.errors import MissingPackageError, SettingError

_PATTERN = "*tfevents*"
_LARGEST = 1 << 20
"""Records above this are pictures and histograms: they are passed over unread."""


class DamagedError(Exception):
    """The rest of an event file cannot be read."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One scalar over the steps, in their order.

    Args:
        folder: where its files lie, relative to the run; "." for the run's own folder.
        tag: its name.
        steps: where the points stand.
        values: what was written there; may be NaN or infinite.
        times: when, in seconds since 1970.
    """

    folder: str
    tag: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    times: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Records:
    """What a run's event files hold.

    Args:
        curves: by folder and tag.
        files: how many files were read.
        notes: a line for everything that could not be.
    """

    curves: tuple[Curve, ...]
    files: int
    notes: tuple[str, ...]


_Point = tuple[int, float, float]


def read_records(run: Path) -> Records:
    """Read the scalars of all event files below a folder, those of TensorFlow's second format included.

    Where a run was stopped and went on in a new file from an earlier step, the steps that were taken twice are those of
    the new one. A file that is damaged or ends in the middle of a record gives what lies before.

    Args:
        run: a folder.

    Raises:
        SettingError: there is no such folder, or no scalar can be read in it.
        MissingPackageError: TensorBoard is not installed, whose format it is.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with SummaryWriter(folder) as writer:
        ...         for step in range(3):
        ...             writer.add_scalar("loss", 1 / (1 + step), step)
        ...     (curve,) = read_records(Path(folder)).curves
        >>> curve.tag, curve.steps, curve.values[1]
        ('loss', (0, 1, 2), 0.5)
    """
    if not run.is_dir():
        raise SettingError("RUN", str(run), "the folder of a run" + ("; this is a file" if run.is_file() else ""))
    notes: list[str] = []
    curves: list[Curve] = []
    files = sorted(file for file in run.rglob(_PATTERN) if file.is_file())
    for folder in sorted({file.parent for file in files}):
        parts: dict[str, list[list[_Point]]] = {}
        for file in (file for file in files if file.parent == folder):
            found, note = _read(file)
            notes.extend([f"{file.relative_to(run)}: {note}"] if note else [])
            for tag, points in found.items():
                parts.setdefault(tag, []).append(points)
        name = folder.relative_to(run).as_posix()
        curves.extend(_curve(name, tag, of_tag) for tag, of_tag in sorted(parts.items()))
    if not curves:
        read = f"{len(files)} of them here without any" if files else "none here"
        damage = f" ({'; '.join(notes)})" if notes else ""
        raise SettingError("RUN", str(run), f"a folder with scalars in event files of TensorBoard; {read}{damage}")
    return Records(tuple(curves), len(files), tuple(notes))


def _curve(folder: str, tag: str, parts: list[list[_Point]]) -> Curve:
    """One curve from the points of several files."""
    parts.sort(key=lambda points: points[0][2])  # names tell the second of their making only
    joined = functools.reduce(_joined, parts)
    steps, values, times = zip(*sorted(joined, key=lambda point: point[0]), strict=True)
    return Curve(folder, tag, steps, values, times)


def _joined(before: list[_Point], new: list[_Point]) -> list[_Point]:
    """Points of an earlier file and of a later one."""
    if new[0][2] < max(time for _, _, time in before):  # by another process, meanwhile
        return [*before, *new]
    first = min(step for step, _, _ in new)
    return [*(point for point in before if point[0] < first), *new]


def _read(file: Path) -> tuple[dict[str, list[_Point]], str]:
    """Points by tag, and what was wrong."""
    found: dict[str, list[_Point]] = {}
    scalars: set[str] = set()
    count = 0
    note = ""
    try:
        with file.open("rb") as stream:
            for event in _events(stream):
                count += 1
                for tag, value in _scalars(event, scalars):
                    found.setdefault(tag, []).append((event.step, value, event.wall_time))
    except DamagedError as error:
        note = f"{error} after {count} events; what lies before is shown"
    except OSError as error:
        note = f"cannot be read: {error.strerror}"
    return found, note


def _events(stream: BinaryIO) -> Iterator[Any]:
    """The events of a file: each a length, its check, the message and its check."""
    event_type, check, decode_error = _format()
    while header := stream.read(12):
        if len(header) < 12:
            raise DamagedError("is cut off")
        length, told = struct.unpack("<QI", header)
        if check(header[:8]) != told:
            raise DamagedError("is damaged")
        if length > _LARGEST:
            position = stream.tell()
            if stream.seek(0, 2) < position + length + 4:
                raise DamagedError("is cut off")
            stream.seek(position + length + 4)
            continue
        message, footer = stream.read(length), stream.read(4)
        if len(footer) < 4:
            raise DamagedError("is cut off")
        if check(message) != struct.unpack("<I", footer)[0]:
            raise DamagedError("is damaged")
        try:
            yield event_type.FromString(message)
        except decode_error:
            raise DamagedError("is damaged") from None


def _format() -> tuple[Any, Any, type[Exception]]:
    """The message of an event, the check sum of a record, and what a message raises that is none."""
    try:
        event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        writer = importlib.import_module("tensorboard.summary.writer.record_writer")
        return event, writer.masked_crc32c, importlib.import_module("google.protobuf.message").DecodeError
    except ImportError:
        raise MissingPackageError("tensorboard", "report") from None


def _scalars(event: Any, known: set[str]) -> Iterator[tuple[str, float]]:
    """Tags and numbers of one event; the second format says only once of what kind a tag is."""
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            yield value.tag, value.simple_value
        elif kind == "tensor":
            if value.metadata.plugin_data.plugin_name == "scalars":
                known.add(value.tag)
            if value.tag in known:
                number = _number(value.tensor)
                if number is not None:
                    yield value.tag, number


def _number(tensor: Any) -> float | None:
    array = importlib.import_module("tensorboard.util.tensor_util").make_ndarray(tensor)
    return float(array.item()) if array.size == 1 else None


def finite(curve: Curve) -> list[tuple[int, float]]:
    """Steps and values of a curve without those that are NaN or infinite."""
    return [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
