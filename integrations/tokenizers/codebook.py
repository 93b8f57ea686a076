"""What the bottlenecks with a table of vectors have in common: the nearest code, two losses, and the gradient.

::

    k = argmin_j |z - e_j|^2
    losses = codebook_weight |sg[z] - e_k|^2 + commitment_weight |z - sg[e_k]|^2

The codebook loss moves codes and never the encoder, the commitment loss moves the encoder and never a code; public code
has had the weights on the wrong terms (CompVis/taming-transformers#57). Squares are means over all elements.

Source: van den Oord et al. 2017 (arXiv:1711.00937), equation 3, where the commitment weight is called beta.
"""

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from .bottleneck import (
    MOST_CODES,
    Bottleneck,
    Quantized,
    check,
    check_flag,
    check_indices,
    grid_of,
    in_float32,
    passed_through,
    rows_of,
)
from .nearest import nearest
from .rotation import rotated


class Codebook(Bottleneck, abc.ABC):
    """A table of K vectors of which each cell takes the nearest.

    Args:
        codes: K.
        width: d, channels of the encoder's output and of a code.
        codebook_weight: w_c, of the term that moves codes.
        commitment_weight: w_m, of the term that moves the encoder.
        rotation: whether the decoder's gradient reaches the encoder by the rotation trick, not as it is.

    Raises:
        SettingError: a value out of its range.
    """

    def __init__(
        self, codes: int, width: int, codebook_weight: float, commitment_weight: float, rotation: bool
    ) -> None:
        kind = type(self).__name__
        check(f"{kind}.codes", codes, 2, MOST_CODES, whole=True)
        check(f"{kind}.width", width, 1, 4096, whole=True)
        check(f"{kind}.codebook_weight", codebook_weight, 0, 1000)
        check(f"{kind}.commitment_weight", commitment_weight, 0, 1000)
        check_flag(f"{kind}.rotation", rotation)
        super().__init__(width, width, codes)
        self.codebook_weight, self.commitment_weight, self.rotation = codebook_weight, commitment_weight, rotation

    @abc.abstractmethod
    def table(self) -> Tensor:
        """The codes, ``(K, d)`` float32, with gradient where they are learned by gradients."""

    @abc.abstractmethod
    def observe(self, rows: Tensor, indices: Tensor) -> None:
        """Take note of a training batch: encoder vectors ``(n, d)`` without gradient and their codes ``(n,)``."""

    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """See `Bottleneck`. Losses: ``codebook`` unless its weight is 0, and ``commitment``."""
        with in_float32(z.device):
            rows, table = rows_of(z), self.table()
            indices = nearest(rows, table)
            chosen = F.embedding(indices, table)
            losses = {"commitment": self.commitment_weight * F.mse_loss(rows, chosen.detach())}
            if self.codebook_weight:
                losses["codebook"] = self.codebook_weight * F.mse_loss(chosen, rows.detach())
            passed = rotated(rows, chosen) if self.rotation else passed_through(rows, chosen)
            if self.training:
                self.observe(rows.detach(), indices)
            return Quantized(grid_of(passed, z), grid_of(indices, z)[:, 0], losses)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """See `Bottleneck`."""
        with in_float32(z.device):
            return grid_of(nearest(rows_of(z), self.table()), z)[:, 0]

    @torch.no_grad()
    def lookup(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        with in_float32(indices.device):
            table = self.table()
            check_indices(indices, len(table))
            return F.embedding(indices, table).movedim(-1, 1).contiguous()
