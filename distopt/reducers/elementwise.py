"""Reducers that code every number of a gradient on its own: what they share."""

from collections.abc import Generator, Sequence

from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.codecs import Codec
from distopt.reducers.coded import Coded, Sent, coded_average
from distopt.reducers.feedback import FeedbackPlan
from distopt.reducers.memory import working_dtype
from distopt.reducers.reducer import Place, Slot, State


class CodedPlan(FeedbackPlan):
    """Sends gradients through a codec, there and back.

    Args:
        slots: of the bucket.
        compressed: which of them are coded, one a slot.
        place: of this rank.
        codec: both ways.
        seed: of its random bits.
    """

    def __init__(
        self, slots: Sequence[Slot], compressed: Sequence[bool], place: Place, codec: Codec, seed: int = 0
    ) -> None:
        super().__init__(slots, compressed, place)
        self._codec = codec
        self._seed = seed

    def compress(
        self, slots: Sequence[Slot], inputs: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Sequence[Sent]]:
        """See `FeedbackPlan.compress`."""
        parts = [Coded(tensor.flatten(), self._codec) for tensor in inputs]
        sent = yield from coded_average(parts, self.place, self._seed, slots[0].name, state.step)
        return [
            Sent(average.view_as(tensor), own.view_as(tensor))
            for (average, own), tensor in zip(sent, inputs, strict=True)
        ]

    def bytes_of(self, slot: Slot) -> int:
        """See `FeedbackPlan.bytes_of`."""
        world = self.place.world_size
        return world * self._codec.nbytes(-(-slot.parameter.numel() // world), working_dtype(slot))
