"""A folder of pictures, each with its caption in a text file beside it: ``name.jpg`` and ``name.txt``."""

from collections.abc import Iterator
from pathlib import Path

from ..pictures import ALONE, list_folder, read_caption
from .collecting import Collector
from .index import Example


def examples(folder: Path, collector: Collector) -> Iterator[Example]:
    """Find the pictures of ``folder`` and its subfolders; none of them is opened."""
    pictures, texts, alone = list_folder(folder)
    for text in alone:
        collector.left_out.add(ALONE, text.relative_to(folder).as_posix())
    for picture, text in zip(pictures, texts, strict=True):
        name = picture.relative_to(folder).as_posix()
        caption, reason = read_caption(text)
        if reason:
            collector.left_out.add(reason, name)
        elif captions := collector.captions(name, [caption]):
            yield Example(name, captions, collector.add_file(picture))
