"""The exact average: what `DistributedDataParallel` does by itself, bit for bit."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.reducers.reducer import Bucket, Plan, Proposal, Reducer, Reduction, Slot, State


@dataclasses.dataclass(frozen=True)
class AllReduce(Reducer):
    """Average every gradient exactly.

    The baseline of every comparison, with the same guard as the other reducers: if a gradient is not finite on one
    rank, all ranks see it in every parameter of that step.

    Example:
        >>> AllReduce()
        AllReduce()
    """

    def plan(self, slots: Sequence[Slot]) -> Plan:
        """See `Reducer.plan`."""
        return AllReducePlan()


class AllReducePlan(Plan):
    """One collective in the gradients' own dtype."""

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        flat = bucket.flat if bucket.flat is not None else torch.cat(list(bucket.segments))
        if flat.numel() > 0:
            flat = yield flat
        if bucket.flat is not None:
            return Proposal(lambda: None)
        return Proposal(lambda: split_into(bucket.segments, flat))


def split_into(segments: Sequence[Tensor], flat: Tensor) -> None:
    """Copy consecutive pieces of ``flat`` to ``segments``."""
    for segment, piece in zip(segments, flat.split([s.numel() for s in segments]), strict=True):
        segment.copy_(piece)
