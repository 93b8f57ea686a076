"""What low-rank reductions hand to one another: settings, factors, and the outcome of a bucket's rounds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.numerics.storage import StorageDtype
from distopt.reducers.energy import EnergyRank
from distopt.reducers.matrix import Layout, Matrix
from distopt.reducers.memory import Memory


class Factors(NamedTuple):
    """A low-rank matrix as all ranks have it, and as this rank put it in: all transposed.

    Of several matrices that are worked on together, they are stacked: ``(k, r, n)``.
    """

    left: Tensor  # Pᵀ, (r, n)
    right: Tensor  # Qᵀ, (r, m)
    own_left: Tensor
    own_right: Tensor


class Factorised(NamedTuple):
    """What the rounds of a bucket came to."""

    whole: Tensor  # the average of what is sent whole, in one piece
    factors: list[Factors]  # one a unit of work
    side: str  # which factors came last, "left" or "right"; the columns of the others are orthonormal
    last: Tensor  # all of these, averaged, as `Layout` lays them out
    stacks: Sequence[Tensor]  # these as `Layout.stacks` gives them
    following: Sequence[Tensor | None]  # by matrix: what the next step starts from, a column a direction; None: nothing


@dataclasses.dataclass(frozen=True)
class LowRankSettings:
    """What a plan needs to know of `PowerSGD`."""

    seed: int
    basis: str
    memory: Memory
    factor_dtype: StorageDtype | None
    wire_dtype: torch.dtype | None
    energy: EnergyRank | None


def overflows(outcome: Factorised, matrices: Sequence[Matrix], least_range: float) -> bool:
    """Whether any P Qᵀ has an element beyond the range of its gradient. Alike on all ranks, as both factors are.

    Args:
        outcome: of the rounds.
        matrices: one a unit of work: the first of it.
        least_range: the largest number of the narrowest dtype among the gradients.
    """
    columns = max(factors.left.shape[-2] for factors in outcome.factors)
    largest = float(torch.linalg.vector_norm(outcome.last, math.inf))
    if largest * columns * 2 < least_range:
        return False
    dtypes = [matrix.slot.parameter.dtype for matrix in matrices]
    products = ((f.left.mT @ f.right).to(dtype) for f, dtype in zip(outcome.factors, dtypes, strict=True))
    return not all(bool(torch.isfinite(product).all()) for product in products)


def norms_of(outcome: Factorised, layout: Layout, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    """Norms of P Qᵀ by parameter name: those of the factor that came last, as the other is orthonormal.

    Args:
        outcome: of the rounds.
        layout: of its factors.
        matrices: all that are laid out.
    """
    each = [torch.linalg.vector_norm(stack, dim=(1, 2)) for stack in outcome.stacks]
    norms: dict[str, Tensor] = {}
    for matrix, norm in zip(matrices, layout.each(each, outcome.side), strict=True):
        name = matrix.slot.name
        norms[name] = torch.hypot(norms[name], norm) if name in norms else norm
    return norms
