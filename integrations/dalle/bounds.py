"""The evidence bound of a discrete VAE, in nats and in bits per dimension: what it says of pictures of whole bytes.

    -ELBO = E_q[-ln p(x | z)] + KL(q(z | x) || p(z)),    bits per dimension = -ELBO / (3 S S ln 2)

* ``q`` is the plain categorical of the encoder's logits, and ``z`` is drawn from it: hard codes, neither relaxed nor
  the argmax. One draw a picture; the KL divergence is exact.
* ``p(x | z)`` gives each of the 256 levels of a sub-pixel the mass of its bin under the density that the decoder
  describes, and the first and the last level the tails. So its masses sum to 1, bits per dimension are those of a code
  for the pictures, and runs of different likelihoods can be compared. For "logit_laplace" the density is the decoder's.
  A decoder of "mse" gives a mean alone: its density is a Gaussian of one width, that of the pictures judged.
* ``p(z)`` is uniform, as in stage 1; with a transformer it is the transformer's, given the caption: then the KL
  divergence is that of the whole model of stage 2, ``E_q[ln q(z | x) - ln p(z | caption)]``, at the codes drawn.

Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2 (the bound), A.3 (the density); Salimans et al., "PixelCNN++",
2017, section 2.1 (bins of a density, the outer ones with the tails).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .likelihood import squeezed
from .relaxed import RelaxedVAE

_LEVELS = 256
_LEAST = 1e-12
"""Mass of a level below which its logarithm would be rounding error."""
_NARROWEST = 1e-3
"""Width of a Gaussian, at least: a decoder that is exactly right must not be certain of a level's edge."""


@dataclass(frozen=True)
class Bound:
    """The terms of the negative bound of one picture, each ``(B,)`` in nats.

    Args:
        reconstruction: -ln p(x | z).
        kl: KL(q || uniform), exact.
        entropy: of q.
        codes: ``(B, G)``, what was drawn.
    """

    reconstruction: Tensor
    kl: Tensor
    entropy: Tensor
    codes: Tensor


@torch.no_grad()
def bound(dvae: RelaxedVAE, pictures: Tensor, generator: torch.Generator, width: float = _NARROWEST) -> Bound:
    """Compute the terms of the bound.

    Args:
        dvae: in eval mode.
        pictures: ``(B, 3, S, S)`` in [0, 1].
        generator: on their device; draws the codes.
        width: of the Gaussian of an "mse" decoder, see `fitted_width`.
    """
    log_q = dvae.encode(pictures).flatten(2).transpose(1, 2).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum((1, 2))
    cells, codes = log_q.shape[1:]
    drawn = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=generator).reshape(-1, cells)
    return Bound(
        reconstruction=-log_masses(dvae, pictures, drawn, width).sum((1, 2, 3)),
        kl=cells * math.log(codes) - entropy,
        entropy=entropy,
        codes=drawn,
    )


def log_masses(dvae: RelaxedVAE, pictures: Tensor, codes: Tensor, width: float = _NARROWEST) -> Tensor:
    """Logarithm of the mass of each sub-pixel's level given the codes.

    Args:
        dvae: gives the density.
        pictures: ``(B, 3, S, S)`` in [0, 1], rounded to levels.
        codes: ``(B, G)``.
        width: of the Gaussian of an "mse" decoder.

    Returns:
        ``(B, 3, S, S)``, at most 0.
    """
    outputs = render(dvae, codes).double()
    level = (pictures.double() * (_LEVELS - 1)).round()
    lower, upper = (level - 0.5) / (_LEVELS - 1), (level + 0.5) / (_LEVELS - 1)
    if dvae.settings.likelihood == "mse":
        mean = outputs * 0.5 + 0.5
        below = [torch.special.ndtr((edge - mean) / max(width, _NARROWEST)) for edge in (lower, upper)]
    else:
        mean, log_scale = outputs.chunk(2, dim=1)
        if dvae.settings.log_scale_floor is not None:
            log_scale = log_scale.clamp_min(dvae.settings.log_scale_floor)
        below = [_laplace((squeezed(edge).logit() - mean) * (-log_scale).exp()) for edge in (lower, upper)]
    below = [below[0].where(level > 0, 0.0), below[1].where(level < _LEVELS - 1, 1.0)]
    return (below[1] - below[0]).clamp_min(_LEAST).log()


def fitted_width(dvae: RelaxedVAE, pictures: Tensor) -> float:
    """Root of the mean squared error of an "mse" decoder at the argmax tokens of ``pictures``: its Gaussian's width."""
    errors = dvae.decode(dvae.tokenize(pictures)) - pictures
    return max(_NARROWEST, float(errors.double().square().mean().sqrt()))


def render(dvae: RelaxedVAE, codes: Tensor) -> Tensor:
    """What the decoder gives for hard codes ``(B, G)``."""
    grid = codes.reshape(-1, dvae.settings.grid, dvae.settings.grid)
    z = F.one_hot(grid, dvae.settings.codes).permute(0, 3, 1, 2)
    return dvae.render(z.to(next(dvae.parameters()).dtype))


def bits_per_dimension(nats: float, size: int) -> float:
    """Nats of a picture as bits of a sub-pixel.

    Example:
        >>> round(bits_per_dimension(3 * 24 * 24 * math.log(256), 24), 6)
        8.0
    """
    return nats / (3 * size * size * math.log(2))


def _laplace(x: Tensor) -> Tensor:
    """Distribution function of the standard Laplace density."""
    half = 0.5 * (-x.abs()).exp()
    return torch.where(x < 0, half, 1 - half)
