"""Memory for factors that is kept from step to step, with all its cuts: cutting takes longer than computing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.reducers.matrix import Layout

KEPT = 1 << 16
"""Numbers that may travel with the factors in memory that is kept: where they are more, it is given back."""


class Shared(NamedTuple):
    """What came of averaging the factors of one side, and what travelled with them."""

    whole: Tensor  # what is averaged exactly, in one piece
    average: Tensor  # the factors of all ranks, as `Layout` lays them out
    stacks: Sequence[Tensor]  # these as `Layout.stacks` gives them
    averages: Sequence[Tensor]  # and as `Layout.views` does, one a unit
    mine: Tensor  # this rank's part in them, in one piece
    own: Sequence[Tensor]  # and as `Layout.views` does, one a unit


class Room:
    """Memory for the factors of one side: this rank's own, and what is sent.

    Args:
        layout: of the factors.
        side: ``"left"`` or ``"right"``.
        extra: numbers that travel with them.
        like: of their dtype and device.
        keeps_own: whether this rank's own are asked for once the average is there; else they are where that will be.
    """

    def __init__(self, layout: Layout, side: str, extra: int, like: Tensor, *, keeps_own: bool) -> None:
        numel = layout.numel(side)
        self.layout = layout
        self.extra = extra
        self._sent = like.new_empty(numel + extra)
        average, self._whole = self._sent.split_with_sizes([numel, extra])
        views = layout.views(average, side)
        self.own = like.new_empty(numel) if keeps_own else average
        self.own_views = layout.views(self.own, side) if keeps_own else views
        self._shared = Shared(self._whole, average, layout.stacks(average, side), views, self.own, self.own_views)

    def load(self, extra: Sequence[Tensor]) -> Tensor:
        """Put what travels side by side; gives all of it, to be averaged in place."""
        if self.own is not self._shared.average:
            return torch.cat([self.own, *extra], out=self._sent)
        if extra:
            torch.cat(list(extra), out=self._whole)
        return self._sent

    def shared(self) -> Shared:
        """What was loaded, once it has been averaged."""
        return self._shared
