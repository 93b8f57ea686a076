"""How a tensor is worked on in pieces: blocks in the order of memory, and the random draws that belong to them."""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.numerics.gaussian import seeded_generator

BLOCK = 1 << 12
"""Numbers that share a scale: as many as a GPU's multiprocessor holds in its registers, moments, parameter and all."""

_AT_A_TIME = 16
"""Blocks that a thread of the CPU works on at a time, so that the temporaries stay in its cache."""

_CYCLE = 1 << 16
_SHIFT = 97
_MOST_BLOCKS = 1024


class Piece(NamedTuple):
    """Some neighbouring blocks of a flat tensor, all of the same length."""

    begin: int
    end: int
    block: int  # the first one's number
    blocks: int

    def of(self, flat: Tensor) -> Tensor:
        """This piece of a flat tensor, one row a block."""
        return flat[self.begin : self.end].view(self.blocks, -1)

    def scales(self, scales: Tensor) -> Tensor:
        """The scales of its blocks, one row a block."""
        return scales[self.block : self.block + self.blocks].unsqueeze(1)


def pieces(count: int, device: torch.device) -> Iterator[Piece]:
    """Cut a flat tensor into what is worked on at a time: some blocks for each thread of the CPU, many elsewhere.

    Example:
        >>> [piece.end for piece in pieces(BLOCK + 5, torch.device("cpu"))][-1] == BLOCK + 5
        True
    """
    full = count // BLOCK
    most = min(torch.get_num_threads() * _AT_A_TIME, _MOST_BLOCKS) if device.type == "cpu" else _MOST_BLOCKS
    for first in range(0, full, most):
        blocks = min(most, full - first)
        yield Piece(first * BLOCK, (first + blocks) * BLOCK, first, blocks)
    if count % BLOCK:
        yield Piece(full * BLOCK, count, full, 1)


def in_memory_order(tensor: Tensor, layout: Tensor) -> Tensor:
    """Flatten a tensor in the order in which another's elements lie in memory.

    Args:
        tensor: any.
        layout: of the same shape.

    Returns:
        One dimension; a view where ``tensor``'s memory is in that order without gaps, a copy otherwise.

    Example:
        >>> a = torch.arange(6.0).view(2, 3).T
        >>> in_memory_order(a, a).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if layout.is_contiguous():
        return tensor.reshape(-1)
    order = sorted(range(layout.dim()), key=lambda side: -layout.stride(side))
    return tensor.permute(order).reshape(-1)


@functools.cache
def _pool(bits: int, device: torch.device) -> Tensor:
    """Every number of 16 bits once, shuffled, cut to its upper bits, and repeated as far as a piece may reach."""
    order = torch.randperm(_CYCLE, generator=seeded_generator("noise of moments"), device="cpu") >> 16 - bits
    return order.repeat(3)[: _CYCLE + _MOST_BLOCKS * _SHIFT + BLOCK].to(device, torch.int32)


class Noise:
    """Uniform draws for the rounding of one tensor in one step, the same on every device, Triton's edition apart.

    They are read from a fixed shuffled cycle of 2**16 numbers, each of which occurs once, from a place that the key
    decides; each block begins 97 places after the one before. Over the keys, the draw for one element is exactly
    uniform. Drawing afresh would cost as much as the rest of the step.

    Args:
        key: what the draws are for: a seed, a step, the number of a parameter, a moment.

    Example:
        >>> piece = next(pieces(4, torch.device("cpu")))
        >>> Noise(0, 1, "mean").draws(piece, 2, torch.device("cpu")).shape
        torch.Size([1, 4])
    """

    def __init__(self, *key: int | str) -> None:
        self._start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") % _CYCLE

    def draws(self, piece: Piece, bits: int, device: torch.device) -> Tensor:
        """Give a draw from ``0 .. 2**bits - 1`` for each element of a piece, int32, one row a block."""
        start = (self._start + piece.block * _SHIFT) % _CYCLE
        length = (piece.end - piece.begin) // piece.blocks
        return _pool(bits, device).as_strided((piece.blocks, length), (_SHIFT, 1), start)
