"""Orthonormal columns of matrices with more than 32 columns, panel by panel of 32, transposed as everywhere.

A panel is made orthonormal by a tree; the block reflection that takes the leading columns of the identity there is read
off the result Q: I + Z S Z₁⁻ᵀ Zᵀ, with Z = Q - [S; 0], Z₁ its first rows and signs S such that no pivot of Z₁ is below
1. It is applied to the columns that follow; at the end, from the last panel to the first, to those of Q. Q comes out
orthonormal whatever the matrix is, up to the signs of its columns, which are left as they fall.

Source: Ballard, Demmel, Grigori, Jacquelin, Nguyen and Solomonik 2014, "Reconstructing Householder vectors from
tall-skinny QR", IPDPS, sections III and IV.
"""

# Triton's language has no types, and a launch no signature.
# pyright: basic, reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.kernels.householder_tree import WIDEST, Place, Tree, plant, power_of_two

CHUNKS = 64
"""Parts of a matrix, at most, whose inner products are summed apart, and then in order."""

CHUNK = 256
"""Rows of a part, at least."""

TILE = (32, 64)
"""Of inner products, rows at a time and columns: what a thread has registers for."""

UPDATED = (64, 32, 16)
"""Rows and columns that one program updates, and how many reflectors at a time."""

FIELDS = tl.constexpr(6)
"""Numbers of each matrix: where it lies in the source and how far apart its columns, its rows, where its copy in
float32 lies, the number of its first part, where the partial sums of its first part begin."""


@triton.jit(do_not_specialize=["matrices", "rank"])
def _measure(source, norms, table, matrices, rank, B: tl.constexpr):
    """The square of a column's length, one program a column."""
    matrix = tl.program_id(0) // rank
    column = tl.program_id(0) % rank
    start = tl.load(table + matrix) + column * tl.load(table + matrices + matrix)
    rows = tl.load(table + 2 * matrices + matrix)
    place = tl.arange(0, B)
    sums = tl.zeros([B], tl.float64)
    for at in range(0, rows, B):
        x = tl.load(source + start + at + place, mask=at + place < rows, other=0.0).to(tl.float64)
        sums += x * x
    tl.store(norms + tl.program_id(0), tl.sum(sums, 0))


