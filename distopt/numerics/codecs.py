"""Numbers in fewer bits for the wire. A code says all that is needed to read it back.

Each codec works on rows, which it codes one by one: ``(rows, k)`` numbers become ``(rows, bytes)``. A number that is
not finite makes its block NaN, or stays what it is: whoever reads the codes sees that something was wrong.
"""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Turns rows of numbers into rows of bytes, and back."""

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Code ``(rows, k)`` float32 or float64 as ``(rows, bytes)`` uint8.

        Args:
            rows: finite or not.
            generator: of the random bits, for codecs that round stochastically; on the CPU.
        """
        ...

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Read ``(rows, bytes)`` uint8 back as ``(rows, columns)`` of ``dtype``."""
        ...

    def nbytes(self, columns: int) -> int:
        """Tell how long the code of a row of ``columns`` float32 numbers is."""
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
        return _read(codes, dtype)

    def nbytes(self, columns: int) -> int:
        """See `Codec.nbytes`."""
        return 4 * columns


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
        exponent = torch.frexp(_largest(rows)).exponent.clamp(-120, 120)
        exponent = torch.where(_largest(rows).isfinite(), exponent, 0) - 15
        scaled = torch.ldexp(rows, -exponent).to(self.dtype)
        return torch.cat([_bytes(exponent.to(torch.int16)), _bytes(scaled)], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        if self.dtype == torch.bfloat16:
            return _read(codes, self.dtype).to(dtype)
        exponent = _read(codes[:, :2], torch.int16).to(torch.int32)
        return torch.ldexp(_read(codes[:, 2:], self.dtype).to(dtype), exponent)

    def nbytes(self, columns: int) -> int:
        """See `Codec.nbytes`."""
        return 2 * columns + (0 if self.dtype == torch.bfloat16 else 2)


@dataclasses.dataclass(frozen=True)
class IntegerCodec:
    """Round stochastically to a few equal steps up to the largest number of a block.

    Args:
        bits: 8 or 4: 127 or 7 steps to either side of zero.
        block: how many numbers share a scale, of four bytes.

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
        scale = blocks.abs().amax(dim=2, keepdim=True).float()
        steps = self._steps
        unit = torch.where(scale > 0, blocks.float() / scale, 0.0) * steps
        noise = torch.rand(unit.shape, generator=generator).to(unit.device)
        whole = (unit + noise).floor_().clamp_(-steps, steps)
        scale = torch.where(blocks.isfinite().all(dim=2, keepdim=True), scale, math.nan)
        levels = (whole.nan_to_num_(0.0) + steps).to(torch.uint8).flatten(1)[:, : _padded(rows.shape[1], 2)]
        if self.bits == 4:
            levels = levels[:, 0::2] | (levels[:, 1::2] << 4)
        return torch.cat([_bytes(scale.flatten(1)), levels], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        count = -(-columns // self.block)
        scale = _read(codes[:, : 4 * count], torch.float32)[:, :, None]
        levels = codes[:, 4 * count :]
        if self.bits == 4:
            levels = torch.stack([levels & 15, levels >> 4], dim=2).flatten(1)
        unit = (_blocks(levels.to(dtype), self.block) - self._steps) / self._steps
        return (unit * scale).flatten(1)[:, :columns]

    def nbytes(self, columns: int) -> int:
        """See `Codec.nbytes`."""
        return 4 * -(-columns // self.block) + _padded(columns, 2) * self.bits // 8

    @property
    def _steps(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class SignCodec:
    """One bit a number, its sign, and the mean absolute value of a block.

    Args:
        block: how many numbers share a scale, of four bytes; a multiple of 8.

    Source: signSGD with error feedback, Karimireddy et al. 2019 (arXiv:1901.09847). Zero counts as positive.

    Example:
        >>> codec = SignCodec()
        >>> codec.decode(codec.encode(torch.tensor([[1.0, -3.0]]), None), 2, torch.float32)
        tensor([[ 2., -2.]])
    """

    block: int = 512

    def encode(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Codec.encode`."""
        columns = rows.shape[1]
        blocks = _blocks(rows, self.block)
        counts = torch.full((blocks.shape[1],), self.block, device=rows.device)
        counts[-1] = columns - self.block * (blocks.shape[1] - 1)
        # Relative to the largest, so that the sum can neither overflow nor vanish.
        largest = _largest(blocks)
        relative = blocks / torch.where(largest > 0, largest, 1)
        scale = relative.abs().sum(dim=2) / counts * largest[:, :, 0]
        bits = (blocks >= 0).flatten(1)[:, : _padded(columns, 8)].reshape(len(rows), -1, 8).to(torch.uint8)
        weights = 2 ** torch.arange(8, dtype=torch.uint8, device=rows.device)
        packed = (bits * weights).sum(dim=2, dtype=torch.uint8)
        return torch.cat([_bytes(scale.float()), packed], dim=1)

    def decode(self, codes: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        count = -(-columns // self.block)
        scale = _read(codes[:, : 4 * count], torch.float32).to(dtype)[:, :, None]
        shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
        bits = (codes[:, 4 * count :, None] >> shifts) & 1
        signs = _blocks(bits.flatten(1).to(dtype), self.block) * 2 - 1
        return (signs * scale).flatten(1)[:, :columns]

    def nbytes(self, columns: int) -> int:
        """See `Codec.nbytes`."""
        return 4 * -(-columns // self.block) + _padded(columns, 8) // 8


def _padded(columns: int, unit: int) -> int:
    """The least multiple of ``unit`` that is not less."""
    return -(-columns // unit) * unit


def _blocks(rows: Tensor, block: int) -> Tensor:
    """The rows as ``(rows, blocks, block)``, filled up with zeros."""
    missing = -rows.shape[1] % block
    return torch.nn.functional.pad(rows, (0, missing)).view(len(rows), -1, block)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=-1, keepdim=True)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def _read(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.clone(memory_format=torch.contiguous_format).view(dtype)  # a slice may start anywhere
