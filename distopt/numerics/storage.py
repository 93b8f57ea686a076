"""How residuals and factors are kept in fewer bits between steps.

Stochastic rounding is what makes a 16-bit residual work: an increment far below the spacing of the stored numbers would
be lost at every step under nearest rounding, and counts in the mean when it is rounded up now and then.
"""

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distopt.errors import SettingError
from distopt.numerics.gaussian import seeded_generator_on
from distopt.numerics.minifloat import FLOAT_1_6_9, MiniFloat, dither_, finite_range, piecewise, power_of_two

StorageDtype: TypeAlias = torch.dtype | Literal["1-6-9"]
"""A format to store in, a torch dtype, or DALL-E's 16-bit format by its sign-exponent-significand bits."""


class Packed(NamedTuple):
    """A tensor in 16 bits an element, with one power of two for all: ``value = decode(codes) * 2**exponent``."""

    codes: Tensor  # float16 holds its own values, int16 the codes of FLOAT_1_6_9
    exponent: int | Tensor  # int32, 0-dimensional, on the codes' device, where kernels choose it: no host need read it
    clamped: int  # elements beyond the format's largest value: none, as the exponent is chosen after the largest one


Stored: TypeAlias = Tensor | Packed

STORAGE_DTYPES: tuple[StorageDtype | None, ...] = (None, torch.float32, torch.bfloat16, torch.float16, "1-6-9")
"""What a setting may ask for. ``None`` keeps a tensor as it is."""

_FLOAT16 = MiniFloat(1, 5, 10, bias=15)  # float16 bit for bit, up to 65504; its top exponent is never reached here
_TOP = {torch.float16: 15, torch.int16: 3}  # the largest element is stored in (2**(top - 1), 2**top]
_SPACING = {torch.float16: 2.0**-10, torch.int16: 2.0**-9}  # from 1 to the next value


def check_storage(field: str, dtype: object, allowed: Collection[StorageDtype | None] = STORAGE_DTYPES) -> None:
    """Refuse what is not a format to store in.

    Args:
        field: the setting's name as the user wrote it.
        dtype: the value given.
        allowed: the values to accept.

    Raises:
        SettingError: ``dtype`` is none of them.

    Example:
        >>> check_storage("PowerSGD.residual_dtype", "1-6-9")
    """
    if dtype not in allowed:
        raise SettingError(field, dtype, "one of " + ", ".join(repr(each) for each in allowed))


def pack(tensor: Tensor, dtype: StorageDtype | None, *key: int | str) -> Stored:
    """Store a tensor in another format.

    ``float16`` and ``"1-6-9"`` get a power of two as scale, which follows from the largest element that is stored; so
    nothing overflows, and small elements keep the format's whole range beneath the largest. Scaling the tensor by a
    power of two changes the exponent alone. What has been stored once, stochastically or not, is stored again without
    change: ``pack(unpack(p), dtype)`` is ``p``. A checkpoint may therefore hold the float32 values.

    ============ ====================== ======================= =======================================
    format       error, nearest         error, stochastic       full precision down to
    ============ ====================== ======================= =======================================
    bfloat16     2**-9 of the element   2**-8                   float32's smallest normal number
    float16      2**-11                 2**-10                  2**-28 of the largest element
    1-6-9        2**-10                 2**-9                   2**-61 of the largest element
    ============ ====================== ======================= =======================================

    Beneath that the error is bounded by the spacing there. What would be rounded up to 2**128, which float32 does not
    hold, is rounded down. On its way to bfloat16, float64 is rounded to float32 first.

    Args:
        tensor: any shape, floating point. It is not changed.
        dtype: ``None`` gives the tensor itself; float32 and float64 convert it, as torch does, where it has another
            dtype.
        key: what the draw is for: a seed, a name, a step. With a key the rounding is stochastic, and the same for the
            same key, tensor and type of device in every process. Without one it is to nearest, ties to even.

    Returns:
        A tensor for ``None``, float32, float64 and bfloat16, a ``Packed`` otherwise.

    Raises:
        ValueError: 16 bits were asked for and a value is NaN or infinite, or too large for bfloat16. Nothing is
            stored then.

    Example:
        >>> packed = pack(torch.tensor([1.0, -3e-17]), "1-6-9")
        >>> packed.exponent, unpack(packed).tolist()
        (-3, [1.0, -2.99781900692242e-17])
    """
    if dtype is None or dtype in (torch.float32, torch.float64):
        return tensor if dtype is None else tensor.to(dtype)
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    generator = seeded_generator_on(tensor.device, "pack", *key) if key else None
    if dtype == torch.bfloat16:
        return _bfloat16(tensor.detach(), generator)
    if dtype in (torch.float16, "1-6-9"):
        return _pack_scaled(tensor.detach(), torch.float16 if dtype == torch.float16 else torch.int16, generator)
    raise SettingError("dtype", dtype, "one of " + ", ".join(repr(each) for each in STORAGE_DTYPES))


