"""An indexed data set as a source of batches: pictures are decoded by threads, ahead of the step that needs them.

What stands at a position is a function of the position alone: which picture, which of its captions, how it is cut, and
which picture takes the place of one that is broken. So it does not matter how many threads decode, or how far ahead.
"""

import concurrent.futures
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from distopt.errors import SettingError

from ...scenes.draw import to_tensor
from ..augment import augment_stage1, augment_stage2
from ..context import Judged
from ..pictures import decode, square
from ..settings import DataOptions, InputError
from .collecting import read_bytes
from .index import NAMES_SHOWN, Index
from .order import Order, Part

_BLOCK = 4096
_TRIES = 100
"""Pictures tried in the place of a broken one."""
_AUGMENT: Mapping[int, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    1: augment_stage1,
    2: augment_stage2,
}


@dataclass(frozen=True)
class Sample:
    """What stands at one position.

    Args:
        caption: one of the picture's.
        pixels: uint8 ``(size, size, 3)``.
        rng: goes on where cutting the picture stopped: for all else that is random about this sample.
    """

    caption: str
    pixels: np.ndarray
    rng: np.random.Generator


class StreamSource:
    """Batches of an indexed data set, the same global ones for any number of ranks.

    Args:
        index: what there is.
        size: side of the pictures, in pixels.
        seed: decides the order and all that is random about a sample.
        held_out: fraction never trained on, in [0, 1).
        shift: see `folder.FolderSource`; not with augmentation.
        options: threads, batches ahead, augmentation, and how many captions the tokenizer reads.

    Raises:
        SettingError: nothing would be left to train on.
    """

    def __init__(
        self,
        index: Index,
        *,
        size: int,
        seed: int = 0,
        held_out: float = 0.1,
        shift: int = 0,
        options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    ) -> None:
        chosen = index.held_out(held_out)
        self._index = index
        self._size, self._seed, self._shift, self._options = size, seed, shift, options
        self._fraction = held_out
        self._training = np.flatnonzero(~chosen)
        self._held_out = np.flatnonzero(chosen)
        if not len(self._training):
            raise SettingError("StreamSource.index", len(index), "at least 1 picture, and 2 if any are held out")
        self._orders = {stage: Order(len(self._training), seed, stage) for stage in _AUGMENT}
        self._broken: dict[str, None] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(options.workers, "decoding")
        self._ahead: dict[Part, list[concurrent.futures.Future[Sample]]] = {}
        # Pillow warns of damaged metadata and of large pictures; both are read, or replaced.
        warnings.filterwarnings("ignore", module=r"PIL\.")

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        return self._size

    @property
    def counts(self) -> tuple[int, int]:
        """How many pictures are trained on, and how many are held out."""
        return len(self._training), len(self._held_out)

    @property
    def fingerprint(self) -> str:
        """Changes with the index and the split."""
        return f"{self._index.fingerprint}-{self._fraction}"

    @property
    def broken(self) -> Sequence[str]:
        """Names of the pictures that this process could not decode."""
        return list(self._broken)

    def summary(self) -> list[str]:
        """Lines for the user: how much there is, and what is left out."""
        return self._index.summary()

    def left_out(self) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Counts, and the first names, of what the index left out, by reason."""
        left_out = self._index.left_out
        return dict(left_out.counts), {why: names[:NAMES_SHOWN] for why, names in left_out.names.items()}

    def samples_at(self, part: Part) -> list[Sample]:
        """Give what one rank takes at one step; the steps after it are begun.

        Raises:
            InputError: hardly any picture can be decoded.
        """
        window = [part.after(steps) for steps in range(self._options.prefetch + 1)]
        for stale in self._ahead.keys() - set(window):
            for future in self._ahead.pop(stale):
                future.cancel()
        for each in window:
            if each not in self._ahead:
                self._ahead[each] = self._begin(each)
        return [future.result() for future in self._ahead.pop(part)]

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw ``n`` training pictures at random, as stage 1 sees them."""
        return to_tensor(self._drawn(1, n, rng)[1])

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Draw ``n`` captions and their pictures at random, as stage 2 sees them."""
        captions, pixels = self._drawn(2, n, rng)
        return captions, to_tensor(pixels)

    def captions(self) -> Iterable[str]:
        """Give the training captions in a seeded order, as many as the text tokenizer is to read."""
        limit = self._options.captions_read
        shuffled = itertools.chain.from_iterable(
            self._orders[1].at(np.arange(first, min(first + _BLOCK, len(self._training))))
            for first in range(0, len(self._training), _BLOCK)
        )
        found = (caption for item in shuffled for caption in self._index.captions_of(int(self._training[item])))
        return itertools.islice(found, limit)

    def training(self, limit: int) -> Tensor:
        """The first ``limit`` training pictures that can be decoded, cut to their central squares.

        Raises:
            InputError: there is none.
        """
        return self._shown(self._as_they_are(self._training, limit), unseen=False).pictures

    def held_out(self, limit: int) -> Judged:
        """The first ``limit`` held-out captions and pictures; training ones where none can be had.

        Raises:
            InputError: there are none at all.
        """
        if found := self._as_they_are(self._held_out, limit):
            return self._shown(found, unseen=True)
        return self._shown(self._as_they_are(self._training, limit), unseen=False)

    def close(self) -> None:
        """Stop decoding."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, part: Part) -> list[concurrent.futures.Future[Sample]]:
        positions = part.positions()
        items = self._training[self._orders[part.stage].at(positions)]
        seeds = [(self._seed, part.stage, int(position)) for position in positions]
        return [
            self._pool.submit(self._sample, part.stage, int(item), seed)
            for item, seed in zip(items, seeds, strict=True)
        ]

    def _drawn(self, stage: int, n: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        items = rng.choice(self._training, n)
        seeds = [(int(seed),) for seed in rng.integers(2**63, size=n)]
        samples = list(self._pool.map(self._sample, [stage] * n, map(int, items), seeds))
        pixels = [sample.pixels for sample in samples]
        return [s.caption for s in samples], np.stack(pixels) if n else np.zeros((0, self.size, self.size, 3), np.uint8)

    def _sample(self, stage: int, item: int, seed: Sequence[int]) -> Sample:
        rng = np.random.default_rng(list(seed))
        for _ in range(_TRIES):
            picture = self._decoded(item)
            if picture is not None:
                break
            item = int(self._training[rng.integers(len(self._training))])
        else:
            name = self._index.names[item]
            raise InputError(f"--data: {_TRIES} pictures in a row cannot be read, the last of them {name}")
        captions = self._index.captions_of(item)
        caption = captions[int(rng.integers(len(captions)))]
        return Sample(caption, self._cut(picture, stage, rng), rng)

    def _decoded(self, item: int) -> Image.Image | None:
        file, offset, length = (int(value) for value in self._index.places[item])
        try:
            return decode(io.BytesIO(read_bytes(self._index.files[file], offset, length)), self.size)
        except Exception:  # Pillow's readers raise whatever they stumble over in a broken file
            self._broken.setdefault(self._index.names[item])
            return None

    def _cut(self, picture: Image.Image, stage: int, rng: np.random.Generator) -> np.ndarray:
        if self._options.augmentation == "paper":
            return _AUGMENT[stage](np.asarray(picture), self.size, rng)
        pixels, shift = square(picture, self.size), self._shift
        if not shift:
            return pixels
        down, right = rng.integers(-shift, shift + 1, size=2)
        grid = np.arange(self.size)
        return pixels[(grid + down).clip(0, self.size - 1)][:, (grid + right).clip(0, self.size - 1)]

    def _as_they_are(self, items: np.ndarray, limit: int) -> list[tuple[str, np.ndarray]]:
        """First caption and central square of the first ``limit`` pictures that can be decoded."""
        found: list[tuple[str, np.ndarray]] = []
        chosen = [int(item) for item in items]
        for first in range(0, len(chosen), 256):
            several = chosen[first : first + 256]
            for item, pixels in zip(several, self._pool.map(self._plain, several), strict=True):
                if pixels is not None and len(found) < limit:
                    found.append((self._index.captions_of(item)[0], pixels))
            if len(found) == limit:
                break
        return found

    def _shown(self, found: Sequence[tuple[str, np.ndarray]], *, unseen: bool) -> Judged:
        if not found:
            raise InputError(f"--data: none of {len(self._index)} pictures can be read: they are broken or gone")
        captions = [caption for caption, _ in found]
        return Judged(captions, to_tensor(np.stack([pixels for _, pixels in found])), unseen)

    def _plain(self, item: int) -> np.ndarray | None:
        picture = self._decoded(item)
        return None if picture is None else square(picture, self.size)
