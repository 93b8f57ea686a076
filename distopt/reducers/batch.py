"""Small matrices of one shape, worked on together: they lie at a constant stride in their bucket, so nothing is copied.

What a small matrix costs is not its memory but its operations, some microseconds each. The layers of a network repeat,
so their parameters lie in a bucket like the rows of a matrix: one batched product does for all of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.numerics.storage import unpack
from distopt.reducers.matrix import Matrix
from distopt.reducers.memory import Memory
from distopt.reducers.operand import BLOCK
from distopt.reducers.reducer import Bucket, Slot, State


class Member(NamedTuple):
    """A matrix that is a whole parameter, and where that is in its bucket."""

    number: int  # among the plan's matrices
    place: int  # among the bucket's gradients
    offset: int  # elements before it
    matrix: Matrix


class Batch:
    """The matrices M of one step, as `distopt.reducers.operand.Operand` has a single one; factors are ``(k, r, n)``.

    Args:
        matrix: how each gradient is seen.
        rows: the gradients, ``(k, rows, columns)``.
        residual: to be added, of the same shape in the working dtype; ``None`` for nothing.
    """

    def __init__(self, matrix: Matrix, rows: Tensor, residual: Tensor | None) -> None:
        self.matrix = matrix
        self._rows = rows
        self._residual = residual
        self._in_place = rows.dtype == matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._rows.device

    def times_right(self, right: Tensor, out: Tensor) -> None:
        """See `Operand.times_right`."""
        rows = self._sum()
        torch.bmm(right, rows if self.matrix.tall else rows.mT, out=out)

    def times_left(self, left: Tensor, out: Tensor) -> None:
        """See `Operand.times_left`."""
        rows = self._sum()
        torch.bmm(left, rows.mT if self.matrix.tall else rows, out=out)

    def settle(self, left: Tensor, right: Tensor, own_left: Tensor, own_right: Tensor, room: Tensor) -> None:
        """See `Operand.settle`; ``room`` is ``(k, rows, columns)``."""
        tall, rows = self.matrix.tall, self._rows
        first, second = (right.mT, left) if tall else (left.mT, right)
        own_first, own_second = (own_right.mT, own_left) if tall else (own_left.mT, own_right)
        if first.shape[-1] == 1:  # in one pass each, which a product is not
            torch.addcmul(self._sum(), own_first, own_second, value=-1, out=room)
        else:
            torch.baddbmm(self._sum(), own_first, own_second, alpha=-1, out=room)
        if self._in_place and first.shape[-1] == 1:
            torch.mul(first, second, out=rows)
            return
        if self._in_place:
            torch.bmm(first, second, out=rows)
            return
        average = torch.bmm(first, second)
        rows.copy_(average)
        room.add_(average.sub_(rows))

    def norms(self) -> list[float]:
        """Euclidean norm of each M."""
        return _norms(self._sum())

    def _sum(self) -> Tensor:
        """M; from then on in the gradients' own memory, if they have the working dtype."""
        residual = self._residual
        if residual is None:
            return self._rows if self._in_place else self._rows.to(self.matrix.dtype)
        if not self._in_place:
            return residual + self._rows
        self._residual = None
        return self._rows.add_(residual)