def unpack(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """Give the values that were stored, exactly.

    Args:
        stored: what ``pack`` returned.
        dtype: float32, or float64 for what was float64 and is beyond float32's range.

    Returns:
        A tensor of that dtype; the stored tensor itself where it has that dtype already.

    Example:
        >>> unpack(pack(torch.tensor([0.5, -1.0]), torch.float16)).tolist()
        [0.5, -1.0]
    """
    if isinstance(stored, Tensor):
        return stored if stored.dtype == dtype else stored.to(dtype)
    exponent = stored.exponent
    scale = power_of_two(exponent, dtype) if isinstance(exponent, Tensor) else 2.0**exponent
    if stored.codes.dtype == torch.float16:
        return stored.codes.to(dtype).mul_(scale)
    return FLOAT_1_6_9.decode(stored.codes, dtype, scale=scale)


def clamped(stored: Stored) -> int:
    """How many elements were too large for the format.

    Example:
        >>> clamped(pack(torch.tensor([1e30]), "1-6-9"))
        0
    """
    return stored.clamped if isinstance(stored, Packed) else 0


def nbytes(stored: Stored) -> int:
    """Bytes that the elements take.

    Example:
        >>> nbytes(pack(torch.zeros(10), "1-6-9"))
        20
    """
    tensor = stored.codes if isinstance(stored, Packed) else stored
    return tensor.numel() * tensor.element_size()


def tensors_of(stored: Stored) -> list[Tensor]:
    """What lies in memory of its own, the elements first.

    Example:
        >>> tensors_of(pack(torch.zeros(2), "1-6-9"))
        [tensor([0, 0], dtype=torch.int16)]
    """
    if isinstance(stored, Tensor):
        return [stored]
    return [each for each in stored[:2] if isinstance(each, Tensor)]


def _storable(tensor: Tensor, spacing: float) -> tuple[Tensor, float]:
    """Refuse what is not finite; give the tensor and its largest absolute value."""
    low, high = finite_range(tensor)
    largest = max(-low, high)
    limit = (2 - spacing) * 2.0**127
    if tensor.dtype == torch.float32 and largest > limit:  # would be read back as infinity if it were rounded up
        return tensor.clamp(-limit, limit), limit
    return tensor, largest


def _bfloat16(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    tensor, _ = _storable(tensor.float(), torch.finfo(torch.bfloat16).eps)
    if generator is None:
        return tensor.to(torch.bfloat16)

    def upper_half(piece: Tensor) -> Tensor:
        return dither_(piece.clone().view(torch.int32), 16, generator).bitwise_right_shift_(16)

    return piecewise(upper_half, tensor, torch.int16).view(torch.bfloat16)


def _pack_scaled(tensor: Tensor, codes_dtype: torch.dtype, generator: torch.Generator | None) -> Packed:
    tensor, largest = _storable(tensor, _SPACING[codes_dtype])
    if largest == 0:
        return Packed(tensor.to(torch.float16).contiguous().view(codes_dtype), 0, 0)  # zeros look alike in both formats
    mantissa, power = math.frexp(largest)
    mantissa, power = (1.0, power - 1) if mantissa == 0.5 else (mantissa, power)  # in (0.5, 1]: powers of two go below
    # The inverse of the scale must be a normal number of the tensor's dtype.
    exponent = max(power - _TOP[codes_dtype], math.frexp(torch.finfo(tensor.dtype).tiny)[1] - 1)
    scale = 2.0**-exponent
    if codes_dtype == torch.int16:
        codes, beyond = FLOAT_1_6_9.encode(tensor, scale=scale, generator=generator)
    elif generator is None and tensor.dtype == torch.float32:
        codes, beyond = piecewise(lambda piece: piece * scale, tensor, torch.float16), 0
    else:  # torch converts float64 by way of float32, which rounds twice
        codes, beyond = _FLOAT16.encode(tensor, scale=scale, generator=generator)
    packed = Packed(codes.view(codes_dtype), exponent, beyond)
    if 2 * mantissa < 1 + _SPACING[codes_dtype]:
        # The largest element may have been rounded down to a power of two, and what is stored would now get another
        # exponent. It gets it at once, or storing it again would not be the same; no value changes.
        values = unpack(packed, tensor.dtype)
        if float(values.abs().max()) == math.ldexp(0.5, power):
            return _pack_scaled(values, codes_dtype, None)
    return packed
