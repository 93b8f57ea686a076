"""The two ends of a residual branch, as autograd sees them.

Forward, ``y = x + float32(branch(x))``. Backward, what comes in from the residual stream is scaled, filtered and
rounded to 16 bits where the branch ends; what goes out is unscaled and filtered where it begins. A filter turns NaN and
infinity into 0, so that an overflow in one branch does not reach those before it; parameter gradients are not filtered.

Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.4 and figure 4.
"""

from typing import Any

import torch
from torch import Tensor

from distopt.kernels.choice import chosen

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        (gradient,) = gradients
        return _filtered(gradient, inverse, gradient.dtype), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        wide = torch.promote_types(y.dtype, torch.float32)
        return y.view_as(y) if y.dtype == wide else y.to(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        (gradient,) = gradients
        return _filtered(gradient, scale, ctx.dtype), None


def enter(x: Tensor, inverse: Tensor) -> Tensor:
    """Give ``x``, whose gradient will be multiplied by ``inverse`` and filtered.

    Args:
        x: floating point, any shape: what the branch is given.
        inverse: 0-dimensional, one over the scale; read when backward gets here.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (enter(x, torch.tensor(0.5)) * torch.tensor([8.0, float("inf")])).sum().backward()
        >>> x.grad.tolist()
        [4.0, 0.0]
    """
    return _apply(_Enter, x, inverse)


def leave(y: Tensor, scale: Tensor) -> Tensor:
    """Give ``y`` in float32 at least; its gradient will be multiplied by ``scale``, filtered and rounded to its dtype.

    Args:
        y: floating point, any shape: what the branch returns.
        scale: 0-dimensional; read when backward gets here.

    Example:
        >>> y = torch.ones(1, dtype=torch.float16, requires_grad=True)
        >>> (leave(y, torch.tensor(1024.0)) * 2.0**-30).sum().backward()
        >>> y.grad.item() == 2.0**-20
        True
    """
    return _apply(_Leave, y, scale)


def launchable(tensor: Tensor) -> bool:
    """Whether Triton's edition works on a tensor: one that a compiler does not look at, and no gradient is asked of.

    Example:
        >>> launchable(torch.ones(2))
        False
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and tensor.requires_grad):
        return False
    return type(tensor) is Tensor and tensor.dtype in _DTYPES and chosen(tensor.device)


def _filtered(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in float32 at least, turn NaN and infinity into 0, and round."""
    if dtype in _DTYPES and launchable(gradient):
        from distopt.kernels import scaling

        return scaling.scaled(gradient, factor, dtype)
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide * factor).nan_to_num_(0.0, 0.0, 0.0).to(dtype)


def _apply(function: Any, tensor: Tensor, factor: Tensor) -> Tensor:
    return function.apply(tensor, factor)
