"""Adam's moments in 16 bits: how they are laid out, stored and read, without a word from the device to the host.

A moment is cut into blocks of 4096 numbers in the order of the parameter's memory. In the packed formats each block
has a power of two as scale, which follows on the device from the block's largest number. So nothing saturates, whatever
the gradient's unit, and small numbers keep the format's whole range beneath the largest.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distopt.numerics.minifloat import FLOAT_0_6_10, FLOAT_1_6_9, MiniFloat
from distopt.optim.pieces import BLOCK, Noise, Piece, in_memory_order, pieces


class MomentFormat(Protocol):
    """How a moment is stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that holds the codes."""
        ...

    @property
    def scaled(self) -> bool:
        """Whether each block has a scale."""
        ...

    @property
    def dropped(self) -> int:
        """Bits of a float32 that rounding takes off."""
        ...

    def load(self, codes: Tensor, scales: Tensor, factor: float = 1.0) -> Tensor:
        """Give the values times ``factor``, a new float32 tensor."""
        ...

    def store(self, values: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | int) -> None:
        """Round ``values``, which are overwritten, to ``codes`` and ``scales``. The noise is added to what is cut."""
        ...


@dataclass(frozen=True)
class Packed:
    """Codes of a `MiniFloat` with a bias of 60 and six bits of exponent, and a scale for each block.

    The largest number of a block is stored in (4, 8]. Rounding cannot take it out of there, except to 4; hence what has
    been stored is stored again without change, and a checkpoint may hold float32 values.

    A float32 whose exponent field fits into six bits holds the code in its upper bits, subnormals included. So a
    product and a shift are all that storing takes.

    Args:
        form: FLOAT_1_6_9 or FLOAT_0_6_10.
        floor: store what is below the smallest normal number as that number. The divisor of Adam's update must not
            become zero where the numerator has not.
    """

    form: MiniFloat
    floor: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.int16

    @property
    def scaled(self) -> bool:
        """Each block has a scale."""
        return True

    @property
    def dropped(self) -> int:
        """Bits of a float32 that rounding takes off."""
        return 23 - self.form.significand_bits

    def load(self, codes: Tensor, scales: Tensor, factor: float = 1.0) -> Tensor:
        """Give the values times ``factor``.

        Args:
            codes: int16, one row a block.
            scales: float32, one row a block.
            factor: any number.
        """
        if self.form.sign_bits:
            # The sign is extended to the left by the conversion; the two bits below it are not part of the number.
            bits = codes.to(torch.int32).bitwise_left_shift_(self.dropped).bitwise_and_(~(3 << 29))
        else:
            bits = codes.view(torch.uint16).to(torch.int32).bitwise_left_shift_(self.dropped)
        return bits.view(torch.float32).mul_(scales * factor)

    def store(self, values: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | int) -> None:
        """Round to ``codes`` and ``scales``.

        A block with a number that is not finite, or beyond 2**62, gets a scale of NaN, and all its values are NaN.

        Args:
            values: float32, one row a block; overwritten.
            codes: int16, of the same shape, to write to.
            scales: float32, one row a block, to write to.
            noise: what is added to the bits to be cut: uniform draws round stochastically, half the range to nearest.
        """
        inverse = self._choose_scales(values, scales)
        values.mul_(inverse)
        if self.floor:
            values.clamp_min_(torch.finfo(torch.float32).tiny)
        bits = values.view(torch.int32)
        if not self.form.sign_bits:
            codes.copy_(bits.add_(noise).bitwise_right_shift_(self.dropped))
            return
        sign = bits.bitwise_right_shift(16).bitwise_and_(-1 << 15)
        codes.copy_(bits.add_(noise).bitwise_right_shift_(self.dropped).bitwise_or_(sign))

    def _choose_scales(self, values: Tensor, scales: Tensor) -> Tensor:
        """Write the scales, and give what values are to be multiplied by."""
        largest = values.amax(1, keepdim=True)
        if self.form.sign_bits:  # not aminmax, which is not vectorised along a dimension
            largest = torch.maximum(largest, values.amin(1, keepdim=True).neg_())
        # Exponent fields are 127 more than the exponent. That of the largest number is taken one unit below it, so that
        # a power of two belongs to what is below. It is mapped from (4, 8] to where a float32's field fits in six bits.
        field = largest.view(torch.int32).sub(1).bitwise_right_shift_(23).clamp_(0, 188)
        scales.copy_(field.add(65).bitwise_left_shift_(23).view(torch.float32))
        scales.add_(largest.mul_(2.0**66).mul_(0.0))  # NaN where the largest is too large or not a number
        return (189 - field).bitwise_left_shift_(23).view(torch.float32)


@dataclass(frozen=True)
class Brain:
    """bfloat16, which needs no scale."""

    dtype: torch.dtype = torch.bfloat16
    scaled: bool = False
    dropped: int = 16

    def load(self, codes: Tensor, scales: Tensor, factor: float = 1.0) -> Tensor:
        """Give the values times ``factor``."""
        return codes.float().mul_(factor)

    def store(self, values: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | int) -> None:
        """Round to ``codes``; see `Packed.store`."""
        codes.view(torch.int16).copy_(values.view(torch.int32).add_(noise).bitwise_right_shift_(16))


FORMATS: dict[str, tuple[MomentFormat, MomentFormat]] = {
    "bfloat16": (Brain(), Brain()),
    "packed16": (Packed(FLOAT_1_6_9), Packed(FLOAT_0_6_10, floor=True)),
}
"""Of mean and variance, by the setting's name."""


