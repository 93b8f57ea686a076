"""Orthonormal columns of tall thin matrices, by a tree of Householder factorisations.

Matrices are given transposed, ``(r, n)``, so that a column is contiguous. The rows after the first r are cut into
blocks that one program holds in registers; each is factorised, and the triangles of all blocks of a matrix, with its
first r rows before them, are the rows of the next level, until one block holds them all. Q is formed on the way back.
Two launches a level, whatever the number of matrices and of their rows.

Source: Demmel, Grigori, Hoemmen and Langou 2012, "Communication-optimal parallel and sequential QR and LU
factorizations", SIAM J. Sci. Comput. 34(1), section 3; Schreiber and Van Loan 1989 for I - V T Vᵀ.
"""

# Triton's language has no types, and a launch no signature.
# pyright: basic, reportCallIssue=false, reportArgumentType=false

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1 << 14
"""Numbers of a block that one program factorises: 64 registers of each thread of 8 warps."""

FORMED = 128
"""Rows of Q that one program forms."""

WIDEST = 32
"""Columns up to which a matrix is one panel."""

TINY = tl.constexpr(1e-30)
"""A remainder whose square is below this, its whole column being about 1, is taken for zero."""

FIELDS = tl.constexpr(13)
"""Numbers that a level's table holds for each matrix, in the order of `Geometry`."""


class Place(NamedTuple):
    """Where a transposed matrix lies: numbers before it in its tensor, numbers from one column to the next, rows."""

    offset: int
    stride: int
    rows: int


class Geometry(NamedTuple):
    """What a level has to know of one matrix; offsets are in numbers."""

    source: int  # of this level's rows
    source_stride: int
    rows: int
    target: int  # of Q's rows of this level
    target_stride: int
    reflectors: int  # the columns of V, as long as there are rows
    inner: int  # T of the first block
    first: int  # the number of the first block, over all matrices
    above: int  # of the next level's rows
    above_stride: int
    above_target: int  # of Q's rows of the next level
    powers: int  # of two, which this level's numbers are to be multiplied with: as many, in float32
    above_powers: int


