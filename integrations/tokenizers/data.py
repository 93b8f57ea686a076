"""What tokenizers are trained on and judged by: drawn scenes, and crops of two photographs. Nothing is downloaded.

The scenes have few distinct patches, and a reader that says whether a picture is still right. The photographs have as
many patches as pixels: there a larger codebook is always worth something.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..running.fields import InputError
from ..scenes.draw import Scenes, to_tensor

SIZE = 24
CONTRAST = 0.12


class Source(Protocol):
    """Pictures, for training and for judging apart from each other."""

    def training(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw ``(n, 3, 24, 24)`` in [0, 1] to train on."""
        ...

    def judged(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw ``(n, 3, 24, 24)`` in [0, 1] to judge by."""
        ...


class DrawnScenes:
    """The drawn task of ``scenes``; every picture is drawn anew."""

    def __init__(self) -> None:
        self._scenes = Scenes()

    def training(self, n: int, rng: np.random.Generator) -> Tensor:
        """See `Source`."""
        return self._scenes.pictures(n, rng)

    def judged(self, n: int, rng: np.random.Generator) -> Tensor:
        """See `Source`."""
        return self._scenes.pictures(n, rng)


class Photos:
    """Crops of scikit-learn's sample images, a temple and a flower, at half their size.

    The right quarter of each is judged by and never trained on. Crops of sky and of blurred leaves, whose standard
    deviation is below `CONTRAST`, are left out: they are half of all, and a few codes say them.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_sample_images  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            raise InputError("--data photos: they come with scikit-learn, which is not installed") from None
        images = load_sample_images()["images"]  # pyright: ignore[reportArgumentType,reportCallIssue,reportIndexIssue]
        whole = [to_tensor(np.array(image)[None]) for image in images]
        halved = [torch.nn.functional.avg_pool2d(image, 2)[0] for image in whole]
        cuts = [image.shape[2] * 3 // 4 for image in halved]
        self._training = [image[:, :, :cut] for image, cut in zip(halved, cuts, strict=True)]
        self._judged = [image[:, :, cut:] for image, cut in zip(halved, cuts, strict=True)]

    def training(self, n: int, rng: np.random.Generator) -> Tensor:
        """See `Source`."""
        return _crops(self._training, n, rng)

    def judged(self, n: int, rng: np.random.Generator) -> Tensor:
        """See `Source`."""
        return _crops(self._judged, n, rng)


def source_of(name: str) -> Source:
    """The source of this name, of ``settings.DATA``.

    Raises:
        InputError: what it needs is not installed.
    """
    return Photos() if name == "photos" else DrawnScenes()


def _crops(images: list[Tensor], n: int, rng: np.random.Generator) -> Tensor:
    crops: list[Tensor] = []
    while len(crops) < n:
        image = images[int(rng.integers(len(images)))]
        top, left = (int(rng.integers(side - SIZE + 1)) for side in image.shape[1:])
        crop = image[:, top : top + SIZE, left : left + SIZE]
        if crop.std() >= CONTRAST:
            crops.append(crop)
    return torch.stack(crops)
