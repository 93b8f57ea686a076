"""Gradients as matrices, and the payloads that hold the factors of many of them."""

import dataclasses
import functools
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

    @functools.cached_property
    def key(self) -> str:
        """What its factors are kept under: the parameter's name, and the slice where there are several."""
        return self.slot.name if self.slices == 1 else f"{self.slot.name}[{self.index}]"

    @functools.cached_property
    def left(self) -> int:
        """Rows of P: the smaller side, which is cheaper to orthonormalise."""
        return min(self.shape)

    @functools.cached_property
    def right(self) -> int:
        """Rows of Q: the larger side."""
        return max(self.shape)

    @functools.cached_property
    def tall(self) -> bool:
        """Whether the parameter's own order has the larger side first."""
        return self.shape[0] > self.shape[1]

    def part(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor of the parameter's shape: a view."""
        if self.slices == 1:
            return tensor
        rows = self.slot.parameter.shape[0] // self.slices
        return tensor[self.index * rows : (self.index + 1) * rows]

    def rows(self, tensor: Tensor) -> Tensor:
        """The slice as a matrix in the parameter's own order: a view wherever the memory allows."""
        if self.slices == 1 and tensor.shape == self.shape:
            return tensor
        return self.part(tensor).reshape(self.shape)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """What it is compressed in."""
        return working_dtype(self.slot)


class Layout:
    """Where the factors of many matrices lie in one payload: transposed, those of one shape side by side.

    Transposed, because a column of a factor is then one piece of memory: products with few columns are several times
    as fast, and LAPACK need not turn anything.

    Args:
        matrices: in any order.
        ranks: columns of each one's factors in this step.
        units: which matrices are worked on together, each in one unit; those of one are equal in shape and rank, and
            follow one another among their equals. Each alone if ``None``.
    """

    def __init__(
        self, matrices: Sequence[Matrix], ranks: Sequence[int], units: Sequence[Sequence[int]] | None = None
    ) -> None:
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for index, (matrix, rank) in enumerate(zip(matrices, ranks, strict=True)):
            alike.setdefault((matrix.shape, rank), []).append(index)
        order = [index for group in alike.values() for index in group]
        units = [[index] for index in range(len(matrices))] if units is None else units
        self._sides = {
            "left": _Side([(rank, m.left) for m, rank in zip(matrices, ranks, strict=True)], order, units),
            "right": _Side([(rank, m.right) for m, rank in zip(matrices, ranks, strict=True)], order, units),
        }

    def numel(self, side: str) -> int:
        """Numbers in all left (P) or right (Q) factors."""
        return sum(self._sides[side].sizes)

    def gather(self, factors: Sequence[Tensor], side: str) -> Tensor:
        """A payload of factors as they are, ``(rows, rank)`` each, one a matrix."""
        return torch.cat([factors[i].mT.reshape(-1) for i in self._sides[side].order])

    def stacks(self, payload: Tensor, side: str) -> list[Tensor]:
        """The payload as one ``(k, rank, rows)`` view for each group of ``k`` factors of one shape."""
        places = self._sides[side]
        parts = [payload] if len(places.sizes) == 1 else payload.split_with_sizes(places.sizes)
        return [part.view(shape) for part, shape in zip(parts, places.shapes, strict=True)]

    def each(self, stacks: Sequence[Tensor], side: str) -> list[Tensor]:
        """What `stacks` gave, or what was made of each of them, by matrix."""
        parts = [part for stack in stacks for part in stack.unbind()]
        return [parts[i] for i in self._sides[side].places]

    def by_unit(self, stacks: Sequence[Tensor], side: str) -> list[Tensor]:
        """The same by unit: ``(k, ...)`` for several matrices, ``(...)`` for one."""
        places = self._sides[side]
        parts: list[Tensor] = []
        for stack, lengths in zip(stacks, places.lengths, strict=True):
            if len(lengths) == 1:
                parts.append(stack if lengths[0] > 1 else stack[0])
            elif max(lengths) == 1:
                parts += stack.unbind()
            else:
                parts += [part if len(part) > 1 else part[0] for part in stack.split_with_sizes(lengths)]
        return [parts[i] for i in places.unit_places]

    def views(self, payload: Tensor, side: str) -> list[Tensor]:
        """The payload as one ``(rank, rows)`` or ``(k, rank, rows)`` view a unit."""
        start = payload.storage_offset()
        views = self._sides[side].views
        return [payload.as_strided(shape, strides, start + offset) for shape, strides, offset in views]


class _Side:
    """How the factors of one side are arranged, given the shape of each and the order within those of one shape."""

    def __init__(self, shapes: Sequence[tuple[int, int]], order: Sequence[int], units: Sequence[Sequence[int]]) -> None:
        groups: dict[tuple[int, int], list[int]] = {}
        for index in order:
            groups.setdefault(shapes[index], []).append(index)
        self.shapes = [(len(group), *shape) for shape, group in groups.items()]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.order = [index for group in groups.values() for index in group]
        self.places = [self.order.index(index) for index in range(len(shapes))]
        first = {unit[0]: unit for unit in units}
        begun = [[index for index in group if index in first] for group in groups.values()]
        self.lengths = [[len(first[index]) for index in group] for group in begun]
        pieces = [index for group in begun for index in group]
        self.unit_places = [pieces.index(unit[0]) for unit in units]
        starts: dict[int, int] = {}
        for index in self.order:
            starts[index] = sum(math.prod(shapes[before]) for before in starts)
        self.views = [_view(len(unit), *shapes[unit[0]], starts[unit[0]]) for unit in units]


def _view(count: int, rank: int, rows: int, start: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of a unit in a payload."""
    return ((rank, rows), (rows, 1), start) if count == 1 else ((count, rank, rows), (rank * rows, rows, 1), start)
