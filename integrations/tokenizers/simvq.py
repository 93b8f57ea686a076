"""SimVQ: the codebook is a frozen random table times a learned matrix, so that each gradient moves every code.

::

    table = C W (+ b)      C: (K, d), N(0, 1/d), frozen;  W: (d, d), learned

The gradient of one chosen code changes W, and with it all codes, those that nothing chose included: they follow the
data and are chosen in their turn. Losses are those of a codebook (``codebook``). Running means cannot learn it.

Source: Zhu et al. 2024 (arXiv:2411.02038), section 4. The bias is that of the authors' code, and no part of the paper.
"""

import torch
from torch import Tensor, nn

from .bottleneck import check_flag, rows_of
from .codebook import Codebook
from .union import from_first, gathered
from .vq import VQ


class SimVQ(Codebook):
    """Vector quantisation with frozen codes under a learned linear map.

    Args:
        codes: K.
        width: d.
        codebook_weight: w_c.
        commitment_weight: w_m.
        bias: whether the map has one.
        diagonal: whether W is diagonal: each channel is scaled. Begins as the identity.
        train_codes: whether gradients move C too.
        rotation: the rotation trick, see ``rotation``.

    Example:
        >>> simvq = SimVQ(codes=16, width=4)
        >>> before = simvq.table().detach()
        >>> z = before[0].reshape(1, 4, 1, 1) * 1.01  # nearest to code 0
        >>> sum(simvq(z).losses.values()).backward()
        >>> with torch.no_grad():
        ...     for parameter in simvq.parameters():
        ...         parameter -= 0 if parameter.grad is None else parameter.grad
        >>> bool(((simvq.table() - before).abs().amax(1) > 0).all())  # every code has moved
        True
    """

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        bias: bool = True,
        diagonal: bool = False,
        train_codes: bool = False,
        rotation: bool = False,
    ) -> None:
        super().__init__(codes, width, codebook_weight, commitment_weight, rotation)
        for name, flag in (("bias", bias), ("diagonal", diagonal), ("train_codes", train_codes)):
            check_flag(f"SimVQ.{name}", flag)
        self.embedding = nn.Embedding(codes, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.embedding.weight.requires_grad_(train_codes)
        self.map = _Scaling(width, bias) if diagonal else nn.Linear(width, width, bias)

    def table(self) -> Tensor:
        """The codes, ``(K, d)``."""
        return self.map(self.embedding.weight).float()

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Give the table the mean and the covariance of ``z``, of all ranks: the map's own kind of start (ours).

        A diagonal map takes the standard deviations of the channels; a map without bias leaves the mean.
        """
        rows = gathered(rows_of(z)).double()
        mean, width = rows.mean(0), rows.shape[1]
        if isinstance(self.map, nn.Linear):
            values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
            # C's rows have covariance 1/d: W^T W / d is the table's.
            root = vectors * (width * values.clamp_min(0)).sqrt() @ vectors.T
        else:
            root = rows.std(0, correction=0) * width**0.5
        self.map.weight.copy_(from_first(root))
        if self.map.bias is not None:
            self.map.bias.copy_(from_first(mean))

    def observe(self, rows: Tensor, indices: Tensor) -> None:
        """Nothing: gradients move the map."""

    @torch.no_grad()
    def merged(self) -> VQ:
        """The plain codebook with the same codes: what is kept when training is over.

        Example:
            >>> simvq, z = SimVQ(16, 4), torch.randn(2, 4, 3, 3)
            >>> torch.equal(simvq.merged().encode(z), simvq.encode(z))
            True
        """
        table = self.table()
        plain = VQ(
            *table.shape,
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            rotation=self.rotation,
        ).to(table.device)
        plain.embedding.weight.copy_(table)
        return plain.train(self.training)


class _Scaling(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias
