"""EMA: a codebook that is the running mean of what chose each code. No gradient reaches it.

::

    N_j <- g N_j + (1 - g) n_j        n_j: vectors of this batch whose code is j
    m_j <- g m_j + (1 - g) sum z
    e_j  = m_j / N'_j                 N'_j = (N_j + eps) / (sum N + K eps) sum N

n and the sums are those of all ranks. A code with less than ``dead`` times the mean N becomes a vector of the batch, of
whichever rank, and its N and m begin anew with it: otherwise the next update would put it back (espnet #6284).

Source: van den Oord et al. 2017 (arXiv:1711.00937), appendix A.1; smoothing as in DeepMind's Sonnet, replacement as in
Dhariwal et al. 2020 (arXiv:2005.00341), section 3.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from .bottleneck import MOST_CODES, check, rows_of
from .codebook import Codebook
from .union import picked, started, summed


class EMA(Codebook):
    """Vector quantisation with a codebook of running means.

    Args:
        codes: K.
        width: d.
        commitment_weight: w_m; there is no codebook loss.
        decay: gamma.
        smoothing: epsilon, in vectors.
        dead: share of the mean N below which a code is replaced; 0 replaces none. At twenty vectors a code, 0.1 is the
            usual threshold of two.
        rotation: the rotation trick, see ``rotation``.
        seed: of the draws of replacements, the same on all ranks.

    The codes begin as ``N(0, 1/d)`` with N = 1, or by `start` as k-means centres.

    Example:
        >>> ema = EMA(codes=16, width=4)
        >>> before = ema.table().clone()
        >>> sorted(ema(torch.randn(2, 4, 3, 3)).losses), torch.equal(ema.table(), before)
        (['commitment'], False)
    """

    embedding: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        smoothing: float = 1e-5,
        dead: float = 0.1,
        rotation: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(codes, width, 0.0, commitment_weight, rotation)
        check("EMA.decay", decay, 0, 1)
        check("EMA.smoothing", smoothing, 0, 1)
        check("EMA.dead", dead, 0, 1)
        check("EMA.seed", seed, 0, MOST_CODES, whole=True)
        self.decay, self.smoothing, self.dead, self.seed = decay, smoothing, dead, seed
        first = torch.randn(codes, width) * width**-0.5
        self.register_buffer("embedding", first)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", first.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def table(self) -> Tensor:
        """The codes, ``(K, d)``."""
        return self.embedding

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Leave the means in float32 when a model is put into 16 bits: steps of a hundredth would be lost there."""
        kept = {name: getattr(self, name) for name in ("embedding", "counts", "sums")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            device = getattr(self, name).device
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, value.to(device))
        return self

    @torch.no_grad()
    def observe(self, rows: Tensor, indices: Tensor) -> None:
        """Take a training batch into the means. Collective.

        One that is not finite on some rank is left out on all, as means never forget it; so is one of no vectors.
        """
        batch = rows.new_zeros(len(self.counts), 1 + rows.shape[1])
        batch.index_add_(0, indices, torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1))
        batch = summed(batch)
        if not bool(batch.isfinite().all() & (batch[:, 0].sum() > 0)):
            return
        self.counts.lerp_(batch[:, 0], 1 - self.decay)
        self.sums.lerp_(batch[:, 1:], 1 - self.decay)
        total, number = self.counts.sum(), len(self.counts)
        smoothed = (self.counts + self.smoothing) / (total + number * self.smoothing) * total
        self.embedding.copy_(self.sums / smoothed.clamp_min(torch.finfo(smoothed.dtype).tiny)[:, None])
        if self.dead:
            self._replace(self.counts < self.dead * total / number, rows)
        self.updates += 1

    def _replace(self, dead: Tensor, rows: Tensor) -> None:
        """Put vectors of the batch, of any rank, in place of dead codes. All ranks find the same codes dead."""
        number = int(dead.sum())
        if not number:
            return
        generator = torch.Generator().manual_seed((self.seed << 32) + int(self.updates))
        self.embedding[dead] = picked(rows, number, generator)
        self.counts[dead] = self.counts.mean()
        self.sums[dead] = self.embedding[dead] * self.counts[dead][:, None]

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Put the codes at k-means centres of ``z``, each with N = 1."""
        self.embedding.copy_(started(rows_of(z), len(self.counts), generator))
        self.counts.fill_(1.0)
        self.sums.copy_(self.embedding)
