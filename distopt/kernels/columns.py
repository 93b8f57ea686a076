"""What is done with factors themselves: looked through for what is not finite, and made ready for the next step.

Residuals in 1-6-9 and float16 have a power of two a parameter. It has to be known before the first of them is rounded,
and is chosen after a bound: what is left of M after P Qᵀ was sent is at most the largest element of M and what the
largest elements of the factors' columns allow for. A bound that is too high by some binades costs nothing but range,
which is 61 binades beneath it in 1-6-9 and 28 in float16, and nothing ever saturates.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from distopt.kernels.lowrank import INFINITE, LINE


@triton.jit
def inspect(numbers, count, flag, BLOCK: tl.constexpr):
    """Raise ``flag`` to the bits of the largest magnitude."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(numbers + here, here < count, 0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(flag, tl.max(bits))


@triton.jit(do_not_specialize=["step"])
def revive(units, alive, before, following, lines, step, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """A column for the next step: as it is if it lives, else drawn; all as before if none of the matrix lives.

    Args:
        units: float32, transposed factors with columns of length 1.
        alive: int8, one a column.
        before: what this step started from, laid out likewise.
        following: for the result.
        lines: a line a column: where it lies, its length, the first column of its matrix, how many these are, a seed.
        step: for the draws.
        COUNTED: the step is a place in memory.
        BLOCK: elements that are taken at a time.
    """
    if COUNTED:
        step = tl.load(step)
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
def bound(
    left,
    right,
    own_left,
    own_right,
    bounds,
    lines,
    SAME_LEFT: tl.constexpr,
    SAME_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a column of P and of Q can add to an element of the average, and of this rank's own product, together.

    Args:
        left: Pᵀ of all matrices, as averaged.
        right: Qᵀ.
        own_left: as this rank put them in.
        own_right: likewise.
        bounds: float32, for the result, one a column.
        lines: a line a column: where that of P lies, its length, where that of Q lies, its length.
        SAME_LEFT: ``own_left`` is ``left``.
        SAME_RIGHT: ``own_right`` is ``right``.
        BLOCK: elements that are taken at a time.
    """
    line = lines + tl.program_id(0) * LINE
    one = _largest(left + tl.load(line), tl.load(line + 1).to(tl.int32), BLOCK)
    other = _largest(right + tl.load(line + 2), tl.load(line + 3).to(tl.int32), BLOCK)
    total = one * other
    if not SAME_LEFT:
        one = _largest(own_left + tl.load(line), tl.load(line + 1).to(tl.int32), BLOCK)
    if not SAME_RIGHT:
        other = _largest(own_right + tl.load(line + 2), tl.load(line + 3).to(tl.int32), BLOCK)
    tl.store(bounds + tl.program_id(0), total + one * other)


@triton.jit
def rescale(bounds, flags, peaks, scales, lines, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Choose the powers of two for the new residuals of a parameter, and keep those of the old ones beside them.

    Args:
        bounds: of `bound`.
        flags: as in `distopt.kernels.lowrank.settle`; if one is up, the residuals remain, and so does their power.
        peaks: bits of the largest magnitude in M, one a parameter.
        scales: int32, two a parameter: exponents of before, and from now on.
        lines: a line a parameter: its first column, columns of each of its matrices, how many these are.
        TOP: what the bound is mapped to: it is stored in ``(2**(TOP - 1), 2**TOP]``, beneath twice as much.
        BLOCK: columns that are taken at a time.
    """
    line = lines + tl.program_id(0) * LINE
    first = tl.load(line).to(tl.int32)
    ranks = tl.load(line + 1).to(tl.int32)
    count = tl.load(line + 2).to(tl.int32)
    most = 0.0
    for matrix in range(count):
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, ranks, BLOCK):
            here = start + tl.arange(0, BLOCK)
            total += tl.load(bounds + first + matrix * ranks + here, here < ranks, 0.0)
        most = tl.maximum(most, tl.sum(total, 0))
    most += tl.load(peaks + tl.program_id(0)).to(tl.float32, bitcast=True)
    bits = most.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Exponent fields are 127 more than the exponent, and that of 2**k is taken for what is below it.
    field = tl.minimum((tl.maximum(bits, 1) - 1) >> 23, 254)
    chosen = tl.where(bits == 0, 0, tl.maximum(field - 126 - TOP, -126))
    worst = tl.maximum(tl.maximum(tl.load(flags), tl.load(flags + 1)), tl.load(flags + 2))
    pair = scales + 2 * tl.program_id(0)
    present = tl.load(pair + 1)
    tl.store(pair, present)
    tl.store(pair + 1, tl.where(worst < INFINITE, chosen, present))


@triton.jit
def _largest(source, length, BLOCK: tl.constexpr):
    """The largest magnitude."""
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        here = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(source + here, here < length, 0.0)))
    return tl.max(most, 0)


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
