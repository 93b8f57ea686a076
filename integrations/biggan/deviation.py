"""Minibatch standard deviation: a discriminator is shown how much pictures differ, which none of them tells.

A score of one picture at a time knows nothing of the others: a generator that draws the same one again and again gets
the score of that picture. Here every picture carries, in a channel of its own, the standard deviation of features over
its companions: those of its class in its group. Groups are runs of so many pictures in the batch's order, so that ranks
and micro-batches of whole groups see what one big batch sees, and real and generated pictures in one batch do not mix
if each of the two is whole groups.
"""

import torch
from torch import Tensor

from distopt.errors import SettingError

_EPSILON = 1e-8
"""Under the root, whose slope at 0 is infinite."""


def deviations(features: Tensor, group: int, classes: Tensor | None = None) -> Tensor:
    """The standard deviation of each channel over a picture's companions, itself among them, averaged over places.

    Args:
        features: ``(n, channels, H, W)``, or ``(n, channels)``.
        group: pictures a group, at least 2; n is a multiple of it.
        classes: int64 ``(n,)``; a companion is then of the same class, too. A picture that has none deviates by 0.

    Returns:
        ``(n, channels)``, equal for all companions and without a trace of their order.

    Raises:
        SettingError: the group is too small, or does not divide the pictures.

    Example:
        >>> features = torch.tensor([[1.0], [1.0], [3.0], [5.0]])
        >>> deviations(features, group=4, classes=torch.tensor([0, 1, 0, 1])).round(decimals=3).flatten()
        tensor([1., 2., 1., 2.])

    Source: Karras et al. 2018 (arXiv:1710.10196), section 3, where the mean over channels is one channel and companions
    are of any class.
    """
    count = len(features)
    if group < 2 or count % group:
        raise SettingError("group", group, f"at least 2, and a divisor of the {count} pictures")
    flat = features.flatten(1).unflatten(0, (-1, group))
    if classes is None:
        together = flat.new_ones(len(flat), group, group)
    else:
        grouped = classes.unflatten(0, (-1, group))
        together = (grouped[:, :, None] == grouped[:, None, :]).to(flat.dtype)
    mean_over = together / together.sum(2, keepdim=True)
    variance = mean_over @ (flat - mean_over @ flat).square()
    deviation = (variance + _EPSILON).sqrt() - _EPSILON**0.5
    return deviation.flatten(0, 1).unflatten(1, (features.shape[1], -1)).mean(2)


def with_deviation(features: Tensor, group: int, classes: Tensor | None = None) -> Tensor:
    """Features and, in one channel more, the mean of their `deviations`, alike at all places.

    Args:
        features: ``(n, channels, H, W)``.
        group: see `deviations`.
        classes: see `deviations`.

    Returns:
        ``(n, channels + 1, H, W)``.

    Raises:
        SettingError: see `deviations`.

    Example:
        >>> with_deviation(torch.rand(8, 3, 4, 4), group=4).shape
        torch.Size([8, 4, 4, 4])
    """
    spread = deviations(features, group, classes).mean(1)[:, None, None, None]
    return torch.cat([features, spread.expand(-1, 1, *features.shape[2:])], dim=1)