@triton.jit(do_not_specialize=["matrices", "rank"])
def _prepare(source, rest, q, norms, table, owners, matrices, rank, identity, CHUNK: tl.constexpr, B: tl.constexpr,
             R: tl.constexpr):  # fmt: skip
    """Copy to float32, over a power of two near the longest column, and add the identity; Q starts from zeros."""
    chunk = tl.program_id(0)
    column = tl.program_id(1)
    matrix = tl.load(owners + chunk)
    start = tl.load(table + matrix) + column * tl.load(table + matrices + matrix)
    rows = tl.load(table + 2 * matrices + matrix)
    to = tl.load(table + 3 * matrices + matrix) + column * rows
    each = tl.arange(0, R)
    longest = tl.sqrt(tl.max(tl.load(norms + matrix * rank + each, mask=each < rank, other=0.0), 0))
    exponent = ((longest.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023
    scale = power_of_two(-exponent)
    added = (identity * longest * scale.to(tl.float64)).to(tl.float32)
    first = (chunk - tl.load(table + 4 * matrices + matrix)) * CHUNK
    for at in range(0, CHUNK, B):
        place = first + at + tl.arange(0, B)
        x = tl.load(source + start + place, mask=place < rows, other=0.0).to(tl.float32) * scale
        tl.store(rest + to + place, tl.where(place == column, x + added, x), mask=place < rows)
        tl.store(q + to + place, tl.zeros([B], tl.float32), mask=place < rows)


@triton.jit(do_not_specialize=["matrices", "panel"])
def _reconstruct(q, inverses, signs, table, matrices, panel, W: tl.constexpr):
    """Z₁⁻¹ S and S of a panel, by elimination without pivoting, one program a matrix."""
    matrix = tl.program_id(0)
    rows = tl.load(table + 2 * matrices + matrix)
    base = tl.load(table + 3 * matrices + matrix) + panel * W * (rows + 1)
    down = tl.arange(0, W)
    across = tl.arange(0, W)
    x = tl.load(q + base + across[None, :] * rows + down[:, None])
    sign = tl.zeros([W], tl.float32)
    for i in range(W):
        pivot_row = tl.sum(tl.where((down == i)[:, None], x, 0.0), 0)
        pivot_column = tl.sum(tl.where((across == i)[None, :], x, 0.0), 1)
        pivot = tl.sum(tl.where(across == i, pivot_row, 0.0), 0)
        s = tl.where(pivot >= 0, -1.0, 1.0)
        inverse = tl.div_rn(1.0, pivot - s)
        here = tl.where(across == i, inverse, pivot_row * inverse)
        others = tl.where(down == i, 0.0, pivot_column)
        kept = tl.where((across == i)[None, :], 0.0, x)
        x = tl.where((down == i)[:, None], here[None, :], kept - others[:, None] * here[None, :])
        sign = tl.where(across == i, s, sign)
    tl.store(inverses + matrix * W * W + down[:, None] * W + across[None, :], x * sign[None, :])
    tl.store(signs + matrix * W + across, sign)


@triton.jit(do_not_specialize=["matrices", "panel", "rank"])
def _inner(q, rest, sums, signs, table, owners, matrices, rank, panel, CHUNK: tl.constexpr, B: tl.constexpr,
           W: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Zᵀ times columns after the panel, over a part of the rows."""
    chunk = tl.program_id(0)
    matrix = tl.load(owners + chunk)
    rows = tl.load(table + 2 * matrices + matrix)
    base = tl.load(table + 3 * matrices + matrix)
    index = chunk - tl.load(table + 4 * matrices + matrix)
    mine = tl.arange(0, W)
    column = (panel + 1) * W + tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    sign = tl.load(signs + matrix * W + mine)
    total = tl.zeros([W, ACROSS], tl.float32)
    for at in range(0, CHUNK, B):
        place = index * CHUNK + at + tl.arange(0, B)
        inside = (place < rows)[None, :]
        z = tl.load(q + base + (panel * W + mine)[:, None] * rows + place[None, :], mask=inside, other=0.0)
        z -= tl.where(place[None, :] == (panel * W + mine)[:, None], sign[:, None], 0.0)
        x = tl.load(
            rest + base + column[:, None] * rows + place[None, :], mask=inside & (column < rank)[:, None], other=0.0
        )
        total = tl.dot(z, tl.trans(x), total, input_precision=PRECISION)
    to = sums + tl.load(table + 5 * matrices + matrix) + index * W * rank
    tl.store(to + mine[:, None] * rank + column[None, :], total, mask=(column < rank)[None, :])


@triton.jit(do_not_specialize=["matrices", "panel", "rank"])
def _combine(sums, weights, inverses, table, parts, matrices, rank, panel, BACK: tl.constexpr, W: tl.constexpr,
             ACROSS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What Z is to be multiplied with and added: the sum of all parts, times Z₁⁻¹ S or its transpose."""
    matrix = tl.program_id(0)
    mine = tl.arange(0, W)
    across = tl.arange(0, W)
    column = (panel + 1) * W + tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    base = sums + tl.load(table + 5 * matrices + matrix) + mine[:, None] * rank + column[None, :]
    inside = (column < rank)[None, :]
    total = tl.zeros([W, ACROSS], tl.float32)
    for part in range(0, tl.load(parts + matrix)):
        total += tl.load(base + part * W * rank, mask=inside, other=0.0)
    inverse = inverses + matrix * W * W
    if BACK:
        middle = tl.load(inverse + across[None, :] * W + mine[:, None])
    else:
        middle = tl.load(inverse + mine[:, None] * W + across[None, :])
    total = tl.dot(middle, total, input_precision=PRECISION)
    tl.store(weights + (matrix * W + mine)[:, None] * rank + column[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["matrices", "panel", "rank"])
def _update(q, rest, weights, signs, table, owners, matrices, rank, panel, CHUNK: tl.constexpr, B: tl.constexpr,
            W: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add Z times its weights to the columns after the panel, a few of Z's at a time, as registers are."""
    chunk = tl.program_id(0) // (CHUNK // B)
    matrix = tl.load(owners + chunk)
    rows = tl.load(table + 2 * matrices + matrix)
    base = tl.load(table + 3 * matrices + matrix)
    index = chunk - tl.load(table + 4 * matrices + matrix)
    place = index * CHUNK + (tl.program_id(0) % (CHUNK // B)) * B + tl.arange(0, B)
    column = (panel + 1) * W + tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    inside = (place < rows)[None, :]
    both = inside & (column < rank)[:, None]
    to = rest + base + column[:, None] * rows + place[None, :]
    total = tl.load(to, mask=both, other=0.0)
    for at in range(0, W, DEPTH):
        mine = at + tl.arange(0, DEPTH)
        sign = tl.load(signs + matrix * W + mine)
        z = tl.load(q + base + (panel * W + mine)[:, None] * rows + place[None, :], mask=inside, other=0.0)
        z -= tl.where(place[None, :] == (panel * W + mine)[:, None], sign[:, None], 0.0)
        turned = weights + (matrix * W + mine)[None, :] * rank + column[:, None]
        weight = tl.load(turned, mask=(column < rank)[:, None], other=0.0)
        total = tl.dot(weight, z, total, input_precision=PRECISION)
    tl.store(to, total, mask=both)


@dataclass(frozen=True)
class Panels:
    """What is launched for matrices of one rank above 32, worked out once.

    Args:
        rank: columns of every matrix.
        width: columns of a panel, but for the last.
        table: a row of numbers for each of `FIELDS`, on the device.
        owners: the matrix of each part.
        parts: how many parts each matrix has.
        chunk: rows of a part.
        trees: one a panel.
        numbers: of all matrices together.
        sums: numbers of all parts' partial sums.
    """

    rank: int
    width: int
    table: Tensor
    owners: Tensor
    parts: Tensor
    chunk: int
    trees: tuple[Tree, ...]
    numbers: int
    sums: int

    def run(self, source: Tensor, target: Tensor, identity: float, precision: str) -> None:
        """As `Tree.run`, with room of its own; Q goes to ``target``, matrix after matrix."""
        matrices, device = len(self.parts), source.device
        rest = torch.empty(self.numbers, device=device)
        q = target if target.dtype == torch.float32 else torch.empty_like(rest)
        norms = torch.empty(matrices * self.rank, dtype=torch.float64, device=device)
        _measure[(matrices * self.rank,)](source, norms, self.table, matrices, self.rank, B=2048, num_warps=8)
        _prepare[(len(self.owners), self.rank)](
            source, rest, q, norms, self.table, self.owners, matrices, self.rank, identity,
            CHUNK=self.chunk, B=CHUNK, R=triton.next_power_of_2(self.rank), num_warps=4,
        )  # fmt: skip
        sides = torch.empty(len(self.trees), matrices, self.width * (self.width + 1), device=device)
        room = torch.empty(self.sums + matrices * self.width * self.rank, device=device)
        work = torch.empty(max(tree.work for tree in self.trees), device=device)
        last = len(self.trees) - 1
        for panel, tree in enumerate(self.trees):
            tree.run(rest, q, 0.0, precision, work)
            if panel < last:
                inverses, signs = self._sides(sides[panel])
                _reconstruct[(matrices,)](q, inverses, signs, self.table, matrices, panel, W=self.width, num_warps=4)
                self._apply(q, rest, room, sides[panel], panel, precision, back=False)
        for panel in reversed(range(last)):
            self._apply(q, q, room, sides[panel], panel, precision, back=True)
        if q is not target:
            target.copy_(q)

    def _sides(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """A panel's Z₁⁻¹ S of all matrices, and their S."""
        inverses, signs = both.view(-1).split([both.shape[0] * self.width**2, both.shape[0] * self.width])
        return inverses, signs

    def _apply(
        self, q: Tensor, rest: Tensor, room: Tensor, both: Tensor, panel: int, precision: str, *, back: bool
    ) -> None:
        """A panel's reflection, or its transpose, on the columns of ``rest`` after the panel."""
        matrices = len(self.parts)
        inverses, signs = self._sides(both)
        sums, weights = room[: self.sums], room[self.sums :]
        after = self.rank - (panel + 1) * self.width
        chunks = len(self.owners)
        deep, wide = TILE
        _inner[(chunks, triton.cdiv(after, wide))](
            q, rest, sums, signs, self.table, self.owners, matrices, self.rank, panel,
            CHUNK=self.chunk, B=deep, W=self.width, ACROSS=wide, PRECISION=precision, num_warps=4,
        )  # fmt: skip
        _combine[(matrices, triton.cdiv(after, wide))](
            sums, weights, inverses, self.table, self.parts, matrices, self.rank, panel,
            BACK=back, W=self.width, ACROSS=wide, PRECISION=precision, num_warps=4,
        )  # fmt: skip
        tall, wide, depth = UPDATED
        _update[(chunks * (self.chunk // tall), triton.cdiv(after, wide))](
            q, rest, weights, signs, self.table, self.owners, matrices, self.rank, panel,
            CHUNK=self.chunk, B=tall, W=self.width, ACROSS=wide, DEPTH=depth, PRECISION=precision, num_warps=4,
        )  # fmt: skip


def panels(
    rank: int,
    sources: Sequence[Place],
    targets: Sequence[Place],
    device: torch.device,
    width: int = WIDEST,
    elements: int | None = None,
) -> Panels:
    """Work out the launches for matrices of any numbers of rows; see `householder_tree.plant`.

    Args:
        rank: columns of every matrix, above ``width``.
        sources: where the matrices lie.
        targets: where Q goes: columns without gaps.
        device: where tables are kept.
        width: columns of a panel: a power of two, 16 to `WIDEST`.
        elements: numbers of a block of a tree.
    """
    heights = [place.rows for place in sources]
    chunk = max(CHUNK, triton.next_power_of_2(triton.cdiv(max(heights), CHUNKS)))
    parts = [triton.cdiv(n, chunk) for n in heights]
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    entries = [
        (source.offset, source.stride, source.rows, target.offset, first, first * width * rank)
        for source, target, first in zip(sources, targets, firsts, strict=True)
    ]
    table = torch.tensor([list(field) for field in zip(*entries, strict=True)], dtype=torch.int64)
    owners = torch.tensor([matrix for matrix, count in enumerate(parts) for _ in range(count)])
    trees = []
    for start in range(0, rank, width):
        places = [
            Place(place.offset + start * (n + 1), n, n - start) for place, n in zip(targets, heights, strict=True)
        ]
        trees.append(plant(min(width, rank - start), places, places, device, elements))
    numbers = max(target.offset + rank * n for target, n in zip(targets, heights, strict=True))
    return Panels(
        rank, width, table.to(device), owners.to(device), torch.tensor(parts).to(device), chunk, tuple(trees), numbers,
        sum(parts) * width * rank,
    )  # fmt: skip
