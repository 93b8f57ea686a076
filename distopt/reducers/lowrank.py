"""The low-rank reduction of one bucket: two collectives, whatever it holds.

The first carries what is sent whole and the left factors P, the second the right factors Q. Symbols as in
`distopt.numerics.reference`; matrices of one shape are orthonormalised together.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.numerics.gaussian import seeded_gaussian
from distopt.numerics.matricize import nearest_to_square
from distopt.numerics.orthogonal import normalize_columns, orthogonalize
from distopt.reducers.allreduce import split_into
from distopt.reducers.reducer import Bucket, Plan, Proposal, Reduction, Slot, State


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How one parameter's gradient is seen: as ``rows x columns``, low-rank from the smaller side.

    Args:
        slot: the parameter.
        shape: rows and columns in the parameter's own order.
        rank: columns of the factors.
    """

    slot: Slot
    shape: tuple[int, int]
    rank: int

    @classmethod
    def of(cls, slot: Slot, rank: int | float) -> "Matrix":
        """Matricise a parameter; a fractional ``rank`` is one of the smaller side."""
        shape = nearest_to_square(slot.parameter.shape)
        smaller = min(shape)
        columns = max(1, round(rank * smaller)) if isinstance(rank, float) else rank
        return cls(slot, shape, min(columns, smaller))

    @property
    def dtype(self) -> torch.dtype:
        """What residual and factors are kept in: float64 for float64 gradients, else float32."""
        return torch.promote_types(self.slot.parameter.dtype, torch.float32)

    @property
    def left(self) -> tuple[int, int]:
        """Shape of P: the smaller side, which is cheaper to orthonormalise."""
        return min(self.shape), self.rank

    @property
    def right(self) -> tuple[int, int]:
        """Shape of Q: the larger side."""
        return max(self.shape), self.rank

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the gradient, and of its factors."""
        raw = self.slot.parameter.numel() * self.slot.parameter.element_size()
        return raw, sum(self.shape) * self.rank * self.dtype.itemsize

    def oriented(self, tensor: Tensor) -> Tensor:
        """The gradient or residual with its smaller side first: a view where memory allows."""
        matrix = tensor.reshape(self.shape)
        return matrix if self.shape[0] <= self.shape[1] else matrix.mT

    def deoriented(self, matrix: Tensor) -> Tensor:
        """The way back, to the parameter's shape."""
        matrix = matrix if self.shape[0] <= self.shape[1] else matrix.mT
        return matrix.reshape(self.slot.parameter.shape)


class _Pair(NamedTuple):
    """The factors of one matrix in one step."""

    left: Tensor  # P, (n, r), orthonormal, the same on all ranks
    own: Tensor  # Q of this rank's gradient, (m, r)
    right: Tensor  # Q averaged, (m, r)
    next: Tensor  # Q to start the next step from


