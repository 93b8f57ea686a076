"""Clipping by the global norm, with what is known of it already."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_NOTHING = 1e-6
"""Added to the norm that is divided by, as `torch.nn.utils.clip_grad_norm_` does."""


@torch.no_grad()
def clip_(parameters: Mapping[str, nn.Parameter], known: Mapping[str, Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm, taken together, is at most ``max_norm``.

    Args:
        parameters: by name; those without a gradient are left out.
        known: norms of some of their gradients, 0-dimensional, by name.
        max_norm: above 0.

    Returns:
        The norm before.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(2))
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> clip_({"p": parameter}, {}, 1.0), parameter.grad.norm() < 1
        (tensor(5.), tensor(True))
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not gradients:
        return torch.tensor(0.0)
    unknown = [gradient for name, gradient in gradients.items() if name not in known]
    norms = [norm for name, norm in known.items() if name in gradients]
    norms += torch._foreach_norm(unknown) if unknown else []  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: torch.finfo(dtype).bits)
    wide = torch.promote_types(widest, torch.float32)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device, wide) for norm in norms]))
    factor = (max_norm / (total + _NOTHING)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor.to(gradient.device))
    return total
