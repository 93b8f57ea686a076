"""Relaxed: a categorical distribution over codes in every cell, made differentiable: the bottleneck of a dVAE.

::

    l = logits of K codes;  g = -ln(-ln u);  y = softmax((l + g) / tau);  vector = sum_k y_k e_k
    KL = sum_k q_k (ln q_k + ln K), q = softmax(l), summed over cells, mean over the batch

The divergence is that of the plain categorical q, whatever tau is (its author: openai/DALL-E#26). In eval mode there is
no noise: the code is the argmax of the logits. Straight-through, the decoder is given the one code ``argmax(l + g)``,
and the gradient is that of y.

Source: Jang et al. 2016 (arXiv:1611.01144), sections 2.1 and 2.2; Ramesh et al. 2021 (arXiv:2102.12092), section 2.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from .union import mean_of_all, started


class Relaxed(Bottleneck):
    """A relaxed categorical: Gumbel noise, a softmax at a temperature, and one vector a code.

    Args:
        codes: K.
        width: d, channels of the encoder's output, which a linear layer makes logits of, and of a vector.
        beta: weight of the KL divergence.
        warmup: training batches over which beta rises linearly from 0.
        subpixels: what the reconstruction is a mean over; 1 where it is a sum.
        temperature: tau, where forward is not given one.
        usage: weight of a push towards equal use: ln K less the entropy of the mean q over the cells of all ranks.
        gain: how much the best code's logit leads the second's on average after `start`.
        straight_through: whether the decoder is given one code, not a mixture.

    Raises:
        SettingError: a value out of its range.

    Example:
        >>> relaxed = Relaxed(codes=16, width=4)
        >>> out = relaxed(torch.randn(2, 4, 3, 3), temperature=0.5)
        >>> out.vectors.shape, sorted(out.losses)
        (torch.Size([2, 4, 3, 3]), ['kl'])
    """

    updates: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        beta: float = 1.0,
        warmup: int = 0,
        subpixels: int = 1,
        temperature: float = 1.0,
        usage: float = 0.0,
        gain: float = 20.0,
        straight_through: bool = False,
    ) -> None:
        check("Relaxed.codes", codes, 2, MOST_CODES, whole=True)
        check("Relaxed.width", width, 1, 4096, whole=True)
        check("Relaxed.beta", beta, 0, MOST_CODES)
        check("Relaxed.warmup", warmup, 0, MOST_CODES, whole=True)
        check("Relaxed.subpixels", subpixels, 1, 2**32, whole=True)
        check("Relaxed.temperature", temperature, 1e-3, 1000)
        check("Relaxed.usage", usage, 0, 1000)
        check("Relaxed.gain", gain, 1e-3, 1000)
        check_flag("Relaxed.straight_through", straight_through)
        super().__init__(width, width, codes)
        self.beta, self.warmup, self.subpixels, self.temperature = beta, warmup, subpixels, temperature
        self.usage, self.gain, self.straight_through = usage, gain, straight_through
        self.to_logits = nn.Linear(width, codes)
        self.embedding = nn.Embedding(codes, width)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """See `Bottleneck`. Losses: ``kl``, and ``usage`` if it has a weight (then in training collective)."""
        with in_float32(z.device):
            logits, table = self._logits(rows_of(z)), self.embedding.weight.float()
            indices = logits.argmax(1)
            vectors = F.embedding(indices, table)
            if self.training:
                y = self._drawn(logits, generator, self.temperature if temperature is None else temperature)
                vectors = y @ table
            losses = self._losses(logits, len(z))
            if self.training:
                self.updates += 1
            return Quantized(grid_of(vectors, z), grid_of(indices, z)[:, 0], losses)

    def _logits(self, rows: Tensor) -> Tensor:
        """Logits ``(n, K)`` float32 of rows ``(n, d)``, whatever the weights are kept in."""
        return F.linear(rows, self.to_logits.weight.float(), self.to_logits.bias.float())

    def _drawn(self, logits: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
        """The weights y of the codes, ``(n, K)``."""
        # -ln of an exponential variable is a Gumbel variable, without a logarithm of 0.
        noisy = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        soft = F.softmax(noisy / temperature, dim=1)
        if not self.straight_through:
            return soft
        return passed_through(soft, F.one_hot(noisy.argmax(1), logits.shape[1]).to(soft.dtype))

    def _losses(self, logits: Tensor, batch: int) -> dict[str, Tensor]:
        log_q = F.log_softmax(logits, dim=1)
        q, most = log_q.exp(), math.log(logits.shape[1])
        kl = (q * (log_q + most)).sum() / batch
        warm = min(1.0, int(self.updates) / self.warmup) if self.warmup else 1.0
        losses = {"kl": self.beta * warm / self.subpixels * kl}
        if self.usage:
            mean = mean_of_all(q) if self.training else q.mean(0)
            losses["usage"] = self.usage * (most + torch.special.xlogy(mean, mean.clamp_min(1e-20)).sum())
        return losses

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """See `Bottleneck`: the argmax of the logits, without noise."""
        with in_float32(z.device):
            return grid_of(self._logits(rows_of(z)).argmax(1), z)[:, 0]

    @torch.no_grad()
    def lookup(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        check_indices(indices, self.codes or 0)
        return F.embedding(indices, self.embedding.weight.float()).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Let logits fall with the squared distance from k-means centres of ``z``, which become the vectors.

        Training then starts with all codes in use, which is easier to keep than to reach. Vectors are the standardised
        centres: codes that stand for similar cells start alike.
        """
        centres = started(rows_of(z), len(self.embedding.weight), generator)
        leads = torch.cdist(rows_of(z), centres).square().topk(2, dim=1, largest=False).values
        lead = mean_of_all(leads[:, 1] - leads[:, 0])
        # Of cells that are all alike no code leads: their own size keeps the logits in bounds.
        size = centres.square().sum(1).mean().clamp_min(1e-6)
        lead = torch.where(lead > 1e-6 * size, lead, size)
        self.to_logits.weight.copy_(2 * self.gain / lead * centres)
        self.to_logits.bias.copy_(-self.gain / lead * centres.square().sum(1))
        middle = centres - centres.mean(0)
        self.embedding.weight.copy_(middle / middle.square().mean().sqrt().clamp_min(1e-6))
