"""The exact average: what `DistributedDataParallel` does by itself, bit for bit."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.reducers.memory import flush, forget
from distopt.reducers.reducer import Bucket, Place, Plan, Proposal, Reducer, Reduction, Slot, State


@dataclasses.dataclass(frozen=True)
class AllReduce(Reducer):
    """Average every gradient exactly.

    The baseline of every comparison, with the same guard as the other reducers: if a gradient is not finite on one
    rank, all ranks see it in every parameter of that step. Residuals that an earlier reducer left are sent with the
    first gradient.

    Example:
        >>> AllReduce()
        AllReduce()
    """

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        return AllReducePlan(slots)


class AllReducePlan(Plan):
    """One collective in the gradients' own dtype.

    Args:
        slots: of the bucket; without them, residuals are left alone.
    """

    def __init__(self, slots: Sequence[Slot] = ()) -> None:
        self._slots = slots

    def describe(self) -> str:
        """See `Plan.describe`."""
        return "sent whole"

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        flushed = flush(self._slots, bucket.gradients[: len(self._slots)], state)
        flat = bucket.flat if bucket.flat is not None else torch.cat(list(bucket.segments))
        if flat.numel() > 0:
            flat = yield flat

        def commit() -> None:
            if bucket.flat is None:
                split_into(bucket.segments, flat)
            forget(flushed, state)

        return Proposal(commit)


def split_into(segments: Sequence[Tensor], flat: Tensor) -> None:
    """Copy consecutive pieces of ``flat`` to ``segments``."""
    if segments:
        pieces = flat.split_with_sizes([segment.numel() for segment in segments])
        torch._foreach_copy_(list(segments), pieces)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
