"""The papers' equations as slow, readable lines: the oracle that every fast path is tested against.

All ranks are simulated in one process, in float64. Symbols, after Vogels et al. 2019 (arXiv:1905.13727), algorithm 1:
M_i is rank i's gradient plus its residual, ``(n, m)`` with n <= m; Q is the right factor ``(m, r)``, P the left one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PowerSGDStep(NamedTuple):
    """What one step of PowerSGD ends with."""

    average: Tensor  # (n, m): the same on all ranks
    residuals: list[Tensor]  # (n, m) each, one a rank
    factor: Tensor  # (m, r): columns not yet normalised


def householder(matrix: Tensor) -> Tensor:
    """Orthonormalise the columns of an ``(n, r)`` matrix, one reflection after the other.

    Example:
        >>> householder(torch.eye(3, 2, dtype=torch.float64)).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    rest = matrix.clone()
    rows, columns = rest.shape
    product = torch.eye(rows, dtype=rest.dtype)
    for j in range(columns):
        v = rest[:, j].clone()
        v[:j] = 0
        v[j] += math.copysign(float(v.norm()), float(v[j]))
        if float(v.norm()) == 0:
            continue
        v /= v.norm()
        rest -= 2 * torch.outer(v, v @ rest)
        product -= 2 * torch.outer(product @ v, v)
    return product[:, :columns]


class AlternatingStep(NamedTuple):
    """What one step of alternating power iterations ends with."""

    average: Tensor  # (n, m): the same on all ranks
    residuals: list[Tensor]  # (n, m) each, one a rank
    factor: Tensor  # (n, r) if P was sent, (m, r) if Q was: columns not yet normalised


def alternating(
    gradients: Sequence[Tensor], residuals: Sequence[Tensor], kept: Tensor, identity: float, *, send_left: bool
) -> AlternatingStep:
    """One step of ACP-SGD (Zhang et al. 2023, algorithm 1) with local error feedback: one factor is kept, one sent.

    Args:
        gradients: rank i's gradient at place i, ``(n, m)`` float64, n <= m.
        residuals: what rank i has not sent so far, ``(n, m)``.
        kept: Q, ``(m, r)``, if P is sent; P, ``(n, r)``, if Q is.
        identity: multiple of the identity relative to the largest column norm.
        send_left: whether P is sent.

    Example:
        >>> one = torch.ones(2, 3, dtype=torch.float64)
        >>> q = torch.full((3, 1), 3 ** -0.5, dtype=torch.float64)
        >>> step = alternating([one, 3 * one], [0 * one, 0 * one], q, 1e-6, send_left=True)
        >>> torch.allclose(step.average, 2 * one, atol=1e-5)
        True
    """
    inputs = [g + e for g, e in zip(gradients, residuals, strict=True)]
    basis = kept + identity * kept.norm(dim=0).max() * torch.eye(*kept.shape, dtype=kept.dtype)
    basis = householder(basis)
    local = [m @ basis if send_left else m.T @ basis for m in inputs]
    factor = torch.stack(local).sum(0) / len(inputs)

    def product(sent: Tensor) -> Tensor:
        return sent @ basis.T if send_left else basis @ sent.T

    return AlternatingStep(product(factor), [m - product(own) for m, own in zip(inputs, local, strict=True)], factor)


def power_sgd(
    gradients: Sequence[Tensor], residuals: Sequence[Tensor], factor: Tensor, identity: float
) -> PowerSGDStep:
    """One step of PowerSGD with local error feedback over all ranks.

    Args:
        gradients: rank i's gradient at place i, ``(n, m)`` float64, n <= m.
        residuals: what rank i has not sent so far, ``(n, m)``.
        factor: Q with unit columns, ``(m, r)``.
        identity: multiple of the identity relative to P's largest column norm.

    Example:
        >>> one = torch.ones(2, 3, dtype=torch.float64)
        >>> q = torch.full((3, 1), 3 ** -0.5, dtype=torch.float64)
        >>> torch.allclose(power_sgd([one, 3 * one], [0 * one, 0 * one], q, 1e-6).average, 2 * one, atol=1e-5)
        True
    """
    inputs = [g + e for g, e in zip(gradients, residuals, strict=True)]
    world = len(inputs)
    p = torch.stack([m @ factor for m in inputs]).sum(0) / world
    p += identity * p.norm(dim=0).max() * torch.eye(*p.shape, dtype=p.dtype)
    p = householder(p)
    local = [m.T @ p for m in inputs]
    q = torch.stack(local).sum(0) / world
    return PowerSGDStep(p @ q.T, [m - p @ q_i.T for m, q_i in zip(inputs, local, strict=True)], q)
