"""What is done with factors themselves: looked through for what is not finite, and made ready for the next step."""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from distopt.kernels.lowrank import LINE


@triton.jit
def inspect(numbers, count, flag, BLOCK: tl.constexpr):
    """Raise ``flag`` to the bits of the largest magnitude."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(numbers + here, here < count, 0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(flag, tl.max(bits))


@triton.jit(do_not_specialize=["step"])
def revive(units, alive, before, following, lines, step, BLOCK: tl.constexpr):
    """A column for the next step: as it is if it lives, else drawn; all as before if none of the matrix lives.

    Args:
        units: float32, transposed factors with columns of length 1.
        alive: int8, one a column.
        before: what this step started from, laid out likewise.
        following: for the result.
        lines: a line a column: where it lies, its length, the first column of its matrix, how many these are, a seed.
        step: for the draws.
        BLOCK: elements that are taken at a time.
    """
    column = tl.program_id(0)
    line = lines + column * LINE
    place = tl.load(line)
    length = tl.load(line + 1).to(tl.int32)
    first = tl.load(line + 2).to(tl.int32)
    ranks = tl.load(line + 3).to(tl.int32)
    living = 0
    for other in range(first, first + ranks):
        living += tl.load(alive + other).to(tl.int32)
    lives = tl.load(alive + column).to(tl.int32)
    if lives != 0:
        _copy(units + place, following + place, length, BLOCK)
    elif living == 0:
        _copy(before + place, following + place, length, BLOCK)
    else:
        seed = tl.load(line + 4)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            here = start + tl.arange(0, BLOCK)
            drawn = _drawn(seed, step, column - first, here)
            squares += tl.where(here < length, drawn * drawn, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0))
        for start in range(0, length, BLOCK):
            here = start + tl.arange(0, BLOCK)
            tl.store(following + place + here, _drawn(seed, step, column - first, here) * inverse, here < length)


@triton.jit
def _copy(source, target, length, BLOCK: tl.constexpr):
    for start in range(0, length, BLOCK):
        here = start + tl.arange(0, BLOCK)
        tl.store(target + here, tl.load(source + here, here < length, 0.0), here < length)


@triton.jit
def _drawn(seed, step, column, index):
    """Nearly Gaussian, of sums and products alone: what any device makes of it is the same."""
    zero = index * 0
    a, b, c, d = tl.philox(seed, index, zero + step, zero + column, zero)
    total = (a >> 9).to(tl.float32) + (b >> 9).to(tl.float32) + (c >> 9).to(tl.float32) + (d >> 9).to(tl.float32)
    return total * 2.0**-23 - 2.0