class Run:
    """Matrices of one shape at a constant stride, and the room where their residuals lie side by side.

    Args:
        members: at least two, in the order of their offsets.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.matrix = members[0].matrix
        self.indices = [member.number for member in members]
        self._shape = (len(members), *self.matrix.shape)
        self._strides = (members[1].offset - members[0].offset, self.matrix.shape[1], 1)
        self._room: Tensor | None = None
        self._views: list[Tensor] = []

    def lies_in(self, bucket: Bucket) -> bool:
        """Whether the bucket is laid out as was planned: what a trainer hands over may be transposed in memory."""
        if bucket.flat is None:
            return False
        start, gradients = bucket.flat.storage_offset(), bucket.gradients
        return all(
            gradients[m.place].storage_offset() == start + m.offset and gradients[m.place].is_contiguous()
            for m in self.members
        )

    def take(self, bucket: Bucket, state: State) -> Batch:
        """These gradients of a bucket that they lie in."""
        flat = bucket.flat
        assert flat is not None
        rows = flat.as_strided(self._shape, self._strides, flat.storage_offset() + self.members[0].offset)
        return Batch(self.matrix, rows, self._residual(state))

    def room(self, state: State) -> Tensor:
        """Where the new residuals may be written: over the old ones, if those lie here."""
        if self._room is None or not self._is_kept(state):
            first = self.matrix.slot.parameter
            self._room = torch.empty(self._shape, dtype=self.matrix.dtype, device=first.device)
            parameters = [member.matrix.slot.parameter for member in self.members]
            self._views = [part.view(p.shape) for part, p in zip(self._room.unbind(), parameters, strict=True)]
        return self._room

    def keep(self, state: State) -> list[float] | None:
        """Remember what was written into `room`.

        Returns:
            Its norms, where this step is measured.
        """
        for member, view in zip(self.members, self._views, strict=True):
            state.residuals[member.matrix.slot.name] = view
        return None if self._room is None or state.figures is None else _norms(self._room)

    def _residual(self, state: State) -> Tensor | None:
        if self._room is not None and self._is_kept(state):
            return self._room
        kept = [state.residuals.get(member.matrix.slot.name) for member in self.members]
        if all(one is None for one in kept):
            return None
        # Of another plan, or out of a checkpoint: what is left behind goes to this plan's room when the step is taken.
        stack = torch.zeros(self._shape, dtype=self.matrix.dtype, device=self.matrix.slot.parameter.device)
        for row, one in zip(stack, kept, strict=True):
            if one is not None:
                row.copy_(unpack(one, self.matrix.dtype).reshape(row.shape))
        return stack

    def _is_kept(self, state: State) -> bool:
        residuals = state.residuals
        return all(residuals.get(m.matrix.slot.name) is view for m, view in zip(self.members, self._views, strict=True))


def planned_runs(slots: Sequence[Slot], matrices: Sequence[Sequence[Matrix]], memory: Memory) -> list[Run]:
    """Find what can be worked on together wherever a bucket's gradients lie in one piece; all ranks alike.

    Args:
        slots: of the bucket.
        matrices: one list a slot; empty for what is sent whole.
        memory: residuals are written where they are kept only if that is in the working dtype.
    """
    members: list[Member] = []
    number = offset = 0
    for place, (slot, of_slot) in enumerate(zip(slots, matrices, strict=True)):
        if len(of_slot) == 1 and not slot.optional and memory.dtype in (None, of_slot[0].dtype):
            members.append(Member(number, place, offset, of_slot[0]))
        number, offset = number + len(of_slot), offset + slot.parameter.numel()
    return runs_of(members)


def runs_of(members: Sequence[Member], block: int = BLOCK) -> list[Run]:
    """Find what can be worked on together.

    Args:
        members: of one bucket.
        block: elements that are worked on at a time; a larger matrix is left alone.

    Returns:
        Runs of at least two matrices of one shape, rank and dtype each; no matrix is in two of them.
    """
    alike: dict[tuple[tuple[int, int], int, torch.dtype], list[Member]] = {}
    for member in members:
        matrix = member.matrix
        alike.setdefault((matrix.shape, matrix.rank, matrix.slot.parameter.dtype), []).append(member)
    runs: list[Run] = []
    for (shape, _, _), group in alike.items():
        most = block // math.prod(shape)
        run: list[Member] = []
        for member in sorted(group, key=lambda m: m.offset):
            steady = len(run) < 2 or member.offset - run[-1].offset == run[1].offset - run[0].offset
            if run and (not steady or len(run) >= most):
                runs += [Run(run)] if len(run) > 1 else []
                run = []
            run.append(member)
        runs += [Run(run)] if len(run) > 1 else []
    return runs


def _norms(stack: Tensor) -> list[float]:
    return torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64).tolist()
