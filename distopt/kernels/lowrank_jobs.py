"""What each program of `distopt.kernels.lowrank` works on, as tables that are made once.

A line of a table for `multiply`, in integers of 64 bits: the places of gradient and residual, rows, columns, rank, the
places of the known factor and of the wanted one, where partial results lie, the matrix's first program, its tiles
along the kept side, chunks of the rank, the length of a strip, how many strips there are, and the number of its
residual's power of two. Of one for `settle`: the first five, the places of Pᵀ and Qᵀ, the first program, the seed of
the draws, and the same number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right"]

LINE = 16
"""Numbers in a line, unused ones included."""

UNIT = 8
"""Elements that sizes and places of most matrices are multiples of: 16 bytes of a 16-bit format."""

PROGRAMS = 1024
"""Programs that a launch should have at least: some for each of an H200's 132 processors. The same on every device, as
the order of a sum depends on it."""

LONGEST = 4096
"""Elements along a strip, at most."""

GATHERED = 1024
"""Elements that a program of `gather` sums."""


FLAGS = 3
"""Whether what is averaged is finite: what is sent whole and first factors; last factors; their product. Beyond them
lie the bits of the largest magnitude in each parameter's M, for forms that need it."""


class Piece(NamedTuple):
    """A matrix: where it lies, and its factors, in elements.

    Args:
        gradient: before it, in the bucket.
        residual: before it, among the residuals.
        rows: of the matrix, in the parameter's own order.
        columns: likewise.
        rank: columns of the factors.
        left: before Pᵀ, ``(rank, min(rows, columns))``, in a payload.
        right: before Qᵀ, ``(rank, max(rows, columns))``.
        seed: of its residual's rounding.
        scale: the number of its residual's power of two. Matrices that share one follow each other, and have one rank.
    """

    gradient: int
    residual: int
    rows: int
    columns: int
    rank: int
    left: int
    right: int
    seed: int = 0
    scale: int = 0

    @property
    def tall(self) -> bool:
        """Whether Q, the larger factor, is on the side of the rows."""
        return self.rows > self.columns

    @property
    def unit(self) -> int:
        """What its places and sizes are multiples of."""
        numbers = (self.gradient, self.residual, self.rows, self.columns)
        return UNIT if all(number % UNIT == 0 for number in numbers) else 1


class Table(NamedTuple):
    """Work for one launch.

    Args:
        lines: int64, ``(matrices, LINE)``.
        numbers: int32, which line is for a program.
        programs: how many there are.
    """

    lines: Tensor
    numbers: Tensor
    programs: int


class Cut(NamedTuple):
    """How a product is cut into programs: their tile, and the columns of a factor that one takes."""

    kept: int
    summed: int
    rank: int


class Products(NamedTuple):
    """The tables of one product for one group of matrices.

    Args:
        cut: see `Cut`.
        work: of `multiply`.
        sums: of `gather`; ``None`` if no matrix is cut into strips.
        partial: elements of room that strips need.
        chunks: the most that the rank of any matrix is cut into.
    """

    cut: Cut
    work: Table
    sums: Table | None
    partial: int
    chunks: int


class Group(NamedTuple):
    """Matrices of one launch, and how they are cut."""

    tall: bool
    unit: int
    place: int
    products: dict[Side, Products]
    tile: tuple[int, int, int]  # rows, columns, columns of the factors that are taken at a time
    warps: int
    tiles: Table


def grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Matrices that go into one launch: of one orientation, and equally aligned."""
    groups: dict[tuple[bool, int], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.tall, piece.unit), []).append(piece)
    return list(groups.values())


def place_unit(pieces: Sequence[Piece]) -> int:
    """What the places of their factors are multiples of."""
    return 4 if all(piece.left % 4 == 0 and piece.right % 4 == 0 for piece in pieces) else 1


def products(pieces: Sequence[Piece], side: Side, device: torch.device) -> Products:
    """Cut the products for one side of a group.

    Args:
        pieces: of one group.
        side: which factor is wanted.
        device: where the tables go.
    """
    widest = max(piece.rank for piece in pieces)
    rank = min(128, max(16, 1 << (widest - 1).bit_length()))
    unit, place, down = pieces[0].unit, place_unit(pieces), pieces[0].tall == (side == "left")
    # Addresses of single elements take registers, and so do sums of many columns.
    cut = Cut(64, 64 if unit > 1 and rank <= 32 else 32, rank)
    chunks = -(-widest // rank)
    elements = sum(piece.rows * piece.columns for piece in pieces) * chunks
    least = max(256, 8 * min(rank, 64))
    strip = min(LONGEST, max(least, _up(-(-elements // (PROGRAMS * cut.kept)), cut.summed)))
    lines: list[list[int]] = []
    sums: list[list[int]] = []
    programs = summing = partial = 0
    counts: list[int] = []
    sum_counts: list[int] = []
    for piece in pieces:
        summed, kept = (piece.rows, piece.columns) if down else (piece.columns, piece.rows)
        tiles, parts, strips = -(-kept // cut.kept), -(-piece.rank // rank), -(-summed // strip)
        known, wanted = (piece.right, piece.left) if side == "left" else (piece.left, piece.right)
        places = [piece.gradient // unit, piece.residual // unit, piece.rows // unit, piece.columns // unit]
        lines.append(
            [
                *places,
                piece.rank,
                known // place,
                wanted // place,
                partial,
                programs,
                tiles,
                parts,
                strip // unit,
                strips,
                piece.scale,
            ]
        )
        counts.append(tiles * parts * strips)
        programs += counts[-1]
        if strips > 1:
            count = piece.rank * kept
            sums.append([count, wanted, partial, strips, summing])
            sum_counts.append(-(-count // GATHERED))
            summing += sum_counts[-1]
            partial += _up(count * strips, UNIT)
    gathering = _table(sums, sum_counts, device) if sums else None
    return Products(cut, _table(lines, counts, device), gathering, partial, chunks)


def tiled(pieces: Sequence[Piece], rows: int, columns: int, device: torch.device) -> Table:
    """Cut the matrices of a group into tiles.

    Args:
        pieces: of one group.
        rows: of a tile.
        columns: of a tile.
        device: where the table goes.
    """
    unit, place = pieces[0].unit, place_unit(pieces)
    lines: list[list[int]] = []
    counts: list[int] = []
    for piece in pieces:
        places = [piece.gradient // unit, piece.residual // unit, piece.rows // unit, piece.columns // unit]
        factors = [piece.left // place, piece.right // place]
        lines.append([*places, piece.rank, *factors, sum(counts), piece.seed, piece.scale])
        counts.append(-(-piece.rows // rows) * -(-piece.columns // columns))
    return _table(lines, counts, device)


def by_column(pieces: Sequence[Piece], side: Side, seeds: Sequence[int], device: torch.device) -> Table:
    """A line for each column of the factors of one side, in the order in which they lie.

    Args:
        pieces: all of a payload.
        side: which factors.
        seeds: of the draws, one a matrix.
        device: where the table goes.
    """
    place: Callable[[Piece], int] = (lambda p: p.left) if side == "left" else (lambda p: p.right)
    length: Callable[[Piece], int] = (
        (lambda p: min(p.rows, p.columns)) if side == "left" else (lambda p: max(p.rows, p.columns))
    )
    lines: list[list[int]] = []
    for piece, seed in sorted(zip(pieces, seeds, strict=True), key=lambda pair: place(pair[0])):
        first = len(lines)
        for column in range(piece.rank):
            lines.append([place(piece) + column * length(piece), length(piece), first, piece.rank, seed])
    return _table(lines, [1] * len(lines), device)


def by_pair(pieces: Sequence[Piece], device: torch.device) -> tuple[Table, Table]:
    """A line for each column of P and the one of Q that belongs to it; and one for each power of two.

    Args:
        pieces: all of a payload.
        device: where the tables go.
    """
    pairs: list[list[int]] = []
    scales: list[list[int]] = []
    for piece in pieces:
        short, long = sorted((piece.rows, piece.columns))
        if piece.scale == len(scales):
            scales.append([len(pairs), piece.rank, 0])
        scales[piece.scale][2] += 1
        pairs += [[piece.left + i * short, short, piece.right + i * long, long] for i in range(piece.rank)]
    return _table(pairs, [1] * len(pairs), device), _table(scales, [1] * len(scales), device)


def group_of(pieces: Sequence[Piece], device: torch.device) -> Group:
    """Cut matrices that `grouped` put together."""
    tile, warps = _tile(max(piece.rank for piece in pieces), pieces[0].unit)
    tables: dict[Side, Products] = {side: products(pieces, side, device) for side in ("left", "right")}
    table = tiled(pieces, *tile[:2], device)
    return Group(pieces[0].tall, pieces[0].unit, place_unit(pieces), tables, tile, warps, table)


def _tile(rank: int, unit: int) -> tuple[tuple[int, int, int], int]:
    """Rows and columns that a program of `settle` works on, the columns of factors at a time, and its warps.

    Two products are held in registers beside M, so there is not much choice.
    """
    if unit == 1:
        return (64, 32, 16), 4
    return ((64, 64, 16), 4) if rank <= 64 else ((64, 128, 16), 8)


def _table(lines: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device) -> Table:
    padded = torch.tensor([[*line, *[0] * (LINE - len(line))] for line in lines], dtype=torch.int64)
    numbers = torch.arange(len(lines), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return Table(padded.to(device), numbers.to(device), sum(counts))


def _up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
