"""A random choice of each gradient's numbers, the same on all ranks."""

import dataclasses
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.errors import SettingError
from distopt.numerics.gaussian import seeded_generator
from distopt.reducers.coded import Sent
from distopt.reducers.feedback import FeedbackPlan
from distopt.reducers.memory import is_compressible
from distopt.reducers.reducer import Place, Plan, Reducer, Slot, State
from distopt.reducers.settings import count_of, is_fraction, is_integer


@dataclasses.dataclass(frozen=True)
class RandomK(Reducer):
    """Send numbers at random places, drawn anew at every step from a seed that all ranks share.

    Each gradient is cut into as many equal pieces as numbers are sent, and one number is drawn from each piece. As the
    ranks pick the same places, no index is sent and an all-reduce averages them. What was not picked is kept for the
    next step, so the numbers are not scaled up. Vectors, norms and embeddings are sent whole.

    Args:
        fraction: of the numbers of each gradient that are sent, in (0, 1]; at least one number.
        seed: of the choice, the same on all ranks.

    Raises:
        SettingError: if a setting is out of its range.

    Source: Stich et al. 2018 (arXiv:1809.07599), sparsified SGD with memory.

    Example:
        >>> RandomK(0.01)
        RandomK(fraction=0.01, seed=0)
    """

    fraction: float
    _: dataclasses.KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_fraction(self.fraction):
            raise SettingError("RandomK.fraction", self.fraction, "a number in (0, 1]")
        if not is_integer(self.seed):
            raise SettingError("RandomK.seed", self.seed, "an integer")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        return _RandomKPlan(slots, place, self.fraction, self.seed)


class _RandomKPlan(FeedbackPlan):
    def __init__(self, slots: Sequence[Slot], place: Place, fraction: float, seed: int) -> None:
        super().__init__(slots, [is_compressible(slot) for slot in slots], place)
        self._fraction = fraction
        self._seed = seed

    def compress(
        self, slots: Sequence[Slot], inputs: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Sequence[Sent]]:
        flats = [tensor.flatten() for tensor in inputs]
        places = [self._places(slot, state.step).to(flat.device) for slot, flat in zip(slots, flats, strict=True)]
        values = torch.cat([flat[place] for flat, place in zip(flats, places, strict=True)])
        answer = yield values
        averages = answer.split([len(place) for place in places])
        sent: list[Sent] = []
        for tensor, flat, place, values in zip(inputs, flats, places, averages, strict=True):
            average, own = torch.zeros_like(flat), torch.zeros_like(flat)
            average[place] = values
            own[place] = flat[place]
            sent.append(Sent(average.view_as(tensor), own.view_as(tensor)))
        return sent

    def bytes_of(self, slot: Slot) -> int:
        return self._count(slot) * max(4, slot.parameter.element_size())

    def _count(self, slot: Slot) -> int:
        return count_of(self._fraction, slot.parameter.numel())

    def _places(self, slot: Slot, step: int) -> Tensor:
        # One from each piece: distinct without a permutation of all places, which takes longer than all the rest.
        count = self._count(slot)
        ends = torch.arange(count + 1) * slot.parameter.numel() // count
        draws = torch.rand(count, generator=seeded_generator(self._seed, slot.name, step), dtype=torch.float64)
        return ends[:-1] + (draws * ends.diff()).long()
