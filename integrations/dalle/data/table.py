"""Captions in a table of tab-separated columns, as Conceptual Captions has them: ``caption<TAB>picture`` in every row.

Nothing is downloaded: the column of the pictures must hold paths of files.
"""

from collections.abc import Iterator
from pathlib import Path

from ..settings import InputError
from .collecting import MISSING, Collector
from .index import Example

_ADDRESSES = ("http://", "https://", "ftp://")


def examples(
    table: Path, images: Path | None, caption_column: int, picture_column: int, collector: Collector
) -> Iterator[Example]:
    """Read the rows and look for their pictures.

    Args:
        table: the file, in UTF-8; quotation marks have no meaning in it.
        images: where relative paths begin; ``None`` is the table's own folder.
        caption_column: counted from 1.
        picture_column: counted from 1; of a picture that has several rows, all captions are kept.
        collector: counts what cannot be used.

    Raises:
        InputError: the file cannot be read, or no row has as many columns.
    """
    folder = table.parent if images is None else images
    columns = max(caption_column, picture_column)
    spoken: dict[str, list[str]] = {}
    rows = fitting = 0
    try:
        with table.open("rb") as file:
            for number, row in enumerate(file, start=1):
                if not row.strip():
                    continue
                rows += 1
                cells = _cells(row)
                if len(cells) < columns:
                    collector.left_out.add("malformed rows", f"line {number}")
                    continue
                fitting += 1
                spoken.setdefault(cells[picture_column - 1].strip(), []).append(cells[caption_column - 1])
    except OSError as error:
        raise InputError(f"--data {table}: cannot be read: {error.strerror}") from None
    if rows and not fitting:
        raise InputError(f"--data {table}: no row is text of {columns} columns with a tab between them")
    for name, captions in spoken.items():
        if name.lower().startswith(_ADDRESSES):
            collector.left_out.add("that are addresses and must be downloaded first", name)
        elif not name or not (folder / name).is_file():
            collector.left_out.add(MISSING, name)
        elif kept := collector.captions(name, captions):
            yield Example(name, kept, collector.add_file(folder / name))


def _cells(row: bytes) -> list[str]:
    try:
        return row.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return []
