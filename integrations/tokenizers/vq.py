"""VQ: a codebook that gradients move (van den Oord et al. 2017, arXiv:1711.00937)."""

import torch
from torch import Tensor, nn

from .bottleneck import rows_of
from .codebook import Codebook
from .union import started


class VQ(Codebook):
    """Vector quantisation with a codebook learned by gradients.

    Args:
        codes: K.
        width: d.
        codebook_weight: w_c.
        commitment_weight: w_m.
        rotation: the rotation trick, see ``rotation``.

    The codes begin as ``N(0, 1/d)``, or by `start` as k-means centres. Only codes that are chosen have a gradient: one
    that is far from all data stays where it is.

    Example:
        >>> vq = VQ(codes=16, width=4)
        >>> out = vq(torch.randn(2, 4, 3, 3))
        >>> out.vectors.shape, out.indices.shape, sorted(out.losses)
        (torch.Size([2, 4, 3, 3]), torch.Size([2, 3, 3]), ['codebook', 'commitment'])
        >>> torch.equal(vq.lookup(out.indices), out.vectors)
        True
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        rotation: bool = False,
    ) -> None:
        super().__init__(codes, width, codebook_weight, commitment_weight, rotation)
        # An Embedding, so that distopt's reducers know it as one and send its gradient whole.
        self.embedding = nn.Embedding(codes, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def table(self) -> Tensor:
        """The codes, ``(K, d)``."""
        return self.embedding.weight.float()

    def observe(self, rows: Tensor, indices: Tensor) -> None:
        """Nothing: gradients move the codes."""

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Put the codes at k-means centres of ``z``."""
        assert self.codes is not None
        self.embedding.weight.copy_(started(rows_of(z), self.codes, generator))
