"""Finds out what ``--data`` names, reads or indexes it into a run's folder, and opens it from there on every rank."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt.errors import SettingError

from ..pictures import INDEX as PICTURES
from ..pictures import Pictures, list_folder, read_folder
from ..settings import DataOptions, InputError, TrainSettings
from . import coco, folders, shards, table
from .collecting import Collector
from .filters import Filters
from .index import FOLDER, MAIN, Example, Index

if TYPE_CHECKING:
    from ..folder import FolderSource
    from .stream import StreamSource

IN_MEMORY = 2 << 30
"""Bytes of decoded pictures that are kept in memory where the user does not say otherwise."""
_ENDINGS = {".json": "coco", ".tsv": "tsv", ".tar": "webdataset"}
_INDEXING = (
    "caption_column",
    "picture_column",
    "caption_field",
    "filters",
    "shortest",
    "boilerplate",
    "latin",
    "aspect",
)
"""Settings on which the index depends."""


def kind_of(data: Path, options: DataOptions) -> str:
    """Say what ``--data`` names, after checking that it is there.

    Args:
        data: a folder, a file, or a pattern of shards.
        options: which may name the kind.

    Returns:
        One of `settings.KINDS` but "auto".

    Raises:
        InputError: it is missing, cannot be read, or is not of the kind that was named.
        SettingError: the way of reading does not fit the kind.
    """
    kind = options.kind
    if kind == "auto":
        ending = ".tar" if ".tar" in data.name else data.suffix.lower()
        kind = "folder" if data.is_dir() else _ENDINGS.get(ending, "folder")
    if kind == "folder":
        _check_folder("--data", data)
    elif kind == "webdataset":
        shards.expand(_pattern(data))
    else:
        _check_file(data)
        if options.images is not None:
            _check_folder("data.images", Path(options.images))
    plain = kind == "folder" and options.augmentation == "none" and Filters.chosen(options) == Filters()
    if options.reading == "memory" and not plain:
        allowed = "auto or stream, for all but a folder without filters and augmentation"
        raise SettingError("data.reading", options.reading, allowed)
    return kind


def read(data: Path, settings: TrainSettings, out: Path | None = None) -> Pictures | Index:
    """Read a folder's pictures, or index what is too large for that or of another kind.

    Args:
        data: what the user named.
        settings: all settings of the run.
        out: a run's folder, whose index of the same shards is used again.

    Raises:
        InputError: there is nothing to train on.
    """
    options = settings.data
    kind = kind_of(data, options)
    if kind == "folder" and _fits_in_memory(data, settings):
        pictures = read_folder(data, settings.size)
        pictures.require(settings.held_out)
        return pictures
    made_of = _made_of(data, kind, options)
    index = _earlier(out, made_of) if kind == "webdataset" else None
    if index is None:
        collector = Collector(Filters.chosen(options))
        found = collector.of_fitting_shape(_examples(data, kind, options, collector))
        index = Index.of(found, collector.files, collector.left_out, made_of)
    index.require(settings.held_out)
    return index


def keep(found: Pictures | Index, out: Path) -> None:
    """Save what was read in the run's folder, in place of what an earlier run had there."""
    (out / FOLDER / MAIN).unlink(missing_ok=True)
    (out / PICTURES).unlink(missing_ok=True)
    found.save(out)


def load(
    run: Path,
    *,
    size: int,
    held_out: float,
    seed: int = 0,
    shift: int = 0,
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
) -> "FolderSource | StreamSource":
    """Open what was kept in a run's folder, as a source of batches; every rank does.

    Args:
        run: the folder.
        size: side of the pictures.
        held_out: fraction never trained on.
        seed: decides the order.
        shift: see `TrainSettings`.
        options: how pictures are decoded and cut.

    Raises:
        InputError: it is missing or damaged, or a shard has changed since it was indexed.
    """
    from ..folder import FolderSource
    from .stream import StreamSource

    if not (run / FOLDER / MAIN).exists():
        return FolderSource(Pictures.load(run), held_out=held_out, shift=shift)
    index = Index.load(run)
    for path, length, time in index.made_of["files"]:
        if _state(path) != [path, length, time]:
            raise InputError(f"{path}: is not what it was when the run's data were indexed")
    return StreamSource(index, size=size, seed=seed, held_out=held_out, shift=shift, options=options)


def _examples(data: Path, kind: str, options: DataOptions, collector: Collector) -> Iterator[Example]:
    images = None if options.images is None else Path(options.images)
    readers: Mapping[str, Callable[[], Iterator[Example]]] = {
        "folder": lambda: folders.examples(data, collector),
        "coco": lambda: coco.examples(data, images, collector),
        "tsv": lambda: table.examples(data, images, options.caption_column, options.picture_column, collector),
        "webdataset": lambda: shards.examples(shards.expand(_pattern(data)), options.caption_field, collector),
    }
    return readers[kind]()


def _fits_in_memory(data: Path, settings: TrainSettings) -> bool:
    options = settings.data
    if options.reading != "auto":
        return options.reading == "memory"
    if options.augmentation != "none" or Filters.chosen(options) != Filters():
        return False
    return len(list_folder(data)[0]) * 3 * settings.size**2 <= IN_MEMORY


def _made_of(data: Path, kind: str, options: DataOptions) -> dict[str, Any]:
    files = shards.expand(_pattern(data)) if kind == "webdataset" else []
    chosen = dataclasses.asdict(options)
    return {
        "kind": kind,
        "options": {name: chosen[name] for name in _INDEXING},
        "files": [_state(file) for file in files],
    }


def _state(path: str) -> list[Any]:
    """What changes when a file does."""
    try:
        found = os.stat(path)
    except OSError:
        return [path, -1, -1]
    return [path, found.st_size, found.st_mtime_ns]


def _earlier(out: Path | None, made_of: Mapping[str, Any]) -> Index | None:
    """The index in the run's folder, if it was made of the same shards in the same way."""
    try:
        index = None if out is None else Index.load(out)
    except InputError:
        return None
    return index if index is not None and index.made_of == made_of else None


def _pattern(data: Path) -> str:
    return str(data / "*.tar") if data.is_dir() else str(data)


def _check_folder(flag: str, folder: Path) -> None:
    if not folder.exists():
        what = "file" if folder.suffix.lower() in _ENDINGS else "folder"
        raise InputError(f"{flag} {folder}: there is no such {what}")
    if not folder.is_dir():
        also = ", a .json, a .tsv or a .tar" if flag == "--data" else ""
        raise InputError(f"{flag} {folder}: is not a folder{also}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: cannot be read: permission denied")


def _check_file(data: Path) -> None:
    if not data.exists():
        raise InputError(f"--data {data}: there is no such file")
    if not data.is_file():
        raise InputError(f"--data {data}: is not a file")
    if not os.access(data, os.R_OK):
        raise InputError(f"--data {data}: cannot be read: permission denied")
