"""The rotation trick: a gradient for the encoder that knows where in its cell a vector lies.

The chosen code is ``q = lambda R z`` with the rotation R that turns z's direction into q's and ``lambda = |q| / |z|``.
Forward is q itself; backward takes lambda and R as constants, so the encoder gets ``lambda R^T g``: the angle between
gradient and q becomes the angle between gradient and z.

It takes codes that keep up with the encoder, such as running means of decay 0.8, which the authors' code has for their
table 1. A code that lags behind is in another direction than its vectors: each is then handed a gradient turned far, by
another angle, and they are driven together, which loses codes (measured in the page on tokenizers).

Source: Fifty et al. 2024 (arXiv:2410.06424), section 4; R is a product of two Householder reflections.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-6


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(z, chosen)
        return chosen.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        z, chosen = ctx.saved_tensors
        u, q = F.normalize(z, dim=1, eps=_SMALL), F.normalize(chosen, dim=1, eps=_SMALL)
        w = F.normalize(u + q, dim=1, eps=_SMALL)
        scale = chosen.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(_SMALL)
        # R^T: R with u and q exchanged.
        turned = gradient - 2 * w * (w * gradient).sum(1, keepdim=True) + 2 * u * (q * gradient).sum(1, keepdim=True)
        return scale * turned, None


def rotated(z: Tensor, chosen: Tensor) -> Tensor:
    """``chosen``, with the gradient handed to ``z`` rotated and scaled.

    Args:
        z: ``(n, d)`` float32, what the encoder gave.
        chosen: ``(n, d)`` float32, its codes; they get no gradient.

    Returns:
        ``(n, d)``, equal to ``chosen`` to the bit.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> rotated(z, torch.tensor([[0.0, 2.0]])).backward(torch.tensor([[0.0, 3.0]]))
        >>> z.grad.round(decimals=3)  # along the code before, along z now; times |code| / |z|
        tensor([[6., 0.]])
    """
    return _Rotated.apply(z, chosen.detach())  # pyright: ignore[reportReturnType]
