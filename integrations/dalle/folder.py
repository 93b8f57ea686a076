"""The user's pictures as a source of training batches, with a part held out."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from distopt.errors import SettingError

from ..scenes.draw import to_tensor
from .context import Judged
from .pictures import NAMES_SHOWN, Pictures


class FolderSource:
    """Pictures and captions of a folder; batches are drawn with replacement from those that are not held out.

    Args:
        pictures: what was read.
        held_out: fraction never trained on, in [0, 1).
        shift: augmentation: each training picture is moved by up to so many pixels, its edge repeated; never mirrored,
            because pictures may show text.

    Raises:
        SettingError: nothing would be left to train on, or a value is out of range.

    Example:
        >>> pictures = Pictures(["a", "b"], ["an a", "a b"], np.zeros((2, 8, 8, 3), np.uint8))
        >>> FolderSource(pictures, held_out=0.5).pairs(3, np.random.default_rng(0))[1].shape
        torch.Size([3, 3, 8, 8])
    """

    def __init__(self, pictures: Pictures, *, held_out: float = 0.1, shift: int = 0) -> None:
        if not 0 <= held_out < 1:
            raise SettingError("FolderSource.held_out", held_out, "at least 0 and below 1")
        if shift < 0:
            raise SettingError("FolderSource.shift", shift, "at least 0")
        chosen = pictures.held_out(held_out)
        self._pictures = pictures
        self._shift = shift
        self._training = np.flatnonzero(~chosen)
        self._held_out = np.flatnonzero(chosen)
        self._fraction = held_out
        if not len(self._training):
            raise SettingError("FolderSource.pictures", len(pictures.names), "at least 1, and 2 if any are held out")

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        return self._pictures.pixels.shape[1]

    @property
    def counts(self) -> tuple[int, int]:
        """How many pictures are trained on, and how many are held out."""
        return len(self._training), len(self._held_out)

    @property
    def fingerprint(self) -> str:
        """Changes with every name, caption or pixel, and with the split."""
        return f"{self._pictures.fingerprint}-{self._fraction}"

    def summary(self) -> list[str]:
        """Lines for the user: how much there is, and what is left out."""
        return self._pictures.summary()

    def left_out(self) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Counts, and the first names, of what was left out, by reason."""
        left_out = self._pictures.left_out
        counts = {reason: len(names) for reason, names in left_out.items()}
        return counts, {reason: list(names[:NAMES_SHOWN]) for reason, names in left_out.items()}

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw ``n`` training pictures, ``(n, 3, size, size)`` float32 in [0, 1]."""
        return to_tensor(self._draw(rng.choice(self._training, n), rng))

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Draw ``n`` captions and their pictures ``(n, 3, size, size)``, none of them held out."""
        chosen = rng.choice(self._training, n)
        return self._captions(chosen), to_tensor(self._draw(chosen, rng))

    def captions(self) -> Iterable[str]:
        """Give every training caption once a picture, in the order of names."""
        return self._captions(self._training)

    def training(self, limit: int) -> Tensor:
        """The first ``limit`` training pictures in the order of names, as they are."""
        return to_tensor(np.asarray(self._pictures.pixels[self._training[:limit]]))

    def held_out(self, limit: int) -> Judged:
        """The first ``limit`` held-out captions and pictures by name, or training ones where none are held out."""
        unseen = len(self._held_out) > 0
        chosen = (self._held_out if unseen else self._training)[:limit]
        return Judged(self._captions(chosen), to_tensor(np.asarray(self._pictures.pixels[chosen])), unseen)

    def close(self) -> None:
        """Nothing is open."""

    def _captions(self, chosen: np.ndarray) -> list[str]:
        return [self._pictures.captions[int(i)] for i in chosen]

    def _draw(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pixels = self._pictures.pixels[chosen]
        if not self._shift:
            return np.asarray(pixels)
        moves = rng.integers(-self._shift, self._shift + 1, size=(2, len(chosen), 1))
        rows, columns = (np.arange(self.size) + moves).clip(0, self.size - 1)
        return pixels[np.arange(len(chosen))[:, None, None], rows[:, :, None], columns[:, None, :]]
