"""Numbers in fewer bits for the wire. A code says all that is needed to read it back.

Each codec works on rows, which it codes one by one: ``(rows, k)`` numbers become ``(rows, bytes)``. Where a number is
not finite, everything that shares a scale with it is read back as not finite: whoever reads the codes sees that
something was wrong.
"""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from distopt.numerics.minifloat import piecewise, power_of_two

_GATHER_BITS = 0x0102040810204080  # times eight bytes of 0 or 1: the highest byte of the product has their bits
_SPREAD_BITS = 0x0101010101010101  # times one byte: eight copies
_BIT_OF_BYTE = 0x8040201008040201 - (1 << 64)  # bit i in byte i


class Codec(Protocol):
    """Turns rows of numbers into rows of bytes, and back."""

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Code ``(rows, k)`` float32 or float64, k at least 1, as ``(rows, bytes)`` uint8.

        Args:
            rows: finite or not. It is not changed.
            generator: of the random bits, for codecs that round stochastically; on the device of ``rows``.
        """
        ...

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Read ``(rows, bytes)`` uint8 back as ``(rows, columns)``, new memory.

        Args:
            codes: as `encode` gave them; their rows may lie apart.
            columns: of the numbers that were coded.
            dtype: of the numbers that were coded, and of the result.
        """
        ...

    def nbytes(self, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """Tell how long the code of a row of ``columns`` numbers of ``dtype`` is."""
        ...


@dataclasses.dataclass(frozen=True)
class PlainCodec:
    """No loss: the bytes of the numbers themselves.

    Example:
        >>> codec = PlainCodec()
        >>> codec.decode(codec.encode(torch.tensor([[0.1, 0.2]]), None), 2, torch.float32)
        tensor([[0.1000, 0.2000]])
    """

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Codec.encode`."""
        return _bytes(rows)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        return _read(codes, dtype).clone()

    def nbytes(self, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """See `Codec.nbytes`."""
        return dtype.itemsize * columns


@dataclasses.dataclass(frozen=True)
class FloatCodec:
    """Round to the nearest number of a shorter floating-point type.

    float16, whose range is narrow, gets a power of two for each row, by which its largest number comes to lie near the
    top of the range: nothing overflows, and the unit of the numbers does not matter.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Example:
        >>> codec = FloatCodec(torch.float16)
        >>> codec.decode(codec.encode(torch.tensor([[2.0**30, 1.0]]), None), 2, torch.float32)
        tensor([[1.0737e+09, 1.0000e+00]])
    """

    dtype: torch.dtype

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Codec.encode`."""
        if self.dtype == torch.bfloat16:
            return _bytes(rows.to(self.dtype))
        largest = _largest(rows)
        least = math.frexp(torch.finfo(rows.dtype).tiny)[1] - 1  # the scale and its inverse are normal numbers
        exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1)).exponent.sub_(15).clamp_min_(least)
        scaled = (rows * power_of_two(-exponent, rows.dtype)).to(self.dtype)
        return torch.cat([_bytes(exponent.to(torch.int16)), _bytes(scaled)], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        if self.dtype == torch.bfloat16:
            return _read(codes, self.dtype).to(dtype)
        exponent = _read(codes[:, :2], torch.int16)
        return _read(codes[:, 2:], self.dtype).to(dtype).mul_(power_of_two(exponent, dtype))

    def nbytes(self, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """See `Codec.nbytes`."""
        return 2 * columns + (0 if self.dtype == torch.bfloat16 else 2)


@dataclasses.dataclass(frozen=True)
class IntegerCodec:
    """Round stochastically to a few equal steps up to the largest number of a block.

    The expected value is the number itself, but for 2**-16 of a step.

    Args:
        bits: 8 or 4: 127 or 7 steps to either side of zero.
        block: how many numbers share a scale, which has their dtype; a power of two.

    Source: QSGD, Alistarh et al. 2017 (arXiv:1610.02132), with the largest number in the place of the norm.

    Example:
        >>> codec = IntegerCodec(bits=4)
        >>> codec.encode(torch.randn(1, 512), torch.Generator()).shape
        torch.Size([1, 264])
    """

    bits: int
    block: int = 256

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Codec.encode`."""
        blocks = _blocks(rows, self.block)
        steps = self._steps

        def levels_of(piece: Tensor) -> Tensor:
            numbers = piece.view(-1, self.block)
            scale = _largest(numbers)
            levels = numbers.div(torch.where(scale > 0, scale, 1)).mul_(steps)
            # Cut off. At most 2 * steps + 1 - 2**-16, which float32 holds: no number gets a step too many.
            return levels.add_(_uniform(numbers, generator, steps)).to(torch.int16).view(-1)

        levels = piecewise(levels_of, blocks, torch.uint8).flatten(1)[:, : _padded(rows.shape[1], 2)]
        if self.bits == 4:
            levels = levels[:, 0::2] | (levels[:, 1::2] << 4)
        return torch.cat([_bytes(_largest(blocks).flatten(1)), levels], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        count = -(-columns // self.block)
        scale = _read(codes[:, : dtype.itemsize * count], dtype)[:, :, None]
        levels = codes[:, dtype.itemsize * count :]
        if self.bits == 4:
            levels = torch.stack([levels & 15, levels >> 4], dim=2).flatten(1)
        values = _blocks(levels.to(dtype), self.block).sub_(self._steps).div_(self._steps).mul_(scale)
        return values.flatten(1)[:, :columns]

    def nbytes(self, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """See `Codec.nbytes`."""
        return dtype.itemsize * -(-columns // self.block) + _padded(columns, 2) * self.bits // 8

    @property
    def _steps(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class SignCodec:
    """One bit a number, its sign, and the mean absolute value of a block.

    Args:
        block: how many numbers share a scale, which has their dtype; a multiple of 8.

    Source: signSGD with error feedback, Karimireddy et al. 2019 (arXiv:1901.09847). Zero counts as positive.

    Example:
        >>> codec = SignCodec()
        >>> codec.decode(codec.encode(torch.tensor([[1.0, -3.0]]), None), 2, torch.float32)
        tensor([[ 2., -2.]])
    """

    block: int = 512

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Codec.encode`."""
        blocks = _blocks(rows, self.block)
        counts = torch.full((blocks.shape[1],), self.block, device=rows.device)
        counts[-1] = rows.shape[1] - self.block * (blocks.shape[1] - 1)
        # In float64, where the sum of float32 numbers can neither overflow nor vanish.
        scale = blocks.abs().sum(dim=2, dtype=torch.float64).div_(counts).to(rows.dtype)
        eights = (blocks >= 0).flatten(1).view(torch.int64)
        packed = eights.mul(_GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)
        return torch.cat([_bytes(scale), packed[:, : _padded(rows.shape[1], 8) // 8]], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        count = -(-columns // self.block)
        scale = _read(codes[:, : dtype.itemsize * count], dtype)[:, :, None]
        eights = codes[:, dtype.itemsize * count :].to(torch.int64).mul_(_SPREAD_BITS).bitwise_and_(_BIT_OF_BYTE)
        signs = _blocks(eights.view(torch.uint8).clamp_(max=1).to(dtype), self.block).mul_(2).sub_(1)
        return signs.mul_(scale).flatten(1)[:, :columns]

    def nbytes(self, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """See `Codec.nbytes`."""
        return dtype.itemsize * -(-columns // self.block) + _padded(columns, 8) // 8


def _uniform(like: Tensor, generator: torch.Generator | None, start: int) -> Tensor:
    """Uniform draws from ``start`` up to, not including, ``start + 1``, in steps of 2**-16."""
    # Drawing is the dearest part: every 64-bit draw serves four numbers.
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    return draws.view(like.shape).to(like.dtype).mul_(2.0**-16).add_(start + 0.5)


def _padded(columns: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not less."""
    return -(-columns // unit) * unit


def _blocks(rows: Tensor, block: int) -> Tensor:
    """The rows as ``(rows, blocks, block)``, filled up with zeros; the same memory where nothing is missing."""
    missing = -rows.shape[1] % block
    filled = torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
    return filled.view(len(rows), -1, block)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=-1, keepdim=True)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def _read(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as numbers: the same memory where that can be."""
    aligned = all(place % dtype.itemsize == 0 for place in (codes.storage_offset(), *codes.stride()[:-1]))
    if aligned and codes.stride(-1) == 1:
        return codes.view(dtype)
    return codes.clone(memory_format=torch.contiguous_format).view(dtype)
