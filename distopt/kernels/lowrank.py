"""Products of many matrices with thin factors, each matrix read once: the passes of a low-rank compression.

M is a gradient, or a gradient plus its residual, ``(rows, columns)`` in the parameter's own order. Factors lie
transposed: ``(rank, rows)`` or ``(rank, columns)``. What a program works on is told by tables that are made once and
stay on the device (`distopt.kernels.lowrank_jobs`): each has a line a matrix, and for each program the number of its
line. Places and sizes are kept in units of ``UNIT`` elements, so that the compiler knows what may be read 16 bytes at a
time.

Products are of float32 and as good: tensor cores take each number as a sum of two (``tf32x3``).

Residuals in 1-6-9 and float16 have a power of two a parameter, which lies on the device in a table of two integers
each: what the codes that are read were divided by, and what new ones are (`distopt.kernels.columns.rescale`).
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from distopt.kernels.formats import decode, draws_of, encode_stochastic

INFINITE = tl.constexpr(0x7F800000)
"""The bits of infinity: as integers, those of finite magnitudes are smaller, and those of NaN larger."""

LARGEST = tl.constexpr((2 - 2.0**-9) * 2.0**127)
"""The largest float32 that is not rounded up to 2**128, which float32 does not hold."""

LINE = tl.constexpr(16)
"""Numbers in a line of a table."""


@triton.jit
def multiply(
    gradient,
    residual,
    factor,
    out,
    partial,
    scales,
    peaks,
    lines,
    numbers,
    TALL_SUM: tl.constexpr,
    ADDS: tl.constexpr,
    WRITES: tl.constexpr,
    PEAKS: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    PLACE: tl.constexpr,
    RANK: tl.constexpr,
    KEPT: tl.constexpr,
    SUMMED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A factor's product with a strip of M, along its rows or, if ``TALL_SUM``, down its columns.

    ``residual``, in ``FORM``, is added to ``gradient`` if ``ADDS``; the sum takes the gradient's place if ``WRITES``.
    If ``PEAKS``, those of ``peaks`` are raised to the bits of the largest magnitude in M.
    Of ``factor`` there is one ``(rank, summed)`` a matrix, of ``out`` one ``(rank, kept)``: for strips that are as long
    as the matrix. Others go to ``partial``, ``(strips, rank, kept)`` a matrix. ``numbers`` tells which of the ``lines``
    is a program's. Places and sizes of matrices are counted in ``UNIT`` elements, places of factors in ``PLACE``. A
    program takes ``RANK`` columns of the factor, and tiles of ``KEPT`` by ``SUMMED`` elements of M.
    """
    line = lines + tl.load(numbers + tl.program_id(0)) * LINE
    place = tl.load(line) * UNIT
    stored = tl.load(line + 1) * UNIT
    rows = (tl.load(line + 2) * UNIT).to(tl.int32)
    columns = (tl.load(line + 3) * UNIT).to(tl.int32)
    rank = tl.load(line + 4).to(tl.int32)
    from_place = tl.load(line + 5) * PLACE
    to_place = tl.load(line + 6) * PLACE
    aside = tl.load(line + 7)
    chunk, tile, number, strip, strips = _strip(line, UNIT)
    length, width = (rows, columns) if TALL_SUM else (columns, rows)
    kept = tile * KEPT + tl.arange(0, KEPT)
    r = chunk * RANK + tl.arange(0, RANK)
    begin = number * strip
    end = tl.minimum(begin + strip, length)
    gradient += place
    residual += stored
    factor += from_place
    total = tl.zeros((KEPT, RANK), tl.float32)
    if ADDS:
        scale = power_at(scales, line + 13, 1, 1, FORM)
    if PEAKS:
        peak = tl.zeros((SUMMED if TALL_SUM else KEPT,), tl.float32)
    for start in range(begin, end, SUMMED):
        summed = start + tl.arange(0, SUMMED)
        down, most, along, limit = (summed, end, kept, columns) if TALL_SUM else (kept, rows, summed, end)
        where = down[:, None] * columns + along[None, :]
        inside = (down < most)[:, None] & (along < limit)[None, :]
        block = tl.load(gradient + where, inside, 0.0).to(tl.float32)
        if ADDS:
            block += decode(tl.load(residual + where, inside, 0), scale, FORM)
        if PEAKS:
            peak = tl.maximum(peak, tl.max(tl.abs(block), 1))
        if WRITES:
            tl.store(gradient + where, block, inside)
        known = (r < rank)[:, None] & (summed < end)[None, :]
        other = tl.load(factor + r[:, None] * length + summed[None, :], known, 0.0)
        if TALL_SUM:
            block = tl.trans(block)
        total = tl.dot(block, tl.trans(other), total, input_precision=PRECISION)
    target = out + to_place
    if strips > 1:
        target = partial + aside + number.to(tl.int64) * (rank * width)
    wanted = (r < rank)[:, None] & (kept < width)[None, :]
    tl.store(target + r[:, None] * width + kept[None, :], tl.trans(total), wanted)
    if PEAKS:
        largest = tl.max(peak, 0).to(tl.int32, bitcast=True)
        tl.atomic_max(peaks + tl.load(line + 13), largest, sem="relaxed")


