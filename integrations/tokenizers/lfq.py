"""LFQ: as many channels as an index has bits, each of which is its sign; an entropy term keeps codes sure and in use.

::

    vector_i = sign(z_i) in {-1, 1}          index = sum_i [z_i > 0] 2^i
    losses   = entropy_weight (E[H(p)] - diversity H(E[p])) + commitment_weight |z - sg[vector]|^2
    p(c | z) = softmax_c(-|z - c|^2 / temperature)

Over the corners of a cube p is a product over channels, ``p(bit i) = sigmoid(4 z_i / temperature)``: E[H(p)] is a sum
over channels, exactly. H(E[p]) is taken over the codes of ``entropy_bits`` channels at a time; for more channels than
that the sum over groups is an upper bound of it. E is the mean over the cells of all ranks.

Source: Yu et al. 2023 (arXiv:2310.05737), section 3; groups as in Luo et al. 2024 (arXiv:2409.04410).
"""

import torch
import torch.nn.functional as F
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
from .union import mean_of_all


class LFQ(Bottleneck):
    """Quantisation without lookup: the signs of the channels.

    Args:
        codes: K, a power of two.
        width: not looked at: an LFQ has log2 K channels.
        entropy_weight: of the entropy term.
        diversity: gamma, of H(E[p]) within it.
        commitment_weight: w_m.
        temperature: of p.
        entropy_bits: channels whose joint H(E[p]) is taken at once.

    Raises:
        SettingError: a value out of its range.

    Example:
        >>> lfq = LFQ(codes=16, width=32)
        >>> lfq.inputs, lfq.lookup(torch.tensor([[[5]]])).flatten().tolist()
        (4, [1.0, -1.0, 1.0, -1.0])
    """

    powers: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_weight: float = 0.25,
        temperature: float = 1.0,
        entropy_bits: int = 12,
    ) -> None:
        check("LFQ.codes", codes, 2, MOST_CODES, whole=True)
        if codes & (codes - 1):
            raise SettingError("LFQ.codes", codes, "a power of two")
        check("LFQ.entropy_weight", entropy_weight, 0, 1000)
        check("LFQ.diversity", diversity, 0, 1000)
        check("LFQ.commitment_weight", commitment_weight, 0, 1000)
        check("LFQ.temperature", temperature, 1e-3, 1000)
        check("LFQ.entropy_bits", entropy_bits, 1, 14, whole=True)
        bits = codes.bit_length() - 1
        super().__init__(bits, bits, codes)
        self.entropy_weight, self.diversity, self.commitment_weight = entropy_weight, diversity, commitment_weight
        self.temperature, self.entropy_bits = temperature, entropy_bits
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """See `Bottleneck`. Losses: ``entropy`` and ``commitment``. In training collective."""
        with in_float32(z.device):
            rows = rows_of(z)
            signs = torch.where(rows > 0, 1.0, -1.0)
            losses = {"commitment": self.commitment_weight * F.mse_loss(rows, signs)}
            if self.entropy_weight:
                sure, spread = self.entropies(rows)
                losses["entropy"] = self.entropy_weight * (sure - self.diversity * spread)
            indices = ((rows > 0) * self.powers).sum(1)
            return Quantized(grid_of(passed_through(rows, signs), z), grid_of(indices, z)[:, 0], losses)

    def entropies(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(p)] and H(E[p]) in nats, of rows ``(n, bits)``; both at most ln K."""
        logits = 4 * rows / self.temperature
        sure = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(1).mean()
        spread = rows.new_zeros(())
        for part in logits.split(self.entropy_bits, dim=1):
            p = rows.new_ones(len(rows), 1)
            for bit in part.unbind(1):
                p = torch.cat([p * torch.sigmoid(-bit)[:, None], p * torch.sigmoid(bit)[:, None]], dim=1)
            mean = mean_of_all(p) if self.training else p.mean(0)
            spread = spread - torch.special.xlogy(mean, mean.clamp_min(1e-20)).sum()
        return sure, spread

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """See `Bottleneck`."""
        return grid_of(((rows_of(z) > 0) * self.powers).sum(1), z)[:, 0]

    @torch.no_grad()
    def lookup(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        check_indices(indices, self.codes or 0)
        bits = indices.unsqueeze(-1) // self.powers % 2
        return (2 * bits - 1).float().movedim(-1, 1).contiguous()
