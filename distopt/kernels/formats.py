"""Formats of at most 16 bits in a kernel's registers: decoded, encoded, rounded to the nearest or stochastically.

Device functions, to be called from kernels of any shape of block. ``FORM`` names the format:

============ ============================================ ==========================
``FORM``     codes                                        a draw's bits that count
============ ============================================ ==========================
``1-6-9``    int16, of `distopt.numerics.FLOAT_1_6_9`     14
``0-6-10``   int16, of FLOAT_0_6_10                       13
``bfloat16`` bfloat16                                     16
``float16``  float16                                      13
``float32``  float32, nothing is rounded                  0
============ ============================================ ==========================

A draw depends on a seed and on its counters alone, not on how the work was cut. Source of the generator: Salmon et al.
2011, Parallel random numbers: as easy as 1, 2, 3 (Philox 4x32; seven rounds pass all the tests there).
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

BIAS = tl.constexpr(60)
"""Of 1-6-9 and 0-6-10. A float32 whose exponent field fits into six bits is 2**67 times smaller than what it means."""


@triton.jit
def decode(codes, scale, FORM: tl.constexpr):
    """Give the values of codes, exactly, in float32.

    Args:
        codes: any shape.
        scale: a power of two, which values of 1-6-9, 0-6-10 and float16 are multiplied by; a scalar, or of a shape that
            broadcasts.
        FORM: the format.
    """
    if FORM == "1-6-9" or FORM == "0-6-10":
        values = shrunk(codes, FORM) * 2.0**67 * scale
    elif FORM == "float16":
        values = codes.to(tl.float32) * scale
    elif FORM == "bfloat16":
        values = (codes.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = codes
    return values


@triton.jit
def shrunk(codes, FORM: tl.constexpr):
    """Give the values of codes of 1-6-9 or 0-6-10, 2**67 times smaller, which takes no arithmetic."""
    if FORM == "1-6-9":
        # The sign is extended to the left by the conversion; the two bits below it are not part of the number.
        bits = (codes.to(tl.int32) << 14) & ~(3 << 29)
    else:
        bits = (codes.to(tl.int32) & 0xFFFF) << 13
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_nearest(values, inverse, FORM: tl.constexpr):
    """Round to the nearest, ties to the even code: bit for bit what ``MiniFloat.encode`` and torch give.

    What is beyond the largest finite code becomes that code, and so does what is not finite, except that bfloat16 and
    float32 keep infinity and NaN. 0-6-10 forgets the sign.

    Args:
        values: float32, any shape.
        inverse: a power of two, one over the scale; ``values * inverse`` must not overflow.
        FORM: the format.
    """
    if FORM == "1-6-9":
        codes = _nearest(values * inverse, 9, 1)
    elif FORM == "0-6-10":
        codes = _nearest(values * inverse, 10, 0)
    elif FORM == "float16":
        codes = tl.clamp(values * inverse, -65504.0, 65504.0).to(tl.float16)
    elif FORM == "bfloat16":
        bits = values.to(tl.int32, bitcast=True)
        codes = _upper_half(bits, 0x7FFF + ((bits >> 16) & 1))
    else:
        codes = values
    return codes


@triton.jit
def encode_stochastic(values, inverse, draws, FORM: tl.constexpr):
    """Round to one of the two neighbours, so that the mean is the value.

    That is exact for normal results, and to 2**-14 of the smallest subnormal beneath them. A value that the format has
    is kept, whatever the draw. What is too large, or not finite, becomes what `encode_nearest` makes of it.

    Args:
        values: float32, any shape.
        inverse: as in `encode_nearest`.
        draws: int32, not negative; the lowest bits are uniform, as many as count, the others may be anything.
        FORM: the format.
    """
    if FORM == "1-6-9":
        codes = cut(values * inverse * 2.0**-67, draws, 9, 6, 1)
    elif FORM == "0-6-10":
        codes = cut(values * inverse * 2.0**-67, draws, 10, 6, 0)
    elif FORM == "float16":
        codes = cut(values * inverse * 2.0**-112, draws, 10, 5, 1).to(tl.float16, bitcast=True)
    elif FORM == "bfloat16":
        codes = _upper_half(values.to(tl.int32, bitcast=True), draws & 0xFFFF)
    else:
        codes = values
    return codes


@triton.jit
def cut(values, draws, SIGNIFICAND: tl.constexpr, EXPONENT: tl.constexpr, SIGN: tl.constexpr):
    """Round stochastically values so small that their float32 bits hold the codes in the upper half.

    Args:
        values: float32: 2**67 times smaller than what codes of six bits of exponent say, 2**112 than what float16 says.
        draws: as in `encode_stochastic`.
        SIGNIFICAND: bits of the format.
        EXPONENT: bits of the format; with 5 the top one is infinity's.
        SIGN: bits of the format.

    Returns:
        int16.
    """
    drop: tl.constexpr = 23 - SIGNIFICAND
    largest: tl.constexpr = ((1 << EXPONENT) - (EXPONENT == 5) << 23) - (1 << drop)
    whole = values.to(tl.int32, bitcast=True)
    codes = (tl.minimum(whole & 0x7FFFFFFF, largest) + (draws & ((1 << drop) - 1))) >> drop
    if SIGN:
        codes = codes | ((whole >> 16) & 0x8000)
    return codes.to(tl.int16)


@triton.jit
def draws_of(seed, high, low, count=0):
    """Draw 16 uniform bits for each of eight neighbours of every counter, along the last dimension.

    Args:
        seed: integer.
        high: int32, any shape: the first counter, a row or the number of a tensor.
        low: int32, of the same shape: the second counter, an element's index divided by eight.
        count: int32: the third counter, a step where the seed is not of one.

    Returns:
        int32 from 0 to 65535; the last dimension is eight times longer, in the elements' order.
    """
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + count, zero, 7)
    evens = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.interleave((evens & 0xFFFF).to(tl.int32), (evens >> 16).to(tl.int32))


@triton.jit
def draw_at(seed, high, index):
    """Draw the 16 bits that `draws_of` has for one element, at eight times the cost of each.

    Args:
        seed: integer.
        high: int32, any shape: the first counter.
        index: int32, of the same shape: the element's index.
    """
    low = index >> 3
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero, zero, 7)
    word = (index >> 1) & 3
    bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return tl.where((index & 1) == 0, bits & 0xFFFF, bits >> 16).to(tl.int32)


@triton.jit
def _nearest(values, SIGNIFICAND: tl.constexpr, SIGN: tl.constexpr):
    """int16 codes of six bits of exponent."""
    drop: tl.constexpr = 23 - SIGNIFICAND
    lowest: tl.constexpr = (127 - BIAS + 1) << 23
    largest: tl.constexpr = ((127 - BIAS + 64) << 23) - (1 << drop)
    raised: tl.constexpr = drop << 23
    whole = values.to(tl.int32, bitcast=True)
    bits = tl.minimum(whole & 0x7FFFFFFF, largest)
    # A number 2**drop binades above the value's own has the format's spacing as its unit in the last place: adding it
    # lets the hardware round. The difference in bits is the value in units of that spacing.
    unit = tl.maximum(bits & 0x7F800000, lowest) + raised
    rounded = (bits.to(tl.float32, bitcast=True) + unit.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    codes = rounded - unit + ((unit - lowest - raised) >> drop)
    if SIGN:
        codes = codes | ((whole >> 16) & 0x8000)
    return codes.to(tl.int16)


@triton.jit
def _upper_half(bits, increment):
    """bfloat16 from a float32's bits, of which the lower half is cut; nothing finite becomes infinite."""
    magnitude = bits & 0x7FFFFFFF
    raised = tl.where(magnitude < 0x7F800000, tl.minimum(magnitude + increment, 0x7F7FFFFF), magnitude)
    # A NaN whose upper half is that of infinity stays a NaN.
    raised = tl.where(magnitude > 0x7F800000, raised | 0x400000, raised)
    return (((bits >> 16) & 0x8000) | (raised >> 16)).to(tl.int16).to(tl.bfloat16, bitcast=True)
