"""FSQ: each of a few channels is bounded and rounded to one of L levels; the product of levels is the codebook.

::

    bound(z) = tanh(z + shift) (L - 1) (1 + eps) / 2 - offset     offset = 1/2 for an even L, else 0
    vector   = round(bound(z)) / floor(L / 2)                     in [-1, 1]
    index    = sum_i (round(bound(z))_i + floor(L_i / 2)) prod_(j < i) L_j

Nothing is learned and there are no losses. The rounding is straight-through, tanh is not.

Source: Mentzer et al. 2023 (arXiv:2309.15505), section 3; levels of table 1.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.errors import SettingError

from .bottleneck import (
    MOST_CODES,
    Bottleneck,
    Quantized,
    check,
    check_indices,
    grid_of,
    in_float32,
    passed_through,
    rows_of,
)

LEVELS = {
    2**4: (5, 3),
    2**6: (8, 8),
    2**8: (8, 6, 5),
    2**9: (8, 8, 8),
    2**10: (8, 5, 5, 5),
    2**11: (8, 8, 6, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
"""The paper's levels, by the size of the codebook that they stand in for."""
_EPS = 1e-3
_MOST_LEVELS = 256


def levels_for(codes: int) -> tuple[int, ...]:
    """Levels whose product is about ``codes``: the paper's for its sizes, else the nearest product of 3 to 8 levels.

    Example:
        >>> levels_for(1024), levels_for(192)
        ((8, 5, 5, 5), (8, 8, 3))
    """
    if codes in LEVELS:
        return LEVELS[codes]
    most = max(1, math.ceil(math.log(codes, 5)))
    found = (
        each
        for channels in range(1, most + 2)
        for each in itertools.combinations_with_replacement((8, 7, 6, 5, 4, 3), channels)
    )
    return min(found, key=lambda levels: (abs(math.prod(levels) - codes), len(levels)))


class FSQ(Bottleneck):
    """Finite scalar quantisation.

    Args:
        codes: about how many; `codes` then tells the product of the levels, which may differ: the paper's levels for
            1024 codes make 1000.
        width: not looked at: an FSQ has as many channels as levels.
        levels: L of each channel, instead of those for ``codes``.

    Raises:
        SettingError: a value out of its range.

    Example:
        >>> fsq = FSQ(codes=240, width=32)
        >>> fsq.codes, fsq.inputs, fsq.outputs
        (240, 3, 3)
        >>> every = torch.arange(240).reshape(1, 15, 16)
        >>> torch.equal(fsq.indices_of(fsq.lookup(every)), every)
        True
    """

    levels: Tensor
    places: Tensor

    def __init__(self, codes: int, width: int, *, levels: Sequence[int] | None = None) -> None:
        check("FSQ.codes", codes, 2, MOST_CODES, whole=True)
        if levels is not None and (isinstance(levels, str) or not isinstance(levels, Sequence)):
            raise SettingError("FSQ.levels", levels, "a list of whole numbers: [8, 6, 5]")
        chosen = levels_for(codes) if levels is None else tuple(levels)
        for each in chosen:
            check("FSQ.levels", each, 2, _MOST_LEVELS, whole=True)
        if not chosen or math.prod(chosen) > MOST_CODES:
            raise SettingError("FSQ.levels", chosen, f"numbers whose product is from 2 to {MOST_CODES}")
        super().__init__(len(chosen), len(chosen), math.prod(chosen))
        self.register_buffer("levels", torch.tensor(chosen), persistent=False)
        places = [math.prod(chosen[:i]) for i in range(len(chosen))]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """See `Bottleneck`. No losses."""
        with in_float32(z.device):
            bounded = self._bound(rows_of(z))
            whole = bounded.round()
            vectors = passed_through(bounded, whole) / self._half
            return Quantized(grid_of(vectors, z), grid_of(self._index(whole), z)[:, 0], {})

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """See `Bottleneck`."""
        with in_float32(z.device):
            return grid_of(self._index(self._bound(rows_of(z)).round()), z)[:, 0]

    @torch.no_grad()
    def lookup(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        check_indices(indices, self.codes or 0)
        digits = indices.unsqueeze(-1) // self.places % self.levels
        return ((digits - self._half).float() / self._half).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def indices_of(self, vectors: Tensor) -> Tensor:
        """Indices ``(B, h, w)`` of vectors ``(B, outputs, h, w)`` that are codes."""
        with in_float32(vectors.device):
            return grid_of(self._index((rows_of(vectors) * self._half).round()), vectors)[:, 0]

    @property
    def _half(self) -> Tensor:
        return self.levels // 2

    def _bound(self, rows: Tensor) -> Tensor:
        reach = (self.levels - 1) * (1 + _EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(rows + torch.atanh(offset / reach)) * reach - offset

    def _index(self, whole: Tensor) -> Tensor:
        # In integers: a sum of products in bfloat16 would not tell 256 from 257.
        return ((whole.long() + self._half) * self.places).sum(1)
