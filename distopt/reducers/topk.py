"""The largest numbers of each gradient, and where they stand."""

import dataclasses
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Gather, Request
from distopt.errors import SettingError
from distopt.reducers.coded import Sent
from distopt.reducers.feedback import FeedbackPlan
from distopt.reducers.memory import is_compressible
from distopt.reducers.reducer import Place, Plan, Reducer, Slot, State
from distopt.reducers.settings import count_of, is_fraction


@dataclasses.dataclass(frozen=True)
class TopK(Reducer):
    """Send the numbers of largest absolute value, each with its index.

    Every rank picks its own, so that what arrives at a rank grows with the number of ranks, though what it sends does
    not: 8 bytes a number. What was not picked is kept for the next step. Vectors, norms and embeddings are sent whole.

    Args:
        fraction: of the numbers of each gradient that are sent, in (0, 1]; at least one number.

    Raises:
        SettingError: if ``fraction`` is out of its range.

    Source: Aji and Heafield 2017 (arXiv:1704.05021); Lin et al. 2018 (arXiv:1712.01887), without momentum correction.

    Example:
        >>> TopK(0.01)
        TopK(fraction=0.01)
    """

    fraction: float

    def __post_init__(self) -> None:
        if not is_fraction(self.fraction):
            raise SettingError("TopK.fraction", self.fraction, "a number in (0, 1]")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        return _TopKPlan(slots, place, self.fraction)


class _TopKPlan(FeedbackPlan):
    def __init__(self, slots: Sequence[Slot], place: Place, fraction: float) -> None:
        # Indices travel in 32 bits.
        super().__init__(slots, [is_compressible(s) and s.parameter.numel() < 2**31 for s in slots], place)
        self._fraction = fraction

    def compress(
        self, slots: Sequence[Slot], inputs: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Sequence[Sent]]:
        flats = [tensor.flatten() for tensor in inputs]
        counts = [self._count(slot) for slot in slots]
        indices = [flat.abs().topk(count, sorted=False).indices for flat, count in zip(flats, counts, strict=True)]
        values = torch.cat([flat[index] for flat, index in zip(flats, indices, strict=True)])
        message = torch.cat([values.view(torch.int32), torch.cat(indices).to(torch.int32)])
        answer = yield Gather(message)

        wide = values.element_size() // 4
        found, where = answer.split([wide * sum(counts), sum(counts)], dim=1)
        # A copy, as a view of wider numbers must be aligned.
        numbers = found.clone(memory_format=torch.contiguous_format).view(values.dtype).split(counts, dim=1)
        places = where.long().split(counts, dim=1)
        sent: list[Sent] = []
        for tensor, flat, number, place in zip(inputs, flats, numbers, places, strict=True):
            average = torch.zeros_like(flat)
            for theirs, where in zip(number / len(number), place, strict=True):
                average[where] += theirs  # no index twice in a row: no order to get wrong
            own = torch.zeros_like(flat)
            mine = place[self.place.rank]
            own[mine] = flat[mine]
            sent.append(Sent(average.view_as(tensor), own.view_as(tensor)))
        return sent

    def bytes_of(self, slot: Slot) -> int:
        number = 8 if slot.parameter.dtype == torch.float64 else 4
        return self._count(slot) * (number + 4)

    def _count(self, slot: Slot) -> int:
        return count_of(self._fraction, slot.parameter.numel())
