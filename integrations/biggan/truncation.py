"""The truncation trick: noise whose numbers all lie within a threshold, drawn by drawing again what does not."""

import torch
from torch import Tensor

from distopt.errors import SettingError

LEAST = 0.01
"""The smallest threshold, of 125 draws one lies within."""


def truncated_normal(
    *shape: int,
    threshold: float | None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the standard normal distribution, given that no number is larger than a threshold.

    Every number that is larger is drawn again, until it is not; the others are those of the untruncated draw by the
    same generator. Clipping would put a mass on the threshold itself, and scaling would still reach beyond it.

    Args:
        shape: of the result.
        threshold: at least `LEAST`; ``None`` for no truncation.
        generator: the source of randomness; torch's own if ``None``.
        device: where to draw.
        dtype: of the result.

    Returns:
        A tensor of ``shape``, all of it in [-threshold, threshold].

    Raises:
        SettingError: the threshold is too small.

    Example:
        >>> noise = truncated_normal(1000, 8, threshold=0.5, generator=torch.Generator().manual_seed(0))
        >>> bool(noise.abs().max() <= 0.5), round(noise.var().item(), 2)
        (True, 0.08)

    Source: Brock et al. 2019 (arXiv:1809.11096), section 3.1.
    """
    if threshold is not None and (not isinstance(threshold, int | float) or not threshold >= LEAST):
        raise SettingError("threshold", threshold, f"None or a number of at least {LEAST}")
    noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    if threshold is None:
        return noise
    flat = noise.view(-1)
    outside = (flat.abs() > threshold).nonzero().squeeze(1)
    while outside.numel():
        flat[outside] = torch.randn(outside.numel(), generator=generator, device=device, dtype=dtype)
        outside = outside[flat[outside].abs() > threshold]
    return noise
