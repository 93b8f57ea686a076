"""Probabilities by their logarithms: what stays exact where they or their complements are too small for a float."""

import math

import torch
from torch import Tensor
from torch.nn import functional

_LN2 = math.log(2)
_SMALL = -15.0
"""Below this, ``exp(x)`` is too small for its square to matter in float64's 16 digits, or nearly so in a series."""


def log1mexp(x: Tensor) -> Tensor:
    """``ln(1 - exp(x))`` for x at most 0, by whichever of two forms loses nothing.

    Example:
        >>> found = log1mexp(torch.tensor([-1e-20, -0.5], dtype=torch.float64))
        >>> [round(value, 6) for value in found.tolist()]
        [-46.051702, -0.932752]
    """
    near = x > -_LN2
    # Each branch is given what it can bear: a gradient of infinity times 0 would be NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, -_LN2)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -_LN2, x))))


def log_expm1(x: Tensor, log_x: Tensor) -> Tensor:
    """``ln(exp(x) - 1)`` for x above 0, of which the logarithm is known even where x itself is 0 in a float."""
    tiny = log_x < _SMALL
    kept = torch.where(tiny, 1.0, x)
    return torch.where(tiny, log_x + x / 2, kept + log1mexp(-kept))


def log_softplus(x: Tensor) -> Tensor:
    """``ln(ln(1 + exp(x)))``, which goes as x where ``exp(x)`` vanishes."""
    tiny = x < _SMALL
    kept = torch.where(tiny, 0.0, x)
    # exp(_SMALL) is below 1e-6: the series ends with its second term.
    return torch.where(tiny, x - torch.exp(torch.where(tiny, x, _SMALL)) / 2, torch.log(functional.softplus(kept)))


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """``ln sum exp(x)`` over dimension 1, of what ``mask`` keeps; ``(B, N, C)`` and ``(B, N)`` to ``(B, C)``."""
    return torch.logsumexp(x.masked_fill(~mask.unsqueeze(-1), -math.inf), dim=1)


def masked_logmeanexp(x: Tensor, mask: Tensor) -> Tensor:
    """``ln mean exp(x)`` over dimension 1, of what ``mask`` keeps; shapes as `masked_logsumexp`."""
    return masked_logsumexp(x, mask) - mask.sum(1, keepdim=True).to(x.dtype).log()
