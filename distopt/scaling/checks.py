"""Looking at gradients where an optimizer will: are they finite, and in which unit?"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn


def count_non_finite(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Tell whether a gradient is not finite, without asking the device for an answer.

    Args:
        parameters: each with a ``.grad``, dense or sparse.
        device: of the answer.

    Returns:
        0-dimensional float32: 1 if there is a NaN or an infinity in any of them, 0 otherwise.

    Example:
        >>> parameter = nn.Parameter(torch.ones(2))
        >>> parameter.grad = torch.tensor([1.0, float("nan")])
        >>> count_non_finite([parameter], torch.device("cpu"))
        tensor(1.)
    """
    found = torch.zeros((), device=device)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        gradient = _piece(cast(Tensor, parameter.grad).detach())
        gradient = gradient._values() if gradient.is_sparse else gradient
        if gradient.numel() > 0:
            kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for gradients in kinds.values():
        norms = torch._foreach_norm(gradients, math.inf)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        largest = torch.stack([norm.float() for norm in norms])
        found = torch.maximum(found, (~torch.isfinite(largest)).any().to(device, torch.float32))
    return found


def widen(parameter: nn.Parameter, inverse: Tensor) -> None:
    """Make a gradient that is still scaled an unscaled one in float32, which does not underflow.

    Args:
        parameter: with a ``.grad``.
        inverse: 0-dimensional float32, one over the scale.
    """
    gradient = cast(Tensor, parameter.grad)
    parameter.grad = None
    if gradient.dtype != torch.float32:
        parameter.grad_dtype = None  # pyright: ignore[reportAttributeAccessIssue]  it may have another dtype now
    parameter.grad = gradient.float()
    _piece(parameter.grad).mul_(inverse)


def _piece(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, in its own memory; anything else as it is."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor
