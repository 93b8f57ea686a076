"""Orthogonal weights: how they start, and what keeps their rows at right angles without saying how long they are.

====  ==========================================================================
W     a weight as a matrix ``(m, n)``: a row for each filter, what it looks at flat
R     ``beta * |W W^T * (1 - I)|_F^2``, the penalty
dR    ``4 * beta * (W W^T * (1 - I)) W``, its gradient
====  ==========================================================================

A well-known public implementation adds half of dR.

Source: Brock et al. 2019 (arXiv:1809.11096), section 3.1, equation 3; Saxe et al. 2014 (arXiv:1312.6120) for the start.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def start_orthogonal(model: nn.Module) -> nn.Module:
    """Draw every trained matrix and kernel anew, with orthogonal rows or columns of length 1, in place.

    Args:
        model: its vectors and numbers stay; vectors that spectral normalisation keeps are settled by `spectral.settle`.

    Returns:
        ``model``.

    Example:
        >>> layer = start_orthogonal(nn.Linear(8, 4))
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-5)
        True
    """
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.orthogonal_(parameter)
    return model


def off_diagonal(weight: Tensor) -> Tensor:
    """``W W^T`` without its diagonal, ``(m, m)``: how far the rows are from right angles.

    Args:
        weight: of two dimensions or more; the first are the filters.
    """
    rows = weight.flatten(1)
    products = rows @ rows.T
    return products - products.diagonal().diag()


def penalty(weight: Tensor, beta: float = 1e-4) -> Tensor:
    """The penalty R of one weight, differentiable.

    Example:
        >>> penalty(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), beta=0.5).item()
        1.0
    """
    return beta * off_diagonal(weight).square().sum()


@torch.no_grad()
def penalty_gradient(weight: Tensor, beta: float = 1e-4) -> Tensor:
    """The gradient of `penalty`, all of it, without autograd; of the weight's shape.

    Example:
        >>> weight = torch.randn(3, 2, 2, requires_grad=True)
        >>> penalty(weight, 0.1).backward()
        >>> torch.allclose(penalty_gradient(weight, 0.1), weight.grad, atol=1e-6)
        True
    """
    return (4 * beta * off_diagonal(weight) @ weight.flatten(1)).view_as(weight)


@torch.no_grad()
def add_penalty_gradient(parameters: Iterable[nn.Parameter], beta: float = 1e-4) -> None:
    """Add the penalty's gradient to ``.grad``, between ``backward`` and the optimizer's step.

    It is a function of the weights alone: added after gradients were averaged, it is the same on all ranks and is
    not compressed.

    Args:
        parameters: to regularise; those of fewer than two dimensions, and those without a gradient, are left out.
        beta: the weight of the penalty.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> before = layer.weight.grad.clone()
        >>> add_penalty_gradient(layer.parameters(), beta=0.1)
        >>> torch.allclose(layer.weight.grad - before, penalty_gradient(layer.weight, 0.1), atol=1e-5)
        True
    """
    for parameter in parameters:
        if parameter.dim() >= 2 and parameter.grad is not None:
            parameter.grad.add_(penalty_gradient(parameter, beta))