class Stored(NamedTuple):
    """A moment of one parameter as it is kept."""

    form: MomentFormat
    codes: Tensor  # in the parameter's shape and order of memory
    scales: Tensor  # float32, one a block; empty if the format has none

    @classmethod
    def zeros(cls, form: MomentFormat, like: Tensor) -> "Stored":
        """Zeros for a parameter."""
        blocks = -(-like.numel() // BLOCK) if form.scaled else 0
        codes = torch.zeros_like(like, dtype=form.dtype, requires_grad=False)
        return cls(form, codes, torch.zeros(blocks, dtype=torch.float32, device=like.device))

    def decoded(self) -> Tensor:
        """Give the values exactly, float32."""
        values = torch.empty_like(self.codes, dtype=torch.float32)
        source, target = in_memory_order(self.codes, self.codes), in_memory_order(values, self.codes)
        for piece in pieces(source.numel(), source.device):
            piece.of(target).copy_(self.form.load(piece.of(source), self.scales_of(piece)))
        return values

    def encode(self, values: Tensor) -> None:
        """Take values over, rounded to the nearest; what `decoded` gave is taken over exactly.

        Args:
            values: of the parameter's shape, any floating dtype, any device.
        """
        target = in_memory_order(self.codes, self.codes)
        source = in_memory_order(values.detach().to(self.codes.device, torch.float32), self.codes)
        for piece in pieces(target.numel(), target.device):
            numbers = piece.of(source).clone()
            self.form.store(numbers, piece.of(target), self.scales_of(piece), 1 << self.form.dropped - 1)

    def scales_of(self, piece: Piece) -> Tensor:
        """The scales of a piece, one row a block; empty if the format has none."""
        return piece.scales(self.scales) if self.form.scaled else self.scales

    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return sum(each.numel() * each.element_size() for each in (self.codes, self.scales))


class Slot(NamedTuple):
    """A piece of a moment: where to read it from and write it to."""

    moment: Stored
    codes: Tensor  # all of them, flat
    noise: Noise
    piece: Piece

    def load(self, factor: float) -> Tensor:
        """Give the values times ``factor``, a new float32 tensor, one row a block."""
        form = self.moment.form
        return form.load(self.piece.of(self.codes), self.moment.scales_of(self.piece), factor)

    def store(self, values: Tensor) -> None:
        """Round values stochastically; they are overwritten."""
        form, codes = self.moment.form, self.piece.of(self.codes)
        noise = self.noise.draws(self.piece, form.dropped, codes.device)
        form.store(values, codes, self.moment.scales_of(self.piece), noise)
