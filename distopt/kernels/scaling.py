"""The ends of a scaled branch, and its parameters' gradients: each read once and written once.

Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.4 and figure 4.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8
_INFINITY = tl.constexpr(0x7F800000)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply, turn what is not finite into 0, and round to another dtype, where what is too large is infinite.

    Args:
        gradient: float32, bfloat16 or float16, any shape. The product is float32.
        factor: 0-dimensional float32 on the same device, which the host does not read.
        dtype: of the result: any of these.

    Returns:
        A new tensor of that dtype, in the gradient's shape, and its order of memory where that has no gaps.
    """
    gradient = _without_gaps(gradient)
    result = torch.empty_like(gradient, dtype=dtype)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            _scale[_grid(gradient)](gradient, result, factor, gradient.numel(), _BLOCK, num_warps=_WARPS)
    return result


def noted(gradient: Tensor, peak: Tensor, factor: Tensor | None) -> Tensor:
    """Raise ``peak`` to the largest absolute value, NaN above all, and give the gradient times ``factor``.

    Args:
        gradient: float32, bfloat16 or float16, any shape.
        peak: 0-dimensional float32 on the same device, not negative; changed in place.
        factor: as `peak`; ``None`` gives the gradient itself.
    """
    dense = _without_gaps(gradient)
    result = gradient if factor is None else torch.empty_like(dense)
    if dense.numel():
        with torch.cuda.device_of(dense):
            arguments = (dense, result, peak.view(torch.int32), peak if factor is None else factor)
            _note[_grid(dense)](*arguments, dense.numel(), factor is not None, _BLOCK, num_warps=_WARPS)
    return result


def _without_gaps(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose elements fill a stretch of memory in some order."""
    tensor = tensor.detach()
    dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    return tensor if dense else tensor.contiguous()


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), _BLOCK),)


@triton.jit(do_not_specialize=["factor"])
def _scale(gradients, results, factor, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(gradients + at, mask=inside, other=0).to(tl.float32) * tl.load(factor)
    finite = (values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INFINITY
    tl.store(results + at, tl.where(finite, values, 0.0).to(results.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["peak", "factor"])
def _note(gradients, results, peak, factor, count, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(gradients + at, mask=inside, other=0).to(tl.float32)
    # As integers, the bits of magnitudes are in the values' order, with NaN above all. No order of programs matters.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.atomic_max(peak, largest, sem="relaxed")
    if WRITE:
        tl.store(results + at, (values * tl.load(factor)).to(results.dtype.element_ty), mask=inside)
