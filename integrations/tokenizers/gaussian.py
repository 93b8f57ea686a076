"""Gaussian: the bottleneck of a VAE, continuous, with a prior.

::

    the encoder gives mu and ln sigma^2;   vector = mu + sigma * noise
    KL = 1/2 (mu^2 + sigma^2 - ln sigma^2 - 1), summed over channels and cells, mean over the batch

The sum belongs to a reconstruction that is summed over the sub-pixels of a picture. Where that is a mean, ``subpixels``
divides the KL divergence by as much.

Source: Kingma and Welling 2013 (arXiv:1312.6114), section 3 and appendix B; beta: Higgins et al. 2017; free bits:
Kingma et al. 2016 (arXiv:1606.04934), appendix C.8, a latent dimension being one channel of one cell.
"""

import torch
from torch import Tensor

from distopt.errors import SettingError

from .bottleneck import MOST_CODES, Bottleneck, Quantized, check, in_float32

_LOW, _HIGH = -30.0, 20.0
"""ln sigma^2 is kept between these, where its exponential is a number."""


class Gaussian(Bottleneck):
    """A diagonal Gaussian and its distance from the standard one.

    Args:
        codes: not looked at.
        width: d, channels of a vector; the encoder gives 2 d: means, then logarithms of variances.
        beta: weight of the KL divergence.
        warmup: training batches over which beta rises linearly from 0.
        free_bits: nats a latent dimension may hold, on the mean of a batch, before they cost.
        subpixels: what the reconstruction is a mean over; 1 where it is a sum.

    Raises:
        SettingError: a value out of its range.

    Example:
        >>> gaussian = Gaussian(0, width=4)
        >>> out = gaussian(torch.zeros(2, 8, 3, 3))  # mu = 0, sigma = 1: the prior itself
        >>> out.vectors.shape, float(out.losses["kl"])
        (torch.Size([2, 4, 3, 3]), 0.0)
    """

    updates: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        subpixels: int = 1,
    ) -> None:
        check("Gaussian.width", width, 1, 4096, whole=True)
        check("Gaussian.beta", beta, 0, MOST_CODES)
        check("Gaussian.warmup", warmup, 0, MOST_CODES, whole=True)
        check("Gaussian.free_bits", free_bits, 0, 1000)
        check("Gaussian.subpixels", subpixels, 1, 2**32, whole=True)
        super().__init__(2 * width, width, None)
        self.beta, self.warmup, self.free_bits, self.subpixels = beta, warmup, free_bits, subpixels
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """See `Bottleneck`. Loss: ``kl``. In eval mode the vectors are the means."""
        with in_float32(z.device):
            mean, log_variance = z.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(_LOW, _HIGH)
            vectors = mean
            if self.training:
                noise = torch.empty_like(mean).normal_(generator=generator)
                vectors = mean + (log_variance / 2).exp() * noise
            each = kl_from_standard(mean, log_variance).mean(0)
            kl = each.clamp_min(self.free_bits).sum()
            losses = {"kl": self.beta * self._warm() / self.subpixels * kl}
            if self.training:
                self.updates += 1
            return Quantized(vectors, None, losses)

    def _warm(self) -> float:
        return min(1.0, int(self.updates) / self.warmup) if self.warmup else 1.0

    def encode(self, z: Tensor) -> Tensor:
        """Refuse: there are no indices."""
        raise SettingError("bottleneck", "gaussian", "a discrete one, to have indices")

    def lookup(self, indices: Tensor) -> Tensor:
        """Refuse: there are no indices."""
        raise SettingError("bottleneck", "gaussian", "a discrete one, to have indices")


def kl_from_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, element by element.

    Example:
        >>> kl_from_standard(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.5000])
    """
    return (mean.square() + log_variance.exp() - log_variance - 1) / 2