@triton.jit
def exponent_of(x):
    """The power of two below a number's size."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(k):
    """Two to the power of an integer, within the normal numbers of float32."""
    k = tl.minimum(tl.maximum(k, -126), 126)
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reflect(tile, rank, R: tl.constexpr, B: tl.constexpr):
    """Factorise a block, ``(R, B)``: reflectors below the diagonal, R above; R's diagonal; Tᵀ, with Q = I - V T Vᵀ.

    A reflector is 1 on the diagonal, or 0 where there is nothing to reflect. Its factor, tau, has to fit its length to
    the last bit, or Q's columns are not of length 1: so that length is summed in float64.
    """
    column = tl.arange(0, R)
    across = tl.arange(0, R)
    row = tl.arange(0, B)
    diagonal = tl.zeros([R], tl.float32)
    inner = tl.zeros([R, R], tl.float32)
    for j in range(rank):
        mine = column == j
        x = tl.sum(tl.where(mine[:, None], tile, 0.0), 0)
        head = tl.sum(tl.where(row == j, x, 0.0), 0)
        beyond = tl.where(row > j, x, 0.0).to(tl.float64)
        tail = tl.sum(beyond * beyond, 0)
        square = (head * head + tail).to(tl.float32)
        nothing = square < TINY
        length = tl.sqrt_rn(square)
        beta = tl.where(nothing, head, tl.where(head >= 0, -length, length))
        scale = tl.where(nothing, 0.0, tl.div_rn(1.0, tl.where(nothing, 1.0, head - beta)))
        one = tl.where(nothing, 0.0, 1.0)
        v = tl.where(row > j, x * scale, tl.where(row == j, one, 0.0))
        wide = scale.to(tl.float64)
        tau = one * (2.0 / (1.0 + tail * wide * wide)).to(tl.float32)
        tile = tl.where(mine[:, None], tl.where(row < j, x, v)[None, :], tile)
        w = tl.sum(tile * v[None, :], 1)
        tile -= (tau * tl.where(column > j, w, 0.0))[:, None] * v[None, :]
        before = tl.sum(inner * tl.where(column < j, w, 0.0)[:, None], 0)
        inner = tl.where(mine[:, None], (tau * (tl.where(across == j, 1.0, 0.0) - before))[None, :], inner)
        diagonal = tl.where(mine, beta, diagonal)
    return tile, diagonal, inner


@triton.jit(do_not_specialize=["matrices", "rank"])
def _factorise(
    source, work, table, matrices, rank, identity,
    R: tl.constexpr, B: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One block a program: V and T for the way back, and the triangle for the next level.

    Columns are divided by powers of two, which are kept beside the triangle: so squares neither overflow nor vanish.
    On the last level a block is what is left of a matrix; there all columns' lengths are known, and the identity is
    added.
    """
    node = tl.program_id(0)
    matrix = tl.load(table + FIELDS * matrices + node)
    entry = table + matrix
    # Offsets within a matrix fit 32 bits, and half the registers.
    source += tl.load(entry)
    stride = tl.load(entry + matrices).to(tl.int32)
    rows = tl.load(entry + 2 * matrices).to(tl.int32)
    reflectors = work + tl.load(entry + 5 * matrices)
    index = node - tl.load(entry + 7 * matrices).to(tl.int32)
    inner_to = work + tl.load(entry + 6 * matrices) + index * R * R
    above = work + tl.load(entry + 8 * matrices)
    above_stride = tl.load(entry + 9 * matrices).to(tl.int32)
    above_powers = work + tl.load(entry + 12 * matrices)

    column = tl.arange(0, R)
    row = tl.arange(0, B)
    start = (0 if LAST else rank) + index * B
    place = start + row
    inside = (column < rank)[:, None] & (place < rows)[None, :]
    tile = tl.load(source + column[:, None] * stride + place[None, :], mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        powers = tl.zeros([R, B], tl.int32)
    else:
        known = work + tl.load(entry + 11 * matrices) + column[:, None] * stride + place[None, :]
        powers = tl.load(known, mask=inside, other=-1000.0).to(tl.int32)
    if LAST:
        tile = tile * power_of_two(powers - tl.max(tl.max(exponent_of(tile) + powers, 0), 0))
        lengths = tl.sqrt_rn(tl.sum(tile * tile, 1))
        added = identity * tl.max(lengths, 0)
        tile += tl.where((column[:, None] == row[None, :]) & inside, added, 0.0)
        # Squares of a column without length were too small to tell what it is: as much larger as is safe.
        tile = tile * power_of_two(tl.minimum(-exponent_of(tl.maximum(lengths, added)), 60))[:, None]
    else:
        peak = tl.max(exponent_of(tile) + powers, 1)
        tile = tile * power_of_two(powers - peak[:, None])

    tile, diagonal, inner = _reflect(tile, rank, R, B)
    lower = row[None, :] >= column[:, None]
    kept = reflectors + column[:, None] * rows + place[None, :]
    tl.store(kept, tl.where(lower, tile, 0.0), mask=inside)
    across = tl.arange(0, R)
    tl.store(inner_to + across[None, :] * R + column[:, None], inner)
    if not LAST:
        triangle = tl.where(column[:, None] == row[None, :], diagonal[:, None], tl.where(lower, 0.0, tile))
        own = column[:, None] * above_stride + row[None, :] + rank * (1 + index)
        square = (column < rank)[:, None] & (row < rank)[None, :]
        tl.store(above + own, triangle, mask=square)
        tl.store(above_powers + own, tl.zeros([R, B], tl.float32) + peak.to(tl.float32)[:, None], mask=square)
        if index == 0:
            copied = (column < rank)[:, None] & (across < rank)[None, :]
            top = tl.load(source + column[:, None] * stride + across[None, :], mask=copied, other=0.0)
            first = column[:, None] * above_stride + across[None, :]
            tl.store(above + first, top.to(tl.float32), mask=copied)
            tl.store(above_powers + first, tl.zeros([R, R], tl.float32), mask=copied)


@triton.jit(do_not_specialize=["matrices", "rank"])
def _form(
    target, work, table, matrices, rank,
    R: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of Q of one level, from those of the level above, C: (I - V T Vᵀ) [C; 0], C being I on the last.

    D is R, or 16 where that is less than a product of tiles takes.
    """
    node = tl.program_id(0) // (B // ROWS)
    part = tl.program_id(0) % (B // ROWS)
    matrix = tl.load(table + FIELDS * matrices + node)
    entry = table + matrix
    rows = tl.load(entry + 2 * matrices).to(tl.int32)
    target += tl.load(entry + 3 * matrices)
    stride = tl.load(entry + 4 * matrices).to(tl.int32)
    reflectors = work + tl.load(entry + 5 * matrices)
    index = node - tl.load(entry + 7 * matrices).to(tl.int32)
    inner = work + tl.load(entry + 6 * matrices) + index * R * R
    above_stride = tl.load(entry + 9 * matrices).to(tl.int32)
    above = work + tl.load(entry + 10 * matrices)

    column = tl.arange(0, D)
    across = tl.arange(0, D)
    start = (0 if LAST else rank) + index * B
    square = (column < rank)[:, None] & (across < rank)[None, :]
    head = tl.load(
        reflectors + column[:, None] * rows + start + across[None, :],
        mask=square & (start + across < rows)[None, :], other=0.0,
    )  # fmt: skip
    weights = tl.load(inner + column[:, None] * R + across[None, :], mask=square, other=0.0)
    if not LAST:
        # C lies transposed, as everything does.
        turned = above + across[None, :] * above_stride + rank * (1 + index) + column[:, None]
        head = tl.dot(head, tl.load(turned, mask=square, other=0.0), input_precision=PRECISION)
    weights = tl.dot(weights, head, input_precision=PRECISION)

    local = part * ROWS + tl.arange(0, ROWS)
    place = start + local
    inside = (column < rank)[:, None] & (place < rows)[None, :]
    v = tl.load(reflectors + column[:, None] * rows + place[None, :], mask=inside, other=0.0)
    if LAST:
        q = tl.where(column[:, None] == local[None, :], 1.0, 0.0)
    else:
        own = above + column[:, None] * above_stride + rank * (1 + index) + local[None, :]
        q = tl.load(own, mask=(column < rank)[:, None] & (local < rank)[None, :], other=0.0)
    q -= tl.dot(tl.trans(weights), v, input_precision=PRECISION)
    to = target + column[:, None] * stride + place[None, :]
    tl.store(to, q.to(target.dtype.element_ty), mask=inside)
    if not LAST and index + part == 0:
        top = tl.load(above + column[:, None] * above_stride + across[None, :], mask=square, other=0.0)
        first = target + column[:, None] * stride + across[None, :]
        tl.store(first, top.to(target.dtype.element_ty), mask=square)


class Level(NamedTuple):
    """One level of a tree."""

    table: Tensor  # a row of numbers for each field of `Geometry`, then the matrix of each block: int64, on the device
    blocks: int
    rows: int  # of a block


@dataclass(frozen=True)
class Tree:
    """What is launched for matrices of one rank, worked out once.

    Args:
        rank: columns of every matrix, 2 to `WIDEST`.
        matrices: how many.
        levels: from the leaves to the root.
        work: numbers of float32 to work in.
    """

    rank: int
    matrices: int
    levels: tuple[Level, ...]
    work: int

    def run(
        self,
        source: Tensor,
        target: Tensor,
        identity: float,
        precision: str,
        work: Tensor | None = None,
    ) -> None:
        """Orthonormalise: matrices lie in ``source`` and Q goes to ``target``, wherever the tree was told.

        Args:
            source: float32, bfloat16 or float16; read only.
            target: of any of these types.
            identity: multiple of the identity, relative to the largest column norm.
            precision: of products of float32, as ``tl.dot`` calls it.
            work: float32, at least `work` numbers, whatever they are; made here unless given.
        """
        if work is None:
            work = torch.empty(self.work, device=source.device)
        width = triton.next_power_of_2(self.rank)
        last = len(self.levels) - 1
        for number, level in enumerate(self.levels):
            _factorise[(level.blocks,)](
                source if number == 0 else work, work, level.table, self.matrices, self.rank, identity,
                R=width, B=level.rows, FIRST=number == 0, LAST=number == last,
                num_warps=8 if width * level.rows >= ELEMENTS // 2 else 4,
            )  # fmt: skip
        for number, level in reversed(list(enumerate(self.levels))):
            formed = min(FORMED, level.rows)
            _form[(level.blocks * (level.rows // formed),)](
                target if number == 0 else work, work, level.table, self.matrices, self.rank,
                R=width, B=level.rows, ROWS=formed, D=max(width, 16), LAST=number == last,
                PRECISION=precision, num_warps=8 if width == WIDEST else 4,
            )  # fmt: skip


def plant(
    rank: int, sources: Sequence[Place], targets: Sequence[Place], device: torch.device, elements: int | None = None
) -> Tree:
    """Work out a tree for matrices of any numbers of rows, all of which go through as many levels as the longest.

    Args:
        rank: columns of every matrix, 2 to `WIDEST`.
        sources: where the matrices lie.
        targets: where Q goes.
        device: where tables are kept.
        elements: numbers of a block; `ELEMENTS` unless given.
    """
    width = triton.next_power_of_2(rank)
    heights = [place.rows for place in sources]
    # A block has to be well above a triangle, or a level would hold no fewer rows than the one below.
    block = min((elements or ELEMENTS) // width, triton.next_power_of_2(max(heights)))
    block = max(block, 4 * width, 16)
    rows, blocks = [heights], []
    while max(rows[-1]) > block:
        blocks.append([max(1, -(-(n - rank) // block)) for n in rows[-1]])
        rows.append([rank * (1 + count) for count in blocks[-1]])
    blocks.append([1] * len(heights))

    room = _Room()
    lower = [(place.offset, place.stride) for place in sources]
    upper = [(place.offset, place.stride) for place in targets]
    powers = [0] * len(heights)
    levels = []
    for number, (counts, ns) in enumerate(zip(blocks, rows, strict=True)):
        reflectors = [room.take(rank * n) for n in ns]
        inner = [room.take(count * width * width) for count in counts]
        above = rows[number + 1] if number + 1 < len(rows) else [0] * len(ns)
        next_lower = [(room.take(rank * n), n) for n in above]
        next_upper = [(room.take(rank * n), n) for n in above]
        next_powers = [room.take(rank * n) for n in above]
        firsts = _starts(counts)
        entries = [
            Geometry(*lower[i], ns[i], *upper[i], reflectors[i], inner[i], firsts[i],
                     *next_lower[i], next_upper[i][0], powers[i], next_powers[i])
            for i in range(len(ns))
        ]  # fmt: skip
        owners = [matrix for matrix, count in enumerate(counts) for _ in range(count)]
        table = [each for field in zip(*entries, strict=True) for each in field] + owners
        tall = block if number + 1 < len(rows) else max(triton.next_power_of_2(max(ns)), width, 16)
        levels.append(Level(torch.tensor(table, dtype=torch.int64).to(device), len(owners), tall))
        lower, upper, powers = next_lower, next_upper, next_powers
    return Tree(rank, len(heights), tuple(levels), room.taken)


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each begins, one after the other."""
    return [end - count for end, count in zip(itertools.accumulate(counts), counts, strict=True)]


class _Room:
    """Gives parts of one tensor away."""

    def __init__(self):
        self.taken = 0

    def take(self, count: int) -> int:
        """So many numbers, from a multiple of 16 bytes on."""
        start = self.taken
        self.taken += -(-count // 4) * 4
        return start
