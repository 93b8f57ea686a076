"""One bit on the wire."""

import dataclasses
from collections.abc import Sequence

from distopt.numerics.codecs import SignCodec
from distopt.reducers.elementwise import CodedPlan
from distopt.reducers.memory import is_compressible
from distopt.reducers.reducer import Place, Plan, Reducer, Slot


@dataclasses.dataclass(frozen=True)
class Sign(Reducer):
    """Send the signs of gradients, and the mean absolute value of every 512 numbers.

    The mean of the ranks' signs is sent back as signs once more. What was not sent is kept for the next step, without
    which this would not converge. Vectors, norms and embeddings are sent whole.

    Source: Karimireddy et al. 2019 (arXiv:1901.09847); Tang et al. 2021 (arXiv:2102.02888) for the way back.

    Example:
        >>> Sign()
        Sign()
    """

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        return CodedPlan(slots, [is_compressible(slot) for slot in slots], place, SignCodec())
