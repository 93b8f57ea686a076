"""A parameter that is kept within bounds, and can come back from outside of them."""

import math
from typing import Any, cast

import torch
from torch import Tensor


def clamped(value: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """``value`` between ``low`` and ``high``; a gradient that leads further out is 0, one that leads back passes.

    torch's own clamp passes none from outside: a parameter that an optimizer has put there would stay.

    Example:
        >>> value = torch.tensor([1.5, 1.5], requires_grad=True)
        >>> clamped(value, 0.0, 1.0).backward(torch.tensor([1.0, -1.0]))
        >>> value.grad.tolist()
        [1.0, 0.0]
    """
    return cast(Tensor, cast(Any, _Clamped).apply(value, low, high))


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,), (gradient,) = ctx.saved_tensors, gradients
        outwards = ((value <= ctx.low) & (gradient > 0)) | ((value >= ctx.high) & (gradient < 0))
        return gradient.masked_fill(outwards, 0.0), None, None
