"""Orthonormal columns of many tall thin matrices at once, in few launches and without waiting for the device.

One column is scaled to length 1; up to 32 go through a tree of blocks (`householder_tree`); more go panel by panel of
32 (`householder_blocks`). What a set of shapes asks for is worked out once and kept, tables on the device included, so
that a later call can be captured in a CUDA graph.
"""

# Triton's language has no types, and a launch no signature.
# pyright: basic, reportCallIssue=false, reportArgumentType=false

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.kernels.householder_blocks import Panels, panels
from distopt.kernels.householder_tree import WIDEST, Place, Tree, plant

PRECISION = "ieee"
"""Of products: float32 to the last bit. "tf32x3" is what tensor cores have to offer in its place."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What may come in, and comes out."""

Shape = tuple[int, int, int]
"""Matrices of a stack, rows of each, and where the stack starts in its storage."""


def orthonormal_rows(stacks: Sequence[Tensor], identity: float) -> list[Tensor]:
    """`distopt.numerics.orthogonal.orthonormal_rows`, in one launch or a few for all stacks of one rank and dtype.

    Args:
        stacks: ``(k, r, n)`` each, with r <= n, of one of `DTYPES`. They are not changed. Contiguous stacks of one
            storage, as the parts of one message are, are read where they lie; others are gathered first.
        identity: multiple of the identity, relative to the largest column norm.

    Returns:
        Stacks of the same shapes and dtypes, with orthonormal rows: max |Q Qᵀ - I| <= 1e-6 in float32, which 16 bits
        round.
    """
    kinds = [(stack.shape[1], stack.dtype) for stack in stacks]
    results: list[Tensor] = list(stacks)
    for kind in dict.fromkeys(kinds):
        places = [i for i, each in enumerate(kinds) if each == kind]
        for i, done in zip(places, _of_one_rank([stacks[i] for i in places], identity), strict=True):
            results[i] = done
    return results


def _of_one_rank(stacks: list[Tensor], identity: float) -> list[Tensor]:
    """The same, of stacks of one rank and dtype."""
    first, rank = stacks[0], stacks[0].shape[1]
    flat = torch.empty(sum(stack.numel() for stack in stacks), dtype=first.dtype, device=first.device)
    parts = flat.split_with_sizes([stack.numel() for stack in stacks])
    results = [part.view(stack.shape) for part, stack in zip(parts, stacks, strict=True)]
    if flat.numel() == 0:
        return results
    source, starts = _side_by_side(stacks)
    shapes = tuple(
        (len(stack), stack.shape[2], start) for stack, start in zip(stacks, starts, strict=True) if len(stack)
    )
    with torch.cuda.device_of(first):
        if rank == 1:
            table, count = columns(shapes, first.device)
            _unit[(count,)](source, flat, table, count, identity, B=4096, num_warps=8)
            return results
        work = prepared(rank, shapes, first.device)
        work.run(source, flat, identity, PRECISION)
    return results


def _side_by_side(stacks: list[Tensor]) -> tuple[Tensor, list[int]]:
    """One tensor that holds all stacks, and where in it each begins."""
    storage = stacks[0].untyped_storage().data_ptr()
    if all(stack.is_contiguous() and stack.untyped_storage().data_ptr() == storage for stack in stacks):
        return stacks[0].as_strided((1,), (1,), 0), [int(stack.storage_offset()) for stack in stacks]
    whole = torch.cat([stack.reshape(-1) for stack in stacks])
    sizes = [stack.numel() for stack in stacks]
    return whole, [sum(sizes[:i]) for i in range(len(sizes))]


def _places(rank: int, shapes: tuple[Shape, ...]) -> tuple[list[Place], list[Place]]:
    """Where each matrix lies, and where its Q goes: one after the other."""
    sources = [Place(start + i * rank * n, n, n) for count, n, start in shapes for i in range(count)]
    targets, at = [], 0
    for place in sources:
        targets.append(Place(at, place.rows, place.rows))
        at += rank * place.rows
    return sources, targets


@functools.lru_cache(maxsize=256)
def prepared(rank: int, shapes: tuple[Shape, ...], device: torch.device) -> Tree | Panels:
    """What is launched for stacks of some shapes."""
    sources, targets = _places(rank, shapes)
    if rank <= WIDEST:
        return plant(rank, sources, targets, device)
    return panels(rank, sources, targets, device)


@functools.lru_cache(maxsize=256)
def columns(shapes: tuple[Shape, ...], device: torch.device) -> tuple[Tensor, int]:
    """For each column: where it lies, where it goes, its length."""
    sources, targets = _places(1, shapes)
    rows = [[place.offset for place in sources], [place.offset for place in targets], [place.rows for place in sources]]
    return torch.tensor(rows, dtype=torch.int64).to(device), len(sources)


@triton.jit(do_not_specialize=["count"])
def _unit(source, target, table, count, identity, B: tl.constexpr):
    """One column a program: its squares are added up in float64, where none overflows or vanishes."""
    column = tl.program_id(0)
    start = tl.load(table + column)
    to = tl.load(table + count + column)
    rows = tl.load(table + 2 * count + column)
    place = tl.arange(0, B)
    sums = tl.zeros([B], tl.float64)
    for at in range(0, rows, B):
        x = tl.load(source + start + at + place, mask=at + place < rows, other=0.0).to(tl.float64)
        sums += x * x
    square = tl.sum(sums, 0)
    head = tl.load(source + start).to(tl.float64)
    length = tl.sqrt(square)
    new = head + tl.where(square == 0, 1.0, identity * length)
    # What is not finite is handed on to all numbers, as a NaN.
    length = tl.sqrt(square - head * head + new * new) + 0.0 * square
    for at in range(0, rows, B):
        x = tl.load(source + start + at + place, mask=at + place < rows, other=0.0).to(tl.float64)
        x = (tl.where(at + place == 0, new, x) / length).to(tl.float32)
        tl.store(target + to + at + place, x.to(target.dtype.element_ty), mask=at + place < rows)
