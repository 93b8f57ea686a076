"""Tar shards in the convention of the ``webdataset`` library, indexed so that any sample can be read by itself.

The library's own readers go through shards from the front: they keep no position, and ranks whose shards hold fewer
samples end before the others. Here every shard is gone through once, headers and captions only; what a sample is, and
which of its files is which, is still decided by the library.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..pictures import ALONE, suffixes
from ..settings import InputError
from .collecting import Collector
from .index import Example

_TEXT, _JSON = "txt", "json"
_META = re.compile(r"__[^/]*__($|/)")
"""Names that the library keeps for itself."""


def expand(pattern: str) -> list[str]:
    """Give the shards that a pattern names: ``{000..009}`` counts up, ``*`` and ``?`` match, ``::`` separates patterns.

    A name without ``*`` or ``?`` stays even if there is no such file: it is reported later.

    Raises:
        InputError: no shard is there.
    """
    from braceexpand import braceexpand

    try:
        patterns = [name for part in pattern.split("::") for name in braceexpand(part)]
    except ValueError:
        raise InputError(f"--data {pattern}: its braces do not match") from None
    found: list[str] = []
    for name in patterns:
        found += sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    if not any(os.path.isfile(name) for name in found):
        raise InputError(f"--data {pattern}: there is no such shard")
    return list(dict.fromkeys(os.path.abspath(name) for name in found))


def examples(shards: Sequence[str], caption_field: str, collector: Collector) -> Iterator[Example]:
    """Index shards.

    Args:
        shards: their absolute paths.
        caption_field: name of the caption in a sample's ``.json``, where it has no ``.txt``.
        collector: counts what cannot be used.
    """
    common = os.path.commonpath([os.path.dirname(shard) for shard in shards])
    for shard in shards:
        name = Path(os.path.relpath(shard, common)).as_posix()
        if not os.path.isfile(shard):
            collector.left_out.add("shards that are missing", name)
            continue
        number = collector.add_file(shard)
        try:
            with open(shard, "rb") as file:
                for sample in _samples(file, name, collector):
                    example = _example(file, name, sample, number, caption_field, collector)
                    if example is not None:
                        yield example
        except OSError as error:
            collector.left_out.add("shards that cannot be read", f"{name} ({error.strerror})")


def _samples(file: BinaryIO, shard: str, collector: Collector) -> Iterator[Mapping[str, Any]]:
    """Group the files of a shard by the library's rule; instead of its content, a file has its place."""
    from webdataset.tariterators import group_by_keys

    def twice(error: Exception) -> bool:
        collector.left_out.add("files of the same name as another in their shard", str(error.args[0]).split(":")[0])
        return True

    return group_by_keys(_members(file, shard, collector), handler=twice)


def _members(file: BinaryIO, shard: str, collector: Collector) -> Iterator[dict[str, Any]]:
    """Name and place of every regular file of a shard."""
    length = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
                if not member.isreg() or member.issparse() or _META.match(member.name):
                    continue
                if member.offset_data + member.size > length:
                    break
                place = (member.offset_data, member.size)
                yield {"fname": member.name, "data": place, "__url__": shard}
            # Where the library of tar files finds no header, it ends without a word; a whole shard ends in zeros.
            whole = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if "unexpected end" not in str(error):
            collector.left_out.add("shards that are no tar files, or compressed ones", shard)
            return
        whole = False
    if not whole:
        collector.left_out.add("shards that are damaged or cut short, whose beginning is used", shard)


def _example(
    file: BinaryIO, shard: str, sample: Mapping[str, Any], number: int, caption_field: str, collector: Collector
) -> Example | None:
    name = f"{shard}/{sample['__key__']}"
    endings = suffixes()
    picture = next((place for key, place in sample.items() if f".{key}" in endings), None)
    caption = _captions(file, sample, caption_field)
    if picture is None:
        if caption is not None:
            collector.left_out.add(ALONE, name)
        return None
    if caption is None:
        collector.left_out.add("without a caption", name)
        return None
    if not caption:
        collector.left_out.add("with an unreadable caption", name)
        return None
    kept = collector.captions(name, caption)
    return Example(name, kept, number, *picture) if kept else None


def _captions(file: BinaryIO, sample: Mapping[str, Any], caption_field: str) -> list[str] | None:
    """The captions of a sample; ``None`` if it has none, and an empty list if they cannot be read."""
    key = _TEXT if _TEXT in sample else _JSON
    if key not in sample:
        return None
    offset, length = sample[key]
    try:
        text = os.pread(file.fileno(), length, offset).decode("utf-8-sig")
        if key == _TEXT:
            return [text]
        found = json.loads(text)[caption_field]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    captions = found if isinstance(found, list) else [found]
    return captions if all(isinstance(caption, str) for caption in captions) else []
