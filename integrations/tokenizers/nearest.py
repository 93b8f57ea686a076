"""Which code is nearest, in float32 whatever the autocast."""

import torch
from torch import Tensor

from .bottleneck import in_float32

_AT_ONCE = 2**24
"""Distances that are held at once."""


@torch.no_grad()
def nearest(points: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code of each point.

    Args:
        points: ``(n, d)``.
        codes: ``(K, d)``.

    Returns:
        ``(n,)`` int64, argmin over j of ``|points_i - codes_j|^2``; the first of equals.

    Example:
        >>> nearest(torch.tensor([[0.1], [0.9]]), torch.tensor([[1.0], [0.0]]))
        tensor([1, 0])
    """
    with in_float32(points.device):
        points, codes = points.float(), codes.float()
        # Around their mean: what all codes have in common would eat the digits that tell them apart.
        middle = codes.mean(0)
        points, codes = points - middle, codes - middle
        squares, found = codes.square().sum(1), []
        for part in points.split(max(1, _AT_ONCE // len(codes))):
            found.append(torch.addmm(squares, part, codes.T, alpha=-2).argmin(1))
        return torch.cat(found)
