"""The average of numbers that travel in fewer bits, and nothing of them lost on the way.

A sum of codes is not a code, so an all-reduce is no use. Instead each rank owns a part of the numbers: it is sent the
codes of all ranks for its part, adds them up in full precision, codes the average again, and gives it to all. Bytes per
rank do not grow with the number of ranks.

Source: the two phases of 1-bit Adam, Tang et al. 2021 (arXiv:2102.02888), section 5, with one residual instead of two.
"""

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.comm.requests import Gather, Request, Swap
from distopt.numerics.codecs import Codec
from distopt.numerics.finite import all_finite
from distopt.numerics.gaussian import seeded_generator_on
from distopt.reducers.reducer import Place


class Sent(NamedTuple):
    """What came of sending a tensor.

    Args:
        average: over the ranks, the same on all of them.
        own: this rank's part in it: these, averaged over the ranks, are ``average``. What differs from what the rank
            wanted to send is its residual.
    """

    average: Tensor
    own: Tensor


class Coded(NamedTuple):
    """A one-dimensional tensor to be averaged, and the codec it travels in."""

    tensor: Tensor
    codec: Codec


def coded_average(parts: Sequence[Coded], place: Place, *key: int | str) -> Generator[Request, Tensor, list[Sent]]:
    """Average tensors that travel coded; one round, whatever their number.

    The owner's second rounding is taken off its own share, so that nothing is lost: the shares of all ranks average to
    what was delivered. Where that share, or what the owner would have to keep, is beyond the range of its dtype, the
    average is NaN: the other ranks must know of it.

    Args:
        parts: not empty, float32 or float64, at least one number in all.
        place: of this rank.
        key: what random bits are drawn from, together with the rank.

    Returns:
        One `Sent` a part. It holds NaN or infinities wherever an input did.
    """
    world = place.world_size
    generator = seeded_generator_on(parts[0].tensor.device, *key, place.rank)
    rows = [_rows(part.tensor, world) for part in parts]
    codes = [part.codec.encode(r, generator) for part, r in zip(parts, rows, strict=True)]
    sizes = [code.shape[1] for code in codes]

    answer = yield Swap(torch.cat(codes, dim=1))
    owned = [
        _average_owned(part.codec, code, r, place, generator)
        for part, code, r in zip(parts, answer.split(sizes, dim=1), rows, strict=True)
    ]
    answer = yield Gather(torch.cat([back for back, _ in owned], dim=1)[0], returning=True)

    result: list[Sent] = []
    for part, r, code, (_, share), back in zip(parts, rows, codes, owned, answer.split(sizes, dim=1), strict=True):
        average = part.codec.decode(back, r.shape[1], r.dtype)
        own = part.codec.decode(code, r.shape[1], r.dtype)
        own[place.rank] = share
        numel = part.tensor.numel()
        result.append(Sent(average.flatten()[:numel], own.flatten()[:numel]))
    return result


def _average_owned(
    codec: Codec, codes: Tensor, rows: Tensor, place: Place, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What all ranks sent of the row that this one owns: the code of its average, and this rank's share in that."""
    world, columns = rows.shape
    decoded = codec.decode(codes, columns, rows.dtype)
    # Smaller by a power of two, which costs no bit, so that the sum stays within range.
    down = 2.0 ** -(world - 1).bit_length()
    total = decoded[0] * down
    for row in decoded[1:]:  # in the order of ranks, so that no backend's habits matter
        total.add_(row, alpha=down)
    mean = total.div_(world * down)
    back = codec.encode(mean[None], generator)
    share = (codec.decode(back, columns, rows.dtype)[0] - mean).mul_(world).add_(decoded[place.rank])
    if not (all_finite(share) and all_finite(rows[place.rank] - share)):
        back = codec.encode(torch.full_like(mean, math.nan)[None], generator)
    return back, share


def _rows(tensor: Tensor, world: int) -> Tensor:
    """The tensor cut into as many equal rows as there are ranks, filled up with zeros."""
    missing = -tensor.numel() % world
    return (torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor).view(world, -1)