@triton.jit
def _strip(line, UNIT: tl.constexpr):
    """A program's part of the rank, tile of the kept side and strip; how long strips are, and how many."""
    local = tl.program_id(0) - tl.load(line + 8).to(tl.int32)
    tiles = tl.load(line + 9).to(tl.int32)
    chunks = tl.load(line + 10).to(tl.int32)
    length = (tl.load(line + 11) * UNIT).to(tl.int32)
    strips = tl.load(line + 12).to(tl.int32)
    return local % chunks, (local // chunks) % tiles, local // (chunks * tiles), length, strips


@triton.jit
def gather(partial, out, lines, numbers, BLOCK: tl.constexpr):
    """The sum of what the strips of a matrix gave, in their order."""
    line = lines + tl.load(numbers + tl.program_id(0)) * LINE
    count = tl.load(line).to(tl.int32)
    target = out + tl.load(line + 1)
    partial += tl.load(line + 2)
    strips = tl.load(line + 3).to(tl.int32)
    here = (tl.program_id(0) - tl.load(line + 4).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(strips):
        total += tl.load(partial + here, here < count, 0.0)
        partial += count
    tl.store(target + here, total, here < count)


@triton.jit
def add(
    gradient,
    residual,
    scales,
    lines,
    numbers,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient plus residual in the gradient's place, for factors too wide for one program."""
    line, where, inside = _tile(lines, numbers, UNIT, ROWS, COLUMNS)
    gradient += tl.load(line) * UNIT
    residual += tl.load(line + 1) * UNIT
    scale = power_at(scales, line + 9, 1, 1, FORM)
    total = tl.load(gradient + where, inside, 0.0) + decode(tl.load(residual + where, inside, 0), scale, FORM)
    tl.store(gradient + where, total, inside)


@triton.jit(do_not_specialize=["step"])
def settle(
    gradient,
    residual,
    left,
    right,
    own_left,
    own_right,
    flags,
    scales,
    lines,
    numbers,
    step,
    TALL: tl.constexpr,
    ADDS: tl.constexpr,
    SAME_LEFT: tl.constexpr,
    SAME_RIGHT: tl.constexpr,
    COUNTED: tl.constexpr,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    PLACE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the average takes the gradient's place, and what was not sent the residual's.

    ``gradient`` holds M, or what M is together with ``residual``, in ``FORM``, if ``ADDS``. ``left`` and ``right`` are
    Pᵀ and Qᵀ as averaged, the others as this rank put them in: the same ones if ``SAME_LEFT`` or ``SAME_RIGHT``. If
    one of three ``flags`` is `INFINITE` or beyond, the gradient becomes NaN and the residual stays. ``step`` is for the
    draws, a place in memory if ``COUNTED``. ``TALL``: Q, the larger factor, is on the side of the rows. ``EARLY``: M is
    read before the products are formed. ``RANK`` columns of the factors are taken at a time. The rest: see `multiply`.
    """
    line, where, inside = _tile(lines, numbers, UNIT, ROWS, COLUMNS)
    gradient += tl.load(line) * UNIT
    residual += tl.load(line + 1) * UNIT
    worst = tl.maximum(tl.maximum(tl.load(flags), tl.load(flags + 1)), tl.load(flags + 2))
    if worst >= INFINITE:
        tl.store(gradient + where, tl.full((ROWS, COLUMNS), float("nan"), gradient.dtype.element_ty), inside)
    else:
        # First where registers allow, so that it is on its way while the products are formed.
        if EARLY:
            matrix = _matrix(gradient + where, residual + where, inside, scales, line, ADDS, FORM)
        average, own = _product_at(
            line,
            tl.program_id(0),
            left,
            right,
            own_left,
            own_right,
            TALL,
            SAME_LEFT,
            SAME_RIGHT,
            UNIT,
            PLACE,
            RANK,
            ROWS,
            COLUMNS,
            PRECISION,
        )
        if not EARLY:
            matrix = _matrix(gradient + where, residual + where, inside, scales, line, ADDS, FORM)
        given = average.to(gradient.dtype.element_ty)
        left_over = (matrix - own) + (average - given.to(tl.float32))
        tl.store(gradient + where, given, inside)
        if COUNTED:
            step = tl.load(step)
        if FORM != "float32":
            left_over = _rounded(left_over, line, scales, step, FORM, UNIT, ROWS, COLUMNS)
        tl.store(residual + where, left_over, inside)


@triton.jit
def _rounded(
    values,
    line,
    scales,
    step,
    FORM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The codes of a tile. Draws are counted from the matrix's beginning, in eights along rows of whole eights."""
    local = tl.program_id(0) - tl.load(line + 7).to(tl.int32)
    columns = (tl.load(line + 3) * UNIT).to(tl.int32)
    across = tl.cdiv(columns, COLUMNS)
    row = (local // across) * ROWS + tl.arange(0, ROWS)
    eight = (local % across) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    low = row[:, None] * tl.cdiv(columns, 8) + eight[None, :]
    draws = draws_of(tl.load(line + 8), low * 0 + step, low)
    if FORM != "bfloat16":
        values = tl.clamp(values, -LARGEST, LARGEST)
    return encode_stochastic(values, power_at(scales, line + 9, 1, -1, FORM), draws, FORM)


@triton.jit(do_not_specialize=["count"])
def exceed(
    gradient,
    left,
    right,
    flags,
    lines,
    numbers,
    count,
    limit,
    TALL: tl.constexpr,
    UNIT: tl.constexpr,
    PLACE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raise the third flag if an average is beyond the range of its gradient; the tiles are those of `settle`.

    None can be as long as the second flag, read as a number, is below ``limit``.
    """
    largest = tl.load(flags + 1).to(tl.float32, bitcast=True)
    if (largest >= limit) & (largest < float("inf")):
        for program in range(tl.program_id(0), count, tl.num_programs(0)):
            line = lines + tl.load(numbers + program) * LINE
            average, _ = _product_at(
                line, program, left, right, left, right, TALL, True, True, UNIT, PLACE, RANK, ROWS, COLUMNS, PRECISION
            )
            size = tl.abs(average.to(gradient.dtype.element_ty).to(tl.float32))
            if tl.max(tl.max(size, 1), 0) == float("inf"):
                tl.atomic_max(flags + 2, INFINITE)


@triton.jit
def _matrix(gradient, residual, inside, scales, line, ADDS: tl.constexpr, FORM: tl.constexpr):
    """M in float32, at blocks of places; the residual's codes are those of the step before."""
    matrix = tl.load(gradient, inside, 0.0).to(tl.float32)
    if ADDS:
        matrix += decode(tl.load(residual, inside, 0), power_at(scales, line + 9, 0, 1, FORM), FORM)
    return matrix


@triton.jit
def power_at(scales, place, WHICH: tl.constexpr, SIGN: tl.constexpr, FORM: tl.constexpr):
    """The power of two of a parameter, whose number lies at ``place``, or one over it; 1 for forms without."""
    power = 1.0
    if FORM == "1-6-9" or FORM == "float16":
        exponent = tl.load(scales + 2 * tl.load(place) + WHICH)
        power = ((SIGN * exponent + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def _corner(line, program, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sides of a line's matrix, and which of its rows and columns a program's tile has."""
    rows = (tl.load(line + 2) * UNIT).to(tl.int32)
    columns = (tl.load(line + 3) * UNIT).to(tl.int32)
    local = program - tl.load(line + 7).to(tl.int32)
    across = tl.cdiv(columns, COLUMNS)
    row = (local // across) * ROWS + tl.arange(0, ROWS)
    column = (local % across) * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns, row, column


@triton.jit
def _tile(lines, numbers, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's line, and where in its matrix the elements of its tile lie."""
    line = lines + tl.load(numbers + tl.program_id(0)) * LINE
    rows, columns, row, column = _corner(line, tl.program_id(0), UNIT, ROWS, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return line, row[:, None] * columns + column[None, :], inside


@triton.jit
def _product_at(
    line,
    program,
    left,
    right,
    own_left,
    own_right,
    TALL: tl.constexpr,
    SAME_LEFT: tl.constexpr,
    SAME_RIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    PLACE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the averaged product and of this rank's own; one of the factors, at least, is the same in both."""
    rows, columns, row, column = _corner(line, program, UNIT, ROWS, COLUMNS)
    rank = tl.load(line + 4).to(tl.int32)
    at_left = tl.load(line + 5) * PLACE
    at_right = tl.load(line + 6) * PLACE
    if TALL:
        first, second, own_first, own_second = (
            right + at_right,
            left + at_left,
            own_right + at_right,
            own_left + at_left,
        )
    else:
        first, second, own_first, own_second = (
            left + at_left,
            right + at_right,
            own_left + at_left,
            own_right + at_right,
        )
    average = tl.zeros((ROWS, COLUMNS), tl.float32)
    own = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        down = r[:, None] * rows + row[None, :]
        along = r[:, None] * columns + column[None, :]
        has_row = (r < rank)[:, None] & (row < rows)[None, :]
        has_column = (r < rank)[:, None] & (column < columns)[None, :]
        one = tl.trans(tl.load(first + down, has_row, 0.0))
        other = tl.load(second + along, has_column, 0.0)
        average = tl.dot(one, other, average, input_precision=PRECISION)
        if not (SAME_LEFT and SAME_RIGHT):
            if not (SAME_RIGHT if TALL else SAME_LEFT):
                one = tl.trans(tl.load(own_first + down, has_row, 0.0))
            if not (SAME_LEFT if TALL else SAME_RIGHT):
                other = tl.load(own_second + along, has_column, 0.0)
            own = tl.dot(one, other, own, input_precision=PRECISION)
    return average, (average if SAME_LEFT and SAME_RIGHT else own)
