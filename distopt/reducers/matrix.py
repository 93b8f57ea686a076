"""Gradients as matrices, and the payloads that hold the factors of many of them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.numerics.matricize import nearest_to_square
from distopt.reducers.memory import working_dtype
from distopt.reducers.reducer import Slot


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How one parameter's gradient, or one slice of a stacked one, is seen: as ``rows x columns``.

    Args:
        slot: the parameter.
        shape: rows and columns in the parameter's own order.
        rank: columns of the factors; the most there can be where the rank is adaptive.
        index: which slice along the first dimension.
        slices: how many there are.
    """

    slot: Slot
    shape: tuple[int, int]
    rank: int
    index: int = 0
    slices: int = 1

    @classmethod
    def of(cls, slot: Slot, rank: int | float, slices: int = 1) -> list["Matrix"]:
        """Matricise a parameter, slice by slice; a fractional ``rank`` is one of the smaller side."""
        first, *rest = slot.parameter.shape
        shape = nearest_to_square((first // slices, *rest))
        smaller = min(shape)
        columns = max(1, round(rank * smaller)) if isinstance(rank, float) else rank
        return [cls(slot, shape, min(columns, smaller), index, slices) for index in range(slices)]

    @property
    def key(self) -> str:
        """What its factors are kept under: the parameter's name, and the slice where there are several."""
        return self.slot.name if self.slices == 1 else f"{self.slot.name}[{self.index}]"

    @property
    def left(self) -> int:
        """Rows of P: the smaller side, which is cheaper to orthonormalise."""
        return min(self.shape)

    @property
    def right(self) -> int:
        """Rows of Q: the larger side."""
        return max(self.shape)

    def part(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor of the parameter's shape: a view."""
        if self.slices == 1:
            return tensor
        rows = self.slot.parameter.shape[0] // self.slices
        return tensor[self.index * rows : (self.index + 1) * rows]

    def rows(self, tensor: Tensor) -> Tensor:
        """The slice as a matrix in the parameter's own order: a view wherever the memory allows."""
        return self.part(tensor).reshape(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What it is compressed in."""
        return working_dtype(self.slot)


class Layout:
    """Where the factors of many matrices lie in one payload: transposed, those of one shape side by side.

    Transposed, because a column of a factor is then one piece of memory: products with few columns are several times
    as fast, and LAPACK need not turn anything.

    Args:
        matrices: sorted by `Layout.order`.
        ranks: columns of each one's factors in this step.
    """

    def __init__(self, matrices: Sequence[Matrix], ranks: Sequence[int]) -> None:
        shapes = [(m.left, m.right, rank) for m, rank in zip(matrices, ranks, strict=True)]
        self._groups = [(*shape, len(list(group))) for shape, group in itertools.groupby(shapes)]

    @staticmethod
    def order(matrix: Matrix) -> tuple[int, int, int]:
        """Key to sort matrices by, so that those of one shape are neighbours."""
        return matrix.left, matrix.right, matrix.rank

    def numel(self, side: str) -> int:
        """Numbers in all left (P) or right (Q) factors."""
        return sum(math.prod(shape) for shape in self._shapes(side))

    def stacks(self, payload: Tensor, side: str) -> list[Tensor]:
        """The payload as one ``(k, rank, rows)`` view for each group of ``k`` matrices of one shape."""
        shapes = self._shapes(side)
        parts = payload.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def views(self, payload: Tensor, side: str) -> list[Tensor]:
        """The payload as one ``(rank, rows)`` view a matrix."""
        return [factor for stack in self.stacks(payload, side) for factor in stack.unbind()]

    def _shapes(self, side: str) -> list[tuple[int, int, int]]:
        return [(count, rank, left if side == "left" else right) for left, right, rank, count in self._groups]
