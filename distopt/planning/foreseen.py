"""The collectives of a step, from the shapes of its gradients alone.

`distopt.reducers.rehearsal` has the reducer's own code say the same, which takes a hundred times as long: too long for
everything that a plan compares. The tests hold the two together.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch

from distopt.numerics.codecs import Codec, FloatCodec, PlainCodec
from distopt.numerics.matricize import nearest_to_square
from distopt.reducers.memory import is_compressible, working_dtype
from distopt.reducers.reducer import Slot
from distopt.reducers.rehearsal import Asked

WHOLE, HALF = "whole", "16 bits"
Way: TypeAlias = Literal["whole", "16 bits"] | int
"""How a gradient is sent; a number is the rank of its factors."""


def collectives(
    slots: Sequence[Slot],
    ways: Sequence[Way],
    peers: int,
    *,
    passes: Literal["both", "alternate"] = "both",
    wire_dtype: torch.dtype | None = None,
    step: int = 0,
) -> list[Asked]:
    """What one bucket asks for.

    Args:
        slots: of the bucket, all of one dtype.
        ways: how each is sent.
        peers: ranks that average.
        passes: as for `PowerSGD`.
        wire_dtype: what factors travel in, if not in what they are computed in.
        step: whose it is; of no matter unless factors take turns.

    Returns:
        The collectives, in the order of low rank and whole, then 16 bits.
    """
    ranked = [(slot, way) for slot, way in zip(slots, ways, strict=True) if isinstance(way, int)]
    whole = sum(slot.parameter.numel() for slot, way in zip(slots, ways, strict=True) if way == WHOLE)
    found: list[Asked] = []
    if not ranked:
        if whole:
            found.append(Asked("average", whole * slots[0].parameter.element_size()))
    else:
        dtype = working_dtype(ranked[0][0])
        sides = {"left": 0, "right": 0}
        for slot, rank in ranked:
            shape = nearest_to_square(slot.parameter.shape)
            sides["left"] += min(shape) * rank
            sides["right"] += max(shape) * rank
        both = ["left", "right"] if passes == "both" else [["left", "right"][step % 2]]
        for place, side in enumerate(both):
            beside = whole if place == 0 else 0
            if wire_dtype is None or wire_dtype == torch.float32:
                found.append(Asked("average", (beside + sides[side]) * dtype.itemsize))
            else:
                parts: list[tuple[int, Codec]] = [(sides[side], FloatCodec(wire_dtype))]
                found += _coded([*parts, (beside, PlainCodec())] if beside else parts, peers, dtype)
    halved = [slot for slot, way in zip(slots, ways, strict=True) if way == HALF]
    return found + _cast(halved, peers)


def _cast(slots: Sequence[Slot], peers: int) -> list[Asked]:
    chosen = [slot for slot in slots if _may_be_cast(slot)]
    rest = sum(slot.parameter.numel() * slot.parameter.element_size() for slot in slots if not _may_be_cast(slot))
    found = [Asked("average", rest)] if rest else []
    parts: list[tuple[int, Codec]] = [(slot.parameter.numel(), FloatCodec(torch.bfloat16)) for slot in chosen]
    return found + (_coded(parts, peers, working_dtype(chosen[0])) if chosen else [])


def _may_be_cast(slot: Slot) -> bool:
    return slot.parameter.is_floating_point() and slot.parameter.numel() > 0


def _coded(parts: Sequence[tuple[int, Codec]], peers: int, dtype: torch.dtype) -> list[Asked]:
    """One row of codes for each rank, and the way back of one's own; see `distopt.reducers.coded`."""
    row = sum(codec.nbytes(math.ceil(numbers / peers), dtype) for numbers, codec in parts)
    return [Asked("swap", peers * row), Asked("gather", row)]


def sent(asked: Sequence[Asked]) -> int:
    """What `Communicator` counts: the way back of a coded average is left out."""
    return sum(collective.nbytes for collective in asked if collective.kind != "gather")


def numbers_sent(slot: Slot, way: Way) -> int:
    """Numbers that a gradient is sent as, in all factors."""
    if isinstance(way, int):
        return sum(nearest_to_square(slot.parameter.shape)) * way
    return slot.parameter.numel()


def width_of(slot: Slot, way: Way, wire_dtype: torch.dtype | None) -> int:
    """Bytes of each of these numbers."""
    if way == HALF:
        return min(2, slot.parameter.element_size())
    if way == WHOLE:
        return slot.parameter.element_size()
    return (wire_dtype or working_dtype(slot)).itemsize


def may_be_ranked(slot: Slot, rank: int, least_saving: float, wire_dtype: torch.dtype | None) -> bool:
    """Whether `PowerSGD` would compress a gradient at this rank."""
    if not is_compressible(slot):
        return False
    before = slot.parameter.numel() * slot.parameter.element_size()
    return 1 - numbers_sent(slot, rank) * width_of(slot, rank, wire_dtype) / before >= least_saving
