"""Batches: a pure function of the seed, the step and whose turn it is, cut for ranks and micro-batches.

Whatever the ranks and micro-batches, the pictures, the noise and the classes of a step are the same.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the generator is to draw.

    Args:
        noise: ``(n, noise)``.
        classes: int64 ``(n,)``.
    """

    noise: Tensor
    classes: Tensor


@dataclasses.dataclass(frozen=True)
class Compared:
    """What the discriminator is to tell apart.

    Args:
        pictures: real ones, ``(n, 3, size, size)`` in [-1, 1].
        classes: of the pictures, int64 ``(n,)``.
        drawn: as many for the generator.
    """

    pictures: Tensor
    classes: Tensor
    drawn: Drawn


class Batches:
    """The batches of a run.

    Args:
        pictures: all there are, ``(N, 3, size, size)``.
        classes: theirs, int64 ``(N,)``.
        noise: numbers of noise a picture.
        batch: pictures a step, over all ranks.
        parts: into how many micro-batches of equal size it is cut, over all ranks; see `share`.
        seed: of the run.
        device: where batches are put.

    Example:
        >>> batches = Batches(torch.zeros(9, 3, 8, 8), torch.arange(9) % 3, 5, batch=4, parts=2, seed=0)
        >>> [part.noise.shape for part in batches.to_draw(step=7, share=range(1))]
        [torch.Size([2, 5])]
    """

    def __init__(
        self,
        pictures: Tensor,
        classes: Tensor,
        noise: int,
        *,
        batch: int,
        parts: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pictures, self._classes, self._noise = pictures, classes, noise
        self._kinds = int(classes.max()) + 1
        self._batch, self._size, self._seed, self._device = batch, batch // parts, seed, device

    def to_draw(self, step: int, share: range) -> Iterator[Drawn]:
        """The parts ``share`` of the generator's batch at ``step``, counted from 0."""
        return self._cut_drawn(self._generator(0, step, 0), share)

    def to_compare(self, step: int, turn: int, share: range) -> Iterator[Compared]:
        """The parts ``share`` of the discriminator's batch in its turn ``turn`` at ``step``, both counted from 0."""
        generator = self._generator(1, step, turn)
        chosen = torch.randint(len(self._pictures), (self._batch,), generator=generator)
        for part, drawn in zip(share, self._cut_drawn(generator, share), strict=True):
            mine = chosen[part * self._size : (part + 1) * self._size]
            yield Compared(self._pictures[mine].to(self._device), self._classes[mine].to(self._device), drawn)

    def _cut_drawn(self, generator: torch.Generator, share: range) -> Iterator[Drawn]:
        noise = torch.randn(self._batch, self._noise, generator=generator)
        classes = torch.randint(self._kinds, (self._batch,), generator=generator)
        for part in share:
            mine = slice(part * self._size, (part + 1) * self._size)
            yield Drawn(noise[mine].to(self._device), classes[mine].to(self._device))

    def _generator(self, *place: int) -> torch.Generator:
        (seed,) = np.random.SeedSequence([self._seed, *place]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed))
