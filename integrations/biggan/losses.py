"""The losses of a GAN: hinge, and the gradient penalty on real data. Scores are numbers of any shape.

Each takes ``reduction`` as torch's losses do. With ``distopt.accumulate`` use "sum": it divides by the whole window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distopt.errors import SettingError

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "none": lambda loss: loss}


def discriminator_hinge(real: Tensor, fake: Tensor, reduction: str = "mean") -> Tensor:
    """``max(0, 1 - D(x)) + max(0, 1 + D(G(z)))``: what the discriminator minimises.

    Args:
        real: scores of real data.
        fake: scores of generated data, of the same shape.
        reduction: "mean", "sum" or "none".

    Raises:
        SettingError: another reduction, or scores of different shapes, which would be broadcast.

    Example:
        >>> discriminator_hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])).item()
        1.25

    Source: Lim and Ye 2017 (arXiv:1705.02894); Brock et al. 2019 (arXiv:1809.11096), section 3.
    """
    if real.shape != fake.shape:
        raise SettingError("fake", tuple(fake.shape), f"scores of the shape of real, {tuple(real.shape)}")
    return _reduced((1 - real).relu() + (1 + fake).relu(), reduction)


def generator_hinge(fake: Tensor, reduction: str = "mean") -> Tensor:
    """``-D(G(z))``: what the generator minimises against a hinge.

    Args:
        fake: scores of generated data.
        reduction: "mean", "sum" or "none".

    Raises:
        SettingError: another reduction.

    Example:
        >>> generator_hinge(torch.tensor([2.0, 4.0])).item()
        -3.0
    """
    return _reduced(-fake, reduction)


def gradient_penalty(scores: Tensor, real: Tensor, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    """R1: ``gamma / 2 * |grad_x D(x)|^2`` of real data x, for each of them; itself differentiable.

    Args:
        scores: of real data, ``(n,)`` or ``(n, 1)``; each depends on its own row of ``real`` alone, or the slope at a
            row is that of the sum of all scores, as with minibatch standard deviation.
        real: ``(n, ...)``, which required gradients when it was scored.
        gamma: the weight.
        reduction: "mean", "sum" or "none".

    Raises:
        SettingError: another reduction, or scores that do not depend on ``real``.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> gradient_penalty(x @ torch.tensor([3.0, 4.0]), x, gamma=2.0).item()
        25.0

    Source: Mescheder et al. 2018 (arXiv:1801.04406), equation 9.
    """
    if not (real.requires_grad and scores.requires_grad):
        raise SettingError("real", "without gradient", "what required gradients when it was scored")
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return _reduced(gamma / 2 * slope.square().flatten(1).sum(1), reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in _REDUCTIONS:
        raise SettingError("reduction", reduction, f"one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[reduction](loss)