class LowRankPlan(Plan):
    """PowerSGD on the matrices of a bucket, exact averaging of the rest.

    Args:
        matrices: one a slot; ``None`` for what is sent whole.
        seed: of the Gaussian that factors start from.
    """

    def __init__(self, matrices: Sequence[Matrix | None], seed: int) -> None:
        by_shape = sorted(
            (i for i, matrix in enumerate(matrices) if matrix is not None),
            key=lambda i: (matrices[i].left, matrices[i].right),  # type: ignore[reportOptionalMemberAccess]
        )
        self._compressed = by_shape
        self._matrices = [matrix for i in by_shape if (matrix := matrices[i]) is not None]
        self._whole = [i for i, matrix in enumerate(matrices) if matrix is None]
        self._groups = [list(group) for _, group in itertools.groupby(self._matrices, lambda m: (m.left, m.right))]
        self._optional = any(matrix.slot.optional for matrix in self._matrices)
        self._seed = seed
        raw, sent = zip(*(matrix.bytes for matrix in self._matrices), strict=True)
        self._bytes = sum(raw), sum(sent)

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        gradients = [bucket.gradients[i] for i in self._compressed]
        whole = [bucket.segments[i] for i in self._whole]
        inputs = [self._input(matrix, g, state) for matrix, g in zip(self._matrices, gradients, strict=True)]
        before = [self._factor(matrix, state) for matrix in self._matrices]
        present = self._present(gradients)

        sizes = [sum(s.numel() for s in whole), self._numel("left"), len(present)]
        payload = inputs[0].new_empty(sum(sizes))
        head, middle, tail = payload.split(sizes)
        if whole:
            head.copy_(torch.cat(whole))
        for m, q, p in zip(inputs, before, self._views(middle, "left"), strict=True):
            torch.mm(m, q, out=p)
        tail.copy_(torch.tensor(present))
        yield payload

        lefts = [p for stack in self._stacks(middle, "left") for p in orthogonalize(stack)]
        payload = payload.new_empty(self._numel("right"))
        for m, p, q in zip(inputs, lefts, self._views(payload, "right"), strict=True):
            torch.mm(m.mT, p, out=q)
        own = payload.clone()
        inputs.clear()  # their memory is not needed to commit
        yield payload

        renewed = [q for stack in self._stacks(payload, "right") for q in zip(*normalize_columns(stack), strict=True)]
        pairs = [
            _Pair(p, q_own, q, self._renew(matrix, old, *new, step=state.step))
            for matrix, p, q_own, q, old, new in zip(
                self._matrices,
                lefts,
                self._views(own, "right"),
                self._views(payload, "right"),
                before,
                renewed,
                strict=True,
            )
        ]
        if any(_overflows(pair, g.dtype) for pair, g in zip(pairs, gradients, strict=True)):
            return None
        somewhere = tail.tolist() if self._optional else [1.0] * len(pairs)

        def commit() -> None:
            split_into(whole, head)
            for matrix, pair, gradient, used in zip(self._matrices, pairs, gradients, somewhere, strict=True):
                if used:
                    _commit(matrix, pair, gradient, state)

        return Proposal(commit, self._bytes)

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return {matrix.slot.name: matrix.slot.parameter.shape for matrix in self._matrices}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.factor_shapes`."""
        return {matrix.slot.name: matrix.right for matrix in self._matrices}

    def _input(self, matrix: Matrix, gradient: Tensor, state: State) -> Tensor:
        """M: the gradient plus what was not sent before, ``(n, m)``."""
        residual = state.residuals.get(matrix.slot.name)
        return matrix.oriented(gradient.to(matrix.dtype) if residual is None else residual + gradient)

    def _factor(self, matrix: Matrix, state: State) -> Tensor:
        """Q of the step before, or its first draw."""
        factor = state.factors.get(matrix.slot.name)
        return self._draw(matrix, state.step) if factor is None else factor

    def _draw(self, matrix: Matrix, step: int) -> Tensor:
        gaussian = seeded_gaussian(*matrix.right, self._seed, matrix.slot.name, step)
        return normalize_columns(gaussian.to(matrix.slot.parameter.device, matrix.dtype))[0]

    def _renew(self, matrix: Matrix, old: Tensor, unit: Tensor, alive: Tensor, step: int) -> Tensor:
        """Q for the next step: dead columns drawn anew; a gradient of zero leaves Q alone."""
        if bool(alive.all()):
            return unit
        if not bool(alive.any()):
            return old
        return torch.where(alive, unit, self._draw(matrix, step + 1))

    def _present(self, gradients: Sequence[Tensor]) -> list[float]:
        """Which matrices have a gradient here, one number each; empty where every matrix must have one."""
        return [float(gradient.any()) for gradient in gradients] if self._optional else []

    def _numel(self, side: str) -> int:
        return sum(math.prod(getattr(matrix, side)) for matrix in self._matrices)

    def _stacks(self, payload: Tensor, side: str) -> list[Tensor]:
        """The payload as one ``(k, rows, rank)`` view for each group of ``k`` matrices of the same shape."""
        shapes = [(len(group), *getattr(group[0], side)) for group in self._groups]
        return [
            part.view(shape) for part, shape in zip(payload.split([math.prod(s) for s in shapes]), shapes, strict=True)
        ]

    def _views(self, payload: Tensor, side: str) -> list[Tensor]:
        return [factor for stack in self._stacks(payload, side) for factor in stack]


def _overflows(pair: _Pair, dtype: torch.dtype) -> bool:
    """Whether P Qᵀ has an element beyond the range of ``dtype``. Alike on all ranks, as both factors are."""
    limit = torch.finfo(dtype).max
    bound = torch.linalg.vector_norm(pair.left, dim=1).max() * torch.linalg.vector_norm(pair.right, dim=1).max()
    if bool(bound < limit):
        return False
    return not bool(torch.isfinite((pair.left @ pair.right.mT).to(dtype)).all())


def _commit(matrix: Matrix, pair: _Pair, gradient: Tensor, state: State) -> None:
    """Write the average into the gradient, and what this rank did not send into its residual."""
    name = matrix.slot.name
    if name in state.residuals:
        residual = state.residuals[name].add_(gradient)
    else:
        residual = state.residuals[name] = torch.empty(gradient.shape, dtype=matrix.dtype, device=gradient.device)
        residual.copy_(gradient)
    average = pair.left @ pair.right.mT
    error = matrix.oriented(residual).addmm_(pair.left, pair.own.mT, alpha=-1)
    rounded = average.to(gradient.dtype)
    if rounded.dtype != average.dtype:
        error.add_(average.sub_(rounded))
    gradient.copy_(matrix.deoriented(rounded))
    state.factors[name] = pair.next
