"""Bags of instances to learn from: ragged bags of digits with planted fractions, and the algorithmic unit tests."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .digits import Digits
from .masks import pad_bags

_ROOM = 2.0
"""How far a class's share of a bag goes, in planted fractions."""


@dataclasses.dataclass(frozen=True)
class Bags:
    """Bags of different sizes, laid beside each other.

    Args:
        instances: ``(B, N, ...)`` float32; zeros where there is none.
        mask: ``(B, N)`` bool.
        labels: ``(B, C)`` float32, 0 or 1.
    """

    instances: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Bags":
        return Bags(self.instances[index], self.mask[index], self.labels[index])


def _laid(bags: Sequence[Tensor], labels: Sequence[Sequence[bool]]) -> Bags:
    return Bags(*pad_bags(bags), torch.tensor(labels, dtype=torch.float32))


def digit_bags(
    digits: Digits, number: int, fractions: Sequence[float], sizes: tuple[int, int], rng: np.random.Generator
) -> Bags:
    """Draw bags that are positive of class c if and only if digit c makes up at least ``fractions[c]`` of them.

    Args:
        digits: where instances are drawn from, with replacement.
        number: of bags.
        fractions: of digits 0, 1, ..., fewer than ten, each above 0 and up to 1.
        sizes: the smallest and the largest bag.
        rng: decides everything.

    Returns:
        Bags of pictures ``(B, N, 1, 8, 8)``, with as many classes as fractions. The share of each is anything up to
        twice its fraction, less where they do not fit; other digits fill the rest.
    """
    by_digit = [np.flatnonzero(digits.labels.numpy() == digit) for digit in range(10)]
    bags, labels = [], []
    for _ in range(number):
        size = int(rng.integers(sizes[0], sizes[1] + 1))
        shares = rng.uniform(0.0, np.minimum(1.0, _ROOM * np.asarray(fractions)))
        planted = np.repeat(
            np.arange(len(fractions)), np.floor(shares / max(1.0, shares.sum()) * size + 0.5).astype(int)
        )
        others = rng.choice(np.arange(len(fractions), 10), max(0, size - len(planted)))
        held = np.concatenate([rng.permutation(planted)[:size], others])
        bags.append(digits.pictures[torch.tensor([rng.choice(by_digit[digit]) for digit in held])])
        counts = np.bincount(held, minlength=10)
        # In whole numbers of a thousandth: 3 of 10 are 0.3.
        labels.append([1000 * counts[c] >= round(1000 * fraction) * size for c, fraction in enumerate(fractions)])
    return _laid(bags, labels)


UNIT_TESTS = ("single-concept", "multi-concept", "false-frequency")


def unit_test_bags(name: str, number: int, *, train: bool, rng: np.random.Generator, dimensions: int = 16) -> Bags:
    """Draw the bags of one algorithmic unit test, half of them positive.

    In training, something that is easy to see speaks for "negative"; in testing it is where a model of multiple
    instances is not misled by it, and one that has learned it does worse than chance (area under ROC below 0.5).

    * single-concept: positive bags have one to three instances of two positive kinds. Every negative bag holds a
      "poison" in training; in testing the positive bags do.
    * multi-concept: positive bags have both kinds, one to three of each, negative bags one instance of one of them.
      Poison as above.
    * false-frequency: positive bags have both kinds once, negative bags the first kind, once in training and 35 to 44
      times in testing.

    Args:
        name: one of `UNIT_TESTS`.
        number: of bags.
        train: the bags to train on, or those to test on.
        rng: decides everything.
        dimensions: of an instance.

    Returns:
        Bags ``(B, N, dimensions)`` with one class.

    Source: Raff and Holt 2023 (arXiv:2310.17867), algorithms 1 to 3.
    """

    def normal(count: int, mean: float, deviation: float) -> np.ndarray:
        return rng.normal(mean, deviation, (count, dimensions))

    def of_kind(kind: int, count: int) -> np.ndarray:
        if name == "single-concept":
            return normal(count, *((0.0, 3.0), (1.0, 1.0))[kind])
        return normal(count, 2.0 + kind, 0.1)

    bags, labels = [], []
    for index in range(number):
        positive = index % 2 == 0
        parts = [normal(10 if name == "single-concept" else int(rng.integers(1, 10)), 0.0, 1.0)]
        if name != "false-frequency" and positive != train:
            parts.append(normal(1, -10.0, 0.1))
        if name == "single-concept" and positive:
            parts += [of_kind(int(kind), 1) for kind in rng.integers(0, 2, int(rng.integers(1, 4)))]
        elif name == "multi-concept":
            each = int(rng.integers(1, 4))
            parts += [of_kind(0, each), of_kind(1, each)] if positive else [of_kind(int(rng.integers(2)), 1)]
        elif name == "false-frequency":
            many = 1 if train else int(rng.integers(35, 45))
            parts += [of_kind(0, 1), of_kind(1, 1)] if positive else [of_kind(0, many)]
        bags.append(torch.tensor(np.concatenate(parts), dtype=torch.float32))
        labels.append([positive])
    return _laid(bags, labels)
