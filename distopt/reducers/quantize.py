"""8 or 4 bits on the wire."""

import dataclasses
from collections.abc import Sequence

from distopt.errors import SettingError
from distopt.numerics.codecs import IntegerCodec
from distopt.reducers.elementwise import CodedPlan
from distopt.reducers.memory import is_compressible
from distopt.reducers.reducer import Place, Plan, Reducer, Slot
from distopt.reducers.settings import is_integer


@dataclasses.dataclass(frozen=True)
class Quantize(Reducer):
    """Send gradients as integers of 8 or 4 bits, rounded stochastically, with a scale for every 256 numbers.

    The codes of all ranks are added up in float32 by the rank that owns a part, and the average is coded once more: the
    bytes a rank sends do not grow with the number of ranks. What rounding took off is kept for the next step. Vectors,
    norms and embeddings are sent whole.

    Args:
        bits: 8 or 4.
        seed: of the rounding.

    Raises:
        SettingError: if a setting is out of its range.

    Example:
        >>> Quantize(bits=4)
        Quantize(bits=4, seed=0)
    """

    bits: int = 8
    _: dataclasses.KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_integer(self.bits) or self.bits not in (8, 4):
            raise SettingError("Quantize.bits", self.bits, "8 or 4")
        if not is_integer(self.seed):
            raise SettingError("Quantize.seed", self.seed, "an integer")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        chosen = [is_compressible(slot) for slot in slots]
        return CodedPlan(slots, chosen, place, IntegerCodec(self.bits), self.seed)
