"""scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which need no download, cut into two parts."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..running.fields import InputError

TEST = 597
"""Digits that nothing is trained on; the other 1200 are the training part."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pictures and labels.

    Args:
        pictures: ``(n, 1, 8, 8)`` float32 in [0, 1].
        labels: ``(n,)`` int64 from 0 to 9.
    """

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Digits":
        return Digits(self.pictures[index], self.labels[index])


def digits(seed: int = 0) -> tuple[Digits, Digits]:
    """The training part and the test part, cut by a permutation of ``seed``.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise InputError("scikit-learn, which carries the digits, is missing: pip install 'distopt[recipes]'") from None
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    whole = Digits(
        torch.tensor(pictures[order], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        torch.tensor(labels[order], dtype=torch.int64),
    )
    places = torch.arange(len(whole))
    return whole[places[TEST:]], whole[places[:TEST]]
