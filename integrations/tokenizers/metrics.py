"""Collapse as numbers: how much of a codebook, or of a latent space, is in use, and what quantisation takes off."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVE = 0.01
"""Variance over data above which the mean of a latent unit counts as active (Burda et al. 2015, arXiv:1509.00519)."""


@dataclass(frozen=True)
class CodeUse:
    """How a codebook is used.

    Args:
        used: share of the codes that occur, from 0 to 1.
        dead: how many do not.
        perplexity: exponential of the entropy of the frequencies: K if all occur equally often, 1 if one does.
    """

    used: float
    dead: int
    perplexity: float


def counts_of(indices: Tensor, codes: int) -> Tensor:
    """How often each code occurs in ``indices`` of any shape, ``(K,)`` int64."""
    return torch.bincount(indices.flatten(), minlength=codes)


def code_use(counts: Tensor) -> CodeUse:
    """Judge how often codes occur, ``(K,)``.

    Example:
        >>> code_use(torch.tensor([5, 5, 0, 0]))
        CodeUse(used=0.5, dead=2, perplexity=2.0)
    """
    dead = int((counts == 0).sum())
    shares = counts[counts > 0].double() / counts.sum()
    entropy = -float((shares * shares.log()).sum())
    return CodeUse(1 - dead / len(counts), dead, round(math.exp(entropy), 6))


def quantisation_error(z: Tensor, vectors: Tensor) -> float:
    """Mean squared difference between what the encoder gave and its codes, relative to the variance of the former.

    Args:
        z: ``(B, d, h, w)``.
        vectors: the same shape.

    Returns:
        0 where codes are exact, about 1 where one code stands for everything.

    Example:
        >>> z = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
        >>> quantisation_error(z, torch.zeros_like(z))
        1.0
    """
    z = z.detach().double()
    spread = (z - z.mean((0, 2, 3), keepdim=True)).square().mean()
    return float((z - vectors.detach()).square().mean() / spread.clamp_min(1e-30))


def active_units(means: Tensor) -> int:
    """Units of a Gaussian bottleneck whose mean varies over the data by more than `ACTIVE`.

    Args:
        means: ``(n, ...)``, the means of n pictures; every other position is a unit.

    Example:
        >>> active_units(torch.tensor([[0.0, 1.0], [0.05, -1.0]]))
        1
    """
    return int((means.flatten(1).double().var(0) > ACTIVE).sum())


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error over pixels in [0, 1].

    Example:
        >>> round(psnr(0.01), 6)
        20.0
    """
    return -10 * math.log10(max(mse, 1e-12))
