"""Reads a folder of captioned pictures: ``name.jpg`` beside ``name.txt``, subfolders included.

Every picture is decoded once, made upright, flattened over white, cut to the central square and resized by area. What
cannot be used is left out with its reason and never stops a run. Knows nothing of torch.
"""

import collections
import concurrent.futures
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .data import split
from .data.checksums import checksum, digest
from .settings import InputError

_NOT_PICTURES = {"PDF", "EPS", "MPEG", "WMF", "HDF5", "GRIB", "BUFR"}
"""Formats that Pillow opens but that are no pictures, or that it cannot decode by itself."""
NAMES_SHOWN = 10
ALONE, EMPTY = "captions without a picture", "with an empty caption"
_ARRAY, INDEX = "pictures.npy", "pictures.json"


@dataclass(frozen=True)
class Pictures:
    """The usable pictures of a folder.

    Args:
        names: path of each within the folder, with ``/``, sorted.
        captions: one a picture, on one line.
        pixels: uint8 ``(n, size, size, 3)``.
        left_out: names of what could not be used, by reason.
    """

    names: Sequence[str]
    captions: Sequence[str]
    pixels: np.ndarray
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def held_out(self, fraction: float) -> np.ndarray:
        """Which pictures are never trained on: a function of each name alone, so that growing folders keep their split.

        Args:
            fraction: of the pictures, in [0, 1); above 0 at least one is held out and one is trained on.

        Returns:
            Bool ``(n,)``.

        Example:
            >>> pictures = Pictures(["a.png", "b.png"], ["a", "b"], np.zeros((2, 8, 8, 3), np.uint8))
            >>> int(pictures.held_out(0.5).sum())
            1
        """
        return split.held_out(np.array([split.place_of(name) for name in self.names]), fraction)

    def require(self, held_out: float) -> None:
        """Refuse a folder that cannot be trained on.

        Raises:
            InputError: fewer pictures are usable than training and holding out take; says why the others are not.
        """
        least = 2 if held_out > 0 else 1
        if len(self.names) >= least:
            return
        reasons = "; ".join(f"{len(names)} {reason}" for reason, names in self.left_out.items())
        found = reasons or "there is no picture in it"
        wanted = f"at least {least} picture{'s' if least > 1 else ''} with a caption (name.jpg beside name.txt)"
        raise InputError(f"--data: {len(self.names)} usable pictures, but there must be {wanted}: {found}")

    def summary(self) -> list[str]:
        """Lines for the user: how many pictures are usable, and which are not."""
        lines = [f"{len(self.names)} pictures with captions"]
        for reason, names in self.left_out.items():
            shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            lines.append(f"left out: {len(names)} {reason}: {shown}")
        return lines

    @property
    def fingerprint(self) -> str:
        """Changes with every name, caption or pixel."""
        return digest([list(self.names), list(self.captions), checksum(self.pixels)])

    def save(self, folder: Path) -> None:
        """Keep everything in the run's folder: ranks read it from there, and so does ``evaluate``."""
        np.save(folder / _ARRAY, self.pixels)
        index = {"names": list(self.names), "captions": list(self.captions), "left_out": dict(self.left_out)}
        (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Pictures":
        """Read what ``save`` wrote; the pixels are mapped, so that ranks share their memory.

        Raises:
            InputError: the files are missing or damaged.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            pixels = np.load(folder / _ARRAY, mmap_mode="r")
            if not len(index["names"]) == len(index["captions"]) == len(pixels):
                raise ValueError
        except (OSError, ValueError, KeyError):
            raise InputError(f"{folder}: its {_ARRAY} or {INDEX} is missing or damaged") from None
        return cls(index["names"], index["captions"], pixels, index["left_out"])


def read_folder(folder: Path, size: int) -> Pictures:
    """Read all pictures of ``folder`` and its subfolders.

    Args:
        folder: where they lie; names that begin with a dot are passed over.
        size: side of the squares to make, in pixels.

    Returns:
        The usable pictures, and what was left out with its reason.
    """
    pictures, texts, alone = list_folder(folder)
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    for text in alone:
        left_out[ALONE].append(_name(folder, text))

    names, captions, pixels = [], [], []
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # Pillow warns of damaged metadata and of large pictures; both are read, or left out with a reason.
        warnings.simplefilter("ignore")
        pairs = pool.map(_read_pair, pictures, texts, itertools.repeat(size))
        for path, (caption, picture, reason) in zip(pictures, pairs, strict=True):
            if picture is None:
                left_out[reason].append(_name(folder, path))
            else:
                names.append(_name(folder, path))
                captions.append(caption)
                pixels.append(picture)
    stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return Pictures(names, captions, stacked, dict(left_out))


def list_folder(folder: Path) -> tuple[list[Path], list[Path | None], list[Path]]:
    """List what `read_folder` would read.

    Returns:
        The pictures, sorted; the text that belongs to each, or ``None``; and the texts that belong to no picture.
    """
    files = sorted(_files(folder))
    endings = suffixes()
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    pictures = [path for path in files if path.suffix.lower() in endings]
    alone = sorted(texts.keys() - {path.with_suffix("") for path in pictures})
    return pictures, [texts.get(path.with_suffix("")) for path in pictures], [texts[stem] for stem in alone]


def read_caption(text: Path | None) -> tuple[str, str]:
    """Read the caption of a picture on one line; the second text is why there is none, or empty."""
    if text is None:
        return "", "without a caption"
    try:
        caption = " ".join(text.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return "", "with an unreadable caption"
    return caption, "" if caption else EMPTY


def read_picture(file: Path | BinaryIO, size: int) -> np.ndarray:
    """Decode one picture of any mode and make it a square.

    Args:
        file: the file; of an animation the first frame is taken.
        size: side of the square in pixels.

    Returns:
        uint8 ``(size, size, 3)``.

    Raises:
        OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError: what Pillow raises for broken files.
    """
    return square(decode(file, size), size)


def decode(file: Path | BinaryIO, size: int) -> Image.Image:
    """Decode one picture and make it upright, red, green and blue.

    Args:
        file: the file.
        size: side of the square that will be made of it; a JPEG is decoded no larger than twice that needs.
    """
    with Image.open(file) as opened:
        # A JPEG can be decoded at an eighth of its size for an eighth of the time; twice ours is fine enough.
        opened.draft(None, (2 * size, 2 * size))
        return _rgb(ImageOps.exif_transpose(opened))


def square(picture: Image.Image, size: int) -> np.ndarray:
    """Cut a picture to its central square and resize that by area, uint8 ``(size, size, 3)``."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    resized = picture.resize((size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side))
    return np.asarray(resized)


def _rgb(picture: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue, over white where the picture is transparent."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        # Pillow would clip more than 8 bits to white. Integers have 16 bits, floats go up to 1 or to 255.
        top = 65535.0 if picture.mode.startswith("I;16") or values.max() > 255 else 255.0
        if picture.mode == "F" and values.max() <= 1:
            top = 1.0
        picture = Image.fromarray(np.nan_to_num(values / top * 255).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _read_pair(path: Path, text: Path | None, size: int) -> tuple[str, np.ndarray | None, str]:
    """Caption and picture, or ``None`` with a reason."""
    caption, reason = read_caption(text)
    if reason:
        return "", None, reason
    try:
        return caption, read_picture(path, size), ""
    except Image.DecompressionBombError:
        return "", None, "too large to decode"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError):
        return "", None, "broken"


def _files(folder: Path) -> Iterator[Path]:
    """All files, links followed, every real folder once."""
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def suffixes() -> set[str]:
    """Endings of the names of pictures, in lower case with their dots."""
    extensions = Image.registered_extensions()
    return {end for end, form in extensions.items() if form in Image.OPEN and form not in _NOT_PICTURES}


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
