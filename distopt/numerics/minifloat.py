"""Floating-point formats of at most 16 bits that the hardware does not know, DALL-E's 1-6-9 above all.

A format is written sign-exponent-significand, in bits. There are subnormals, and no codes for infinity or NaN: the top
exponent holds ordinary numbers. Nothing can be summed in these formats; they are for storage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.errors import SettingError

PIECE = 1 << 18
"""Elements that the CPU works on at a time, so that the temporaries stay in its cache."""


class _Layout(NamedTuple):
    """How a hardware format lays out its bits."""

    integer: torch.dtype
    bits: int
    significand: int
    bias: int


_LAYOUTS = {
    torch.float32: _Layout(torch.int32, 32, 23, 127),
    torch.float64: _Layout(torch.int64, 64, 52, 1023),
}


@dataclass(frozen=True)
class MiniFloat:
    """A floating-point format of at most 16 bits, with subnormals, without infinity and NaN.

    The value of a code with exponent field E and significand field S, of s bits, is ``2**(E - bias) * (1 + S / 2**s)``,
    and ``2**(1 - bias) * S / 2**s`` where E is 0. As codes of one sign are in the order of their values, the next code
    is the next value.

    Args:
        sign_bits: 1, or 0 for a format that has no negative numbers.
        exponent_bits: at least 1.
        significand_bits: at least 1, without the implicit one.
        bias: what is taken off the exponent field. Every value must be a normal float32.

    Raises:
        SettingError: a field is out of range, or the sum of the bits is above 16.

    Example:
        >>> FLOAT_1_6_9.max, FLOAT_1_6_9.smallest_normal == 2.0**-59
        (15.984375, True)
    """

    sign_bits: int
    exponent_bits: int
    significand_bits: int
    bias: int

    def __post_init__(self) -> None:
        if self.sign_bits not in (0, 1):
            raise SettingError("MiniFloat.sign_bits", self.sign_bits, "0 or 1")
        if self.exponent_bits < 1:
            raise SettingError("MiniFloat.exponent_bits", self.exponent_bits, "at least 1")
        room = 16 - self.sign_bits - self.exponent_bits
        if not 1 <= self.significand_bits <= room:
            raise SettingError("MiniFloat.significand_bits", self.significand_bits, f"from 1 to {room}, 16 bits in all")
        # The lower bound leaves room to add 2**(23 - s) units to the largest value in float32.
        low, high = 2**self.exponent_bits - 105 - self.significand_bits, 127 - self.significand_bits
        if not low <= self.bias <= high:
            raise SettingError("MiniFloat.bias", self.bias, f"from {low} to {high}, to stay in float32's range")

    @property
    def max(self) -> float:
        """The largest value."""
        return (2 - 2.0**-self.significand_bits) * 2.0 ** (2**self.exponent_bits - 1 - self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest value that has all its significant bits."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest value above zero."""
        return 2.0 ** (1 - self.bias - self.significand_bits)

    def encode(
        self, tensor: Tensor, *, scale: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """Round ``tensor * scale`` to the format.

        To the nearest value, ties to the even code; or, with a generator, stochastically: to one of the two neighbours,
        with probabilities that make the mean the input. That is exact for normal results, and to 2**-24 of the smallest
        subnormal beneath them.

        Args:
            tensor: any shape; float32 or float64, anything narrower is widened first. It is not changed.
            scale: a power of two that ``tensor``'s dtype can hold.
            generator: on the tensor's device. The bits drawn depend on the device's type.

        Returns:
            The codes, int16, contiguous, in the tensor's shape; and how many elements were beyond ``max`` and became
            ``max``. The sign of zero is kept.

        Raises:
            ValueError: a value is NaN or infinite, or negative where the format has no sign. Nothing is encoded then.

        Example:
            >>> codes, clamped = FLOAT_1_6_9.encode(torch.tensor([1.0, -0.3, 17.0]))
            >>> FLOAT_1_6_9.decode(codes).tolist(), clamped
            ([1.0, -0.2998046875, 15.984375], 1)
        """
        tensor = tensor.detach()
        if tensor.dtype not in _LAYOUTS:
            tensor = tensor.float()
        low, high = finite_range(tensor)
        if low < 0 and not self.sign_bits:
            raise ValueError(f"a negative value ({low:g}) cannot be stored in a format without sign")
        too_large = max(-low, high) * scale > self.max
        clamped = int((tensor.abs() > self.max / scale).sum()) if too_large else 0
        return piecewise(lambda piece: self._encode(piece, scale, generator), tensor, torch.int16), clamped

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32, *, scale: float | Tensor = 1.0) -> Tensor:
        """Give the values of codes, times ``scale``, exactly.

        Args:
            codes: int16, any shape.
            dtype: float32 or float64.
            scale: a power of two; a 0-dimensional tensor on the codes' device is not read by the host. The products
                must be in ``dtype``'s range.

        Returns:
            ``dtype``, contiguous, in the shape of ``codes``.

        Example:
            >>> FLOAT_1_6_9.decode(torch.tensor([0, 1, 512], dtype=torch.int16)).log2().tolist()
            [-inf, -68.0, -59.0]
        """
        return piecewise(lambda piece: self._decode(piece).to(dtype).mul_(scale), codes, dtype)

    def _encode(self, piece: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
        layout = _LAYOUTS[piece.dtype]
        bits = torch.mul(piece, scale).view(layout.integer)
        place = self.exponent_bits + self.significand_bits
        sign = bits.bitwise_right_shift(layout.bits - 1 - place).bitwise_and_(self.sign_bits << place)
        top = layout.bias - self.bias + 2**self.exponent_bits
        largest = (top << layout.significand) - (1 << layout.significand - self.significand_bits)
        bits.bitwise_and_((1 << layout.bits - 1) - 1).clamp_max_(largest)
        codes = self._nearest(bits, layout) if generator is None else self._stochastic(bits, layout, generator)
        return codes.bitwise_or_(sign)

    def _nearest(self, bits: Tensor, layout: _Layout) -> Tensor:
        """Codes of magnitudes given by their bits, which are overwritten."""
        floating = torch.float32 if layout.bits == 32 else torch.float64
        drop = layout.significand - self.significand_bits
        lowest = layout.bias - self.bias + 1 << layout.significand
        raised = drop << layout.significand
        # A number 2**drop binades above the value's own has the format's spacing as its unit in the last place: adding
        # it lets the hardware round. The difference in bits is the value in units of that spacing.
        unit = bits.bitwise_and(~((1 << layout.significand) - 1)).clamp_min_(lowest).add_(raised)
        bits.view(floating).add_(unit.view(floating))
        return bits.sub_(unit).add_(unit.sub_(lowest + raised).bitwise_right_shift_(drop))

    def _stochastic(self, bits: Tensor, layout: _Layout, generator: torch.Generator) -> Tensor:
        """Codes of magnitudes given by their bits, which are overwritten."""
        lowest = layout.bias - self.bias + 1 << layout.significand
        # Zero becomes the largest integer here, so that zeros do not call for the slower lines below.
        least = bits.sub(1).bitwise_and_((1 << layout.bits - 1) - 1).amin()
        where, subnormal = None, None
        if int(least) < lowest - 1:
            where = ((bits > 0) & (bits < lowest)).nonzero().squeeze(1)
            floating = torch.float32 if layout.bits == 32 else torch.float64
            units = bits[where].view(floating) / self.smallest_subnormal
            draw = torch.rand(units.shape, generator=generator, dtype=floating, device=bits.device)
            subnormal = units.floor() + (draw < units.frac())
        drop = layout.significand - self.significand_bits
        dither_(bits, drop, generator).bitwise_right_shift_(drop)
        bits.sub_(layout.bias - self.bias << self.significand_bits).clamp_min_(0)
        if where is not None and subnormal is not None:
            bits[where] = subnormal.to(layout.integer)
        return bits

    def _decode(self, codes: Tensor) -> Tensor:
        place = self.exponent_bits + self.significand_bits
        bits = codes.to(torch.int32)
        sign = bits.bitwise_left_shift(31 - place).bitwise_and_(-self.sign_bits << 31)
        bits.bitwise_and_((1 << place) - 1).bitwise_left_shift_(23 - self.significand_bits)
        values = bits.add_(127 - self.bias << 23).view(torch.float32)
        # Exact for normal codes already. A subnormal one reads as 2**-bias * (1 + x) and should be 2**(1 - bias) * x.
        excess = values.clamp_min(self.smallest_normal)
        values.add_(torch.sub(values, excess, out=excess))
        return bits.bitwise_or_(sign).view(torch.float32)


FLOAT_1_6_9 = MiniFloat(1, 6, 9, bias=60)
"""DALL-E's format for residuals and factors, largest value just below 16.
Source: Ramesh et al. 2021 (arXiv:2102.12092), appendices D and E; the bias follows from the largest value."""

FLOAT_0_6_10 = MiniFloat(0, 6, 10, bias=60)
"""DALL-E's format for Adam's variance, which has no sign; largest value just below 16, from the same source."""


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2 to an integer power, exactly, within the normal numbers of ``dtype``; `torch.ldexp` overflows on the way.

    Example:
        >>> power_of_two(torch.tensor([3, -126]), torch.float32).log2().tolist()
        [3.0, -126.0]
    """
    return (exponent.to(torch.int64) + 1023).bitwise_left_shift_(52).view(torch.float64).to(dtype)


def finite_range(tensor: Tensor) -> tuple[float, float]:
    """Give the smallest and the largest element, in one pass.

    Args:
        tensor: floating point, any shape. Reads the values on the host: on an accelerator it synchronises.

    Returns:
        The two, and two zeros for an empty tensor.

    Raises:
        ValueError: an element is NaN or infinite.

    Example:
        >>> finite_range(torch.tensor([1.0, -2.0]))
        (-2.0, 1.0)
    """
    if tensor.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    if not (-float("inf") < low <= high < float("inf")):
        raise ValueError("a value that is not finite cannot be stored in fewer bits")
    return low, high


def dither_(bits: Tensor, low: int, generator: torch.Generator) -> Tensor:
    """Add to every integer its own uniform draw from ``0 .. 2**low - 1``, in place.

    Cutting off the ``low`` lowest bits then rounds stochastically, which is unbiased.

    Args:
        bits: int32 or int64, one dimension, with room for the sum.
        low: from 1 to 63.
        generator: on the device of ``bits``.

    Returns:
        ``bits``.

    Example:
        >>> int(dither_(torch.tensor([8]), 2, torch.Generator()) >> 2)
        2
    """
    lane, width = next(pair for pair in ((torch.int16, 16), (torch.int32, 32), (torch.int64, 64)) if low <= pair[1])
    # Drawing is the dearest part: every 64-bit draw serves as many elements as it has room for.
    words = torch.empty(-(-bits.numel() * width // 64), dtype=torch.int64, device=bits.device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(lane)[: bits.numel()].bitwise_right_shift_(width - low)
    return bits.add_(draws).add_(1 << low - 1)


def piecewise(function: Callable[[Tensor], Tensor], tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply an elementwise function to flat pieces of a tensor, so that its temporaries stay small.

    Args:
        function: from a one-dimensional piece to one of the same length.
        tensor: any shape.
        dtype: of the result; what ``function`` returns is converted, integers modulo their range.

    Returns:
        The results, contiguous, in the tensor's shape.

    Example:
        >>> piecewise(torch.neg, torch.ones(2, 1), torch.int16).tolist()
        [[-1], [-1]]
    """
    flat = tensor.reshape(-1)
    result = torch.empty(flat.shape, dtype=dtype, device=tensor.device)
    if flat.numel() <= PIECE or tensor.device.type != "cpu":
        return (result.copy_(function(flat)) if flat.numel() else result).view(tensor.shape)
    for source, target in zip(flat.split(PIECE), result.split(PIECE), strict=True):
        target.copy_(function(source))
    return result.view(tensor.shape)
