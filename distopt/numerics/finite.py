"""Is everything in a tensor a finite number?"""

import cmath
import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` holds neither NaN nor infinity.

    A NaN or an infinity always makes the sum non-finite, so one pass without a temporary settles the common case; only
    when the sum itself overflowed are the elements looked at one by one.

    Args:
        tensor: any shape, floating point or complex. Reads the values on the host: on an accelerator it synchronises.

    Returns:
        Whether every element is finite; ``True`` for an empty tensor.

    Example:
        >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, float("inf")]))
        (True, False)
    """
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if cmath.isfinite(tensor.sum(dtype=wide).item()):
        return True
    return bool(torch.isfinite(tensor).all())


def largest(tensor: Tensor) -> Tensor:
    """The largest absolute value of a tensor: finite exactly if all of them are.

    Unlike `all_finite` it asks nothing of an accelerator: many of them can be looked at in the end, at once.

    Args:
        tensor: any shape, floating point or complex.

    Returns:
        0-dimensional, real, of the same precision and on the same device; 0 for an empty tensor.

    Example:
        >>> largest(torch.tensor([1.0, -2.0])).item(), largest(torch.tensor([1.0, float("nan")])).item()
        (2.0, nan)
    """
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    return torch.linalg.vector_norm(tensor, math.inf)
