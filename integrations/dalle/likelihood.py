"""What a reconstruction is measured by, for every tokenizer here: the two likelihoods, and the weight of edges.

"mse" is a Gaussian of fixed width, "logit_laplace" the sigmoid of a Laplace variable: a density on (0, 1).

Source: Ramesh et al. 2021 (arXiv:2102.12092), A.3.
"""

import math
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

LAPLACE_MARGIN = 0.1
"""Pixels are squeezed into [0.1, 0.9] before the logit, A.3: the density has no mass at 0 and 1."""


class Shape(Protocol):
    """What a dVAE's settings tell of it."""

    @property
    def size(self) -> int:
        """Side S of the square RGB pictures, in pixels."""
        ...

    @property
    def grid(self) -> int:
        """Side g of the token grid."""
        ...

    @property
    def codes(self) -> int:
        """K."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens in a picture, g squared."""
        ...

    @property
    def likelihood(self) -> str:
        """Either "mse" (a Gaussian of fixed width) or "logit_laplace" (A.3)."""
        ...

    @property
    def log_scale_floor(self) -> float | None:
        """Smallest log-width of the logit-Laplace; ``None`` for none."""
        ...


def negative_log_likelihood(shape: Shape, outputs: Tensor, pictures: Tensor) -> Tensor:
    """What each sub-pixel costs, ``(B, 3, S, S)``: nats for "logit_laplace", the squared error for "mse".

    Args:
        shape: of what gave ``outputs``.
        outputs: of a decoder, ``(B, 3, S, S)`` for "mse"; ``(B, 6, S, S)``, means and log-widths, for "logit_laplace".
        pictures: ``(B, 3, S, S)`` in [0, 1].
    """
    if shape.likelihood == "mse":
        return (outputs * 0.5 + 0.5 - pictures).square()
    means, log_scales = outputs.chunk(2, dim=1)
    if shape.log_scale_floor is not None:
        log_scales = log_scales.clamp_min(shape.log_scale_floor)
    return logit_laplace(pictures, means, log_scales)


def view(shape: Shape, outputs: Tensor) -> Tensor:
    """Pictures ``(B, 3, S, S)`` in [0, 1] of a decoder's ``outputs``, see `negative_log_likelihood`."""
    if shape.likelihood == "mse":
        return (outputs * 0.5 + 0.5).clamp(0, 1)
    means = outputs.chunk(2, dim=1)[0]
    return unsqueezed(means.sigmoid())


def logit_laplace(pictures: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Negative log-density of the sigmoid of a Laplace variable (A.3), at pictures squeezed into [0.1, 0.9].

    Args:
        pictures: in [0, 1].
        means: of the Laplace variable, same shape.
        log_scales: logarithm of its width b, same shape.

    Returns:
        In nats, one value a sub-pixel.
    """
    x = squeezed(pictures)
    distance = (x.logit() - means).abs() * (-log_scales).exp()
    return distance + log_scales + math.log(2) + x.log() + (1 - x).log()


def squeezed(pictures: Tensor) -> Tensor:
    """Pixels in [0, 1], squeezed into [0.1, 0.9] (A.3).

    Example:
        >>> import torch
        >>> squeezed(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.1000, 0.5000, 0.9000])
    """
    return (1 - 2 * LAPLACE_MARGIN) * pictures + LAPLACE_MARGIN


def unsqueezed(x: Tensor) -> Tensor:
    """Undo `squeezed`; what lies beyond becomes 0 or 1.

    Example:
        >>> import torch
        >>> unsqueezed(torch.tensor([0.05, 0.1, 0.5, 0.95]))
        tensor([0.0000, 0.0000, 0.5000, 1.0000])
    """
    return ((x - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN)).clamp(0, 1)


def edge_weights(pictures: Tensor, edges: float) -> Tensor:
    """Weights ``(B, 1, S, S)`` with mean 1 in each picture, larger where neighbouring pixels differ.

    Args:
        pictures: ``(B, 3, S, S)`` in [0, 1].
        edges: how much more a step of 1 in some channel weighs than flat colour.
    """
    rows = (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().amax(1, keepdim=True)
    columns = (pictures[..., 1:] - pictures[..., :-1]).abs().amax(1, keepdim=True)
    vertical = F.pad(rows, (0, 0, 0, 1)).maximum(F.pad(rows, (0, 0, 1, 0)))
    horizontal = F.pad(columns, (0, 1)).maximum(F.pad(columns, (1, 0)))
    weights = 1 + edges * vertical.maximum(horizontal)
    return weights / weights.mean((2, 3), keepdim=True)
