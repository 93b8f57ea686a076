"""The index of a data set: name, captions and place of every usable picture, in files that all ranks map.

An example takes some dozens of bytes and its texts, so that millions of them fit; nothing of it is decoded before it is
needed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..settings import InputError
from .checksums import checksum, digest
from .split import held_out, place_of

FOLDER = "index"
"""Where a run keeps its index, within its own folder."""
NAMES_SHOWN = 10
NAMES_KEPT = 1000
"""Names of what was left out that are kept, for each reason; all are counted."""
MAIN, _FORMAT = "index.json", 1
WHOLE = -1
"""The length of a picture that is a file of its own."""


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with its captions.

    Args:
        name: what it is called in reports; also decides whether it is held out.
        captions: one or more, each on one line.
        file: which file it lies in, as a number among those of the index.
        offset: where in that file it begins.
        length: its bytes, or `WHOLE`.
    """

    name: str
    captions: Sequence[str]
    file: int
    offset: int = 0
    length: int = WHOLE


@dataclass
class LeftOut:
    """What cannot be used, by reason: all of it counted, the first of it named."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.names.setdefault(reason, [])
        if len(named) < NAMES_KEPT:
            named.append(name)

    def lines(self) -> list[str]:
        """One line for each reason.

        Example:
            >>> left_out = LeftOut()
            >>> left_out.add("broken", "a.png")
            >>> left_out.lines()
            ['left out: 1 broken: a.png']
        """
        lines = []
        for reason, count in sorted(self.counts.items()):
            shown = ", ".join(self.names[reason][:NAMES_SHOWN]) + (", ..." if count > NAMES_SHOWN else "")
            lines.append(f"left out: {count} {reason}: {shown}")
        return lines


class Texts(Sequence[str]):
    """Many texts in two arrays: their bytes one after the other, and where each ends.

    Args:
        data: uint8, UTF-8.
        ends: int64, of each text.

    Example:
        >>> list(Texts.of(["a", "größer", ""]))
        ['a', 'größer', '']
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Store ``texts``."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        first = int(self.ends[i - 1]) if i else 0
        return self.data[first : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Index:
    """The usable pictures of a data set.

    Args:
        names: of the pictures, each once.
        captions: of all pictures, one picture after the other.
        last: int64 ``(n,)``, where the captions of each picture end among ``captions``.
        places: int64 ``(n, 3)``: number of the file, offset and length in bytes.
        splits: float64 ``(n,)``, what `split.place_of` says of each name.
        files: absolute paths.
        left_out: what cannot be used.
        made_of: what the index was made of and how; as long as it is the same, the index need not be made again.
    """

    names: Texts
    captions: Texts
    last: np.ndarray
    places: np.ndarray
    splits: np.ndarray
    files: Texts
    left_out: LeftOut
    made_of: Mapping[str, Any]

    @classmethod
    def of(
        cls, examples: Iterable[Example], files: Iterable[str], left_out: LeftOut, made_of: Mapping[str, Any]
    ) -> "Index":
        """Index ``examples``; a name that was there before is left out."""
        kept: dict[str, Example] = {}
        for example in examples:
            if example.name in kept:
                left_out.add("of the same name as another", example.name)
            else:
                kept[example.name] = example
        found = list(kept.values())
        return cls(
            names=Texts.of(kept),
            captions=Texts.of(caption for example in found for caption in example.captions),
            last=np.cumsum([len(example.captions) for example in found], dtype=np.int64),
            places=np.array([(e.file, e.offset, e.length) for e in found], np.int64).reshape(-1, 3),
            splits=np.array([place_of(name) for name in kept]),
            files=Texts.of(files),
            left_out=left_out,
            made_of=made_of,
        )

    def __len__(self) -> int:
        return len(self.names)

    def captions_of(self, i: int) -> list[str]:
        """Every caption of picture ``i``."""
        return self.captions[int(self.last[i - 1]) if i else 0 : int(self.last[i])]

    def held_out(self, fraction: float) -> np.ndarray:
        """Which pictures are never trained on, bool ``(n,)``."""
        return held_out(np.array(self.splits), fraction)

    def require(self, fraction: float) -> None:
        """Refuse data that cannot be trained on.

        Raises:
            InputError: fewer pictures are usable than training and holding out take; says why the others are not.
        """
        least = 2 if fraction > 0 else 1
        if len(self) < least:
            reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.counts.items()))
            wanted = f"at least {least} picture{'s' if least > 1 else ''} with a caption"
            found = reasons or "nothing else was found"
            raise InputError(f"--data: {len(self)} usable pictures, but there must be {wanted}: {found}")

    def summary(self) -> list[str]:
        """Lines for the user: how many pictures and captions are usable, and what is left out."""
        more = f", {len(self.captions)} captions" if len(self.captions) != len(self) else ""
        return [f"{len(self)} pictures with captions{more}", *self.left_out.lines()]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that is long, by name."""
        texts = {"names": self.names, "captions": self.captions, "files": self.files}
        flat = {f"{name}_{part}": getattr(text, part) for name, text in texts.items() for part in ("data", "ends")}
        return {**flat, "last": self.last, "places": self.places, "splits": self.splits}

    @property
    def fingerprint(self) -> str:
        """Changes with every name, caption or length, but not where the files are moved to another folder."""
        lasting = {"lengths": self.places[:, 2], **self.arrays}
        return digest({name: checksum(lasting[name]) for name in _LASTING})

    def save(self, run: Path) -> None:
        """Keep the index in the run's folder."""
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        (folder / MAIN).unlink(missing_ok=True)
        for name, array in self.arrays.items():
            # A file of its own each time: a process that maps the one of before keeps it.
            part = folder / f"{name}.part.npy"
            np.save(part, array)
            part.replace(folder / f"{name}.npy")
        main = {
            "format": _FORMAT,
            "made_of": dict(self.made_of),
            "checksums": {name: checksum(array) for name, array in self.arrays.items()},
            "left_out": {"counts": self.left_out.counts, "names": self.left_out.names},
        }
        # Written last, and in one step: where it is, all the rest is.
        part = folder / (MAIN + ".part")
        part.write_text(json.dumps(main), encoding="utf-8")
        part.replace(folder / MAIN)

    @classmethod
    def load(cls, run: Path) -> "Index":
        """Map what ``save`` wrote; ranks share its memory.

        Raises:
            InputError: a file is missing or damaged.
        """
        folder = run / FOLDER
        try:
            main = json.loads((folder / MAIN).read_text(encoding="utf-8"))
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in main["checksums"]}
            if main["format"] != _FORMAT or any(checksum(arrays[n]) != s for n, s in main["checksums"].items()):
                raise ValueError
            texts = {name: Texts(arrays[f"{name}_data"], arrays[f"{name}_ends"]) for name in _TEXTS}
            columns = {name: arrays[name] for name in ("last", "places", "splits")}
            left_out = LeftOut(main["left_out"]["counts"], main["left_out"]["names"])
            return cls(**texts, **columns, left_out=left_out, made_of=main["made_of"])
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            raise InputError(f"{folder}: the index of the data is missing or damaged") from None


_TEXTS = ("names", "captions", "files")
_LASTING = ("names_data", "names_ends", "captions_data", "captions_ends", "last", "splits", "lengths")
