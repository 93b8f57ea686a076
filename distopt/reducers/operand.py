"""Gradient plus residual as one matrix, gone through in blocks of rows that stay in the processor's cache.

A step reads and writes memory many times more than it computes. So whatever can be done with a block is done at once:
its residual is added and the sum multiplied; what was sent is taken off it and the average written in its place.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.numerics.storage import Packed, Stored, unpack
from distopt.reducers.matrix import Matrix

BLOCK = 1 << 18
"""Elements that are worked on at a time: of float32, one MiB."""


class Operand:
    """The matrix M of one step: a gradient and what was not sent before, oriented with the smaller side first.

    Where the gradient has the working dtype, the sum is left in its memory; elsewhere it is formed anew in each pass,
    block by block, so that there is no room needed for it.

    Args:
        matrix: how the gradient is seen.
        gradient: in the parameter's shape.
        residual: to be added; ``None`` for nothing.
    """

    def __init__(self, matrix: Matrix, gradient: Tensor, residual: Stored | None) -> None:
        self.matrix = matrix
        self._whole = gradient
        self._rows = matrix.rows(gradient)
        self._is_view = _shares(self._rows, gradient)
        self._in_place = self._is_view and self._rows.dtype == matrix.dtype
        self._residual = None if residual is None else _rows_of(matrix, residual)
        self._blocks = _blocks(self._rows)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._rows.device

    def times_right(self, right: Tensor, out: Tensor) -> None:
        """P = M Q, transposed: ``right`` is Qᵀ, ``(r, m)``, and ``out`` is for Pᵀ, ``(r, n)``."""
        self._multiply(right, out, self.matrix.tall)

    def times_left(self, left: Tensor, out: Tensor) -> None:
        """Q = Mᵀ P, transposed: ``left`` is Pᵀ, ``(r, n)``, and ``out`` is for Qᵀ, ``(r, m)``."""
        self._multiply(left, out, not self.matrix.tall)

    def settle(self, left: Tensor, right: Tensor, own_left: Tensor, own_right: Tensor, room: Tensor) -> None:
        """Write P Qᵀ, the average, into the gradient, and what this rank has not sent into ``room``.

        Args:
            left: Pᵀ, ``(r, n)``.
            right: Qᵀ, ``(r, m)``.
            own_left: what this rank put into ``left``.
            own_right: what it put into ``right``.
            room: in the parameter's shape and the working dtype, contiguous; it may be the residual itself.
        """
        (first, second), (own_first, own_second) = self._oriented(left, right), self._oriented(own_left, own_right)
        errors = self.matrix.rows(room)
        for here in self._blocks:
            target, error = _cut(self._rows, here), _cut(errors, here)
            torch.addmm(self._sum(here), _cut(own_first, here), own_second, alpha=-1, out=error)
            if self._in_place:
                torch.mm(_cut(first, here), second, out=target)
                continue
            average = _cut(first, here) @ second
            target.copy_(average)
            if target.dtype != average.dtype:
                error.add_(average.sub_(target))
        if not self._is_view:
            part = self.matrix.part(self._whole)
            part.copy_(self._rows.view(part.shape))

    def subtract(self, own_left: Tensor, own_right: Tensor) -> None:
        """Leave what this rank has not sent in the gradient's own memory, which must hold M; `deliver` overwrites it.

        Args:
            own_left: what this rank put into Pᵀ.
            own_right: what it put into Qᵀ.
        """
        first, second = self._oriented(own_left, own_right)
        for here in self._blocks:
            self._sum(here).addmm_(_cut(first, here), second, alpha=-1)

    def deliver(self, left: Tensor, right: Tensor) -> None:
        """Write P Qᵀ, the average, into the gradient's own memory."""
        first, second = self._oriented(left, right)
        for here in self._blocks:
            torch.mm(_cut(first, here), second, out=_cut(self._rows, here))

    def norm(self) -> float:
        """Euclidean norm of M."""
        sums = (torch.linalg.vector_norm(self._sum(here), dtype=torch.float64) for here in self._blocks)
        return math.hypot(*map(float, sums))

    def _oriented(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product has the gradient's own orientation."""
        return (right.mT, left) if self.matrix.tall else (left.mT, right)

    def _multiply(self, factor: Tensor, out: Tensor, summing: bool) -> None:
        """``factor`` times the rows, which sums over them, or times their transposes."""
        for i, here in enumerate(self._blocks):
            block = self._sum(here)
            if here is None:
                torch.mm(factor, block if summing else block.mT, out=out)
            elif summing:
                out.addmm_(factor[:, here], block, beta=1 if i else 0)
            else:
                torch.mm(factor, block.mT, out=out[:, here])
        if self._in_place:
            self._residual = None

    def _sum(self, here: slice | None) -> Tensor:
        """Some rows of M; from then on in the gradient's own memory, if that has the working dtype."""
        rows, residual = _cut(self._rows, here), self._residual
        if residual is None:
            return rows if self._in_place else rows.to(self.matrix.dtype)
        if isinstance(residual, Packed):
            more = unpack(residual._replace(codes=_cut(residual.codes, here)), self.matrix.dtype)
        else:
            more = _cut(residual, here).to(self.matrix.dtype)
        return rows.add_(more) if self._in_place else more + rows


def _rows_of(matrix: Matrix, residual: Stored) -> Stored:
    if isinstance(residual, Packed):
        return residual._replace(codes=matrix.rows(residual.codes))
    return matrix.rows(residual)


def _blocks(rows: Tensor) -> Sequence[slice | None]:
    """Which rows to take at a time; ``None`` for all of them."""
    count, columns = rows.shape
    step = max(1, BLOCK // columns)
    if step >= count or rows.device.type != "cpu":
        return _ALL
    return [slice(begin, begin + step) for begin in range(0, count, step)]


_ALL = (None,)


def _cut(tensor: Tensor, here: slice | None) -> Tensor:
    return tensor if here is None else tensor[here]


def _shares(rows: Tensor, tensor: Tensor) -> bool:
    """Whether the rows are a view of the tensor's own memory."""
    return rows is tensor or rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
