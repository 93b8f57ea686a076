"""In which order pictures are seen: a seeded shuffle that is computed where it is needed and kept nowhere.

A step's global batch is the next stretch of an endless row of positions, one epoch after the other; every rank takes
its own part of that stretch. So all ranks take as many pictures at every step, whatever the shards they come from, any
number of ranks sees the same global batches, and to go on where a run stopped takes the number of the step alone.
"""

import functools
import hashlib
from dataclasses import dataclass, replace

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Part:
    """One rank's part of one step's global batch.

    Args:
        stage: 1 or 2; each goes through the data in an order of its own.
        step: counted from 0.
        batch: pictures a step, over all ranks; a multiple of ``world_size``.
        rank: this process.
        world_size: processes that train together.

    Example:
        >>> Part(stage=1, step=2, batch=6, rank=1, world_size=2).positions()
        array([15, 16, 17])
    """

    stage: int
    step: int
    batch: int
    rank: int = 0
    world_size: int = 1

    @property
    def count(self) -> int:
        """How many pictures it has."""
        return self.batch // self.world_size

    def positions(self) -> np.ndarray:
        """Where its pictures stand in the endless row, int64 ``(count,)``."""
        first = self.step * self.batch + self.rank * self.count
        return np.arange(first, first + self.count)

    def after(self, steps: int) -> "Part":
        """The same rank's part, ``steps`` later."""
        return replace(self, step=self.step + steps)


class Order:
    """A seeded shuffle of ``n`` items, a new one for every epoch.

    Each epoch is a swap-or-not shuffle: a number of rounds pair the items up at random, and a keyed hash of the pair
    says whether its two items change places. A round is its own inverse, so that the whole is a bijection whatever the
    hash gives; it takes no memory, and any item of it is found without the others.

    Source: Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012, figure 1.

    Args:
        n: how many items, at least 1.
        seed: decides the order, with the epoch.
        stage: each has an order of its own: with the same, both would meet the same pictures side by side.

    Example:
        >>> order = Order(5, seed=0)
        >>> sorted(order.at(np.arange(5, 10)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int, stage: int = 0) -> None:
        self.n = n
        self._name = f"{seed} {stage}"
        self._keys = functools.lru_cache(maxsize=4)(self._round_keys)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Give the items at ``positions`` of the endless row of epochs, int64 of the same shape."""
        items = np.empty(len(positions), np.int64)
        epochs, places = np.divmod(positions, self.n)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._shuffled(int(epoch), places[here])
        return items

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        offsets, keys = self._keys(epoch)
        found = places.astype(np.int64)
        for offset, key in zip(offsets, keys, strict=True):
            partner = (offset - found) % self.n
            swapped = _mixed(np.maximum(found, partner).astype(np.uint64) ^ key) >> np.uint64(63) == 1
            found = np.where(swapped, partner, found)
        return found

    def _round_keys(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """What every round adds, and what keys its hash."""
        rounds = 24 + 6 * self.n.bit_length()
        start = hashlib.blake2b(f"{self._name} {epoch}".encode(), digest_size=8).digest()
        numbers = np.arange(2 * rounds, dtype=np.uint64) * _GOLDEN + np.frombuffer(start, "<u8")
        numbers = _mixed(numbers)
        return (numbers[:rounds] % np.uint64(self.n)).astype(np.int64), numbers[rounds:]


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of 64 bits to 64 bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
