"""Clipping by the global norm, with what is known of it already."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distopt.attach.shards import Shards

_NOTHING = 1e-6
"""Added to the norm that is divided by, as `torch.nn.utils.clip_grad_norm_` does."""


@torch.no_grad()
def clip_(
    gradients: Mapping[str, Tensor], known: Mapping[str, Tensor], max_norm: float, shards: Shards | None = None
) -> Tensor:
    """Scale gradients so that their norm, taken together, is at most ``max_norm``.

    Args:
        gradients: by name.
        known: norms of some of them, 0-dimensional, by name.
        max_norm: above 0.
        shards: whose pieces they are, if they are.

    Returns:
        The norm before.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> clip_({"p": gradient}, {}, 1.0), gradient.norm() < 1
        (tensor(5.), tensor(True))
    """
    if not gradients:
        return torch.tensor(0.0) if shards is None else shards.norm(torch.tensor(0.0))
    unknown = [gradient for name, gradient in gradients.items() if name not in known]
    norms = [norm for name, norm in known.items() if name in gradients]
    norms += torch._foreach_norm(unknown) if unknown else []  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    widest = max((norm.dtype for norm in norms), key=lambda dtype: torch.finfo(dtype).bits)
    wide = torch.promote_types(widest, torch.float32)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device, wide) for norm in norms]))
    total = total if shards is None else shards.norm(total)
    factor = (max_norm / (total + _NOTHING)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor.to(gradient.device))
    return total
