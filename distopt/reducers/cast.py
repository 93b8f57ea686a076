"""16 bits on the wire, whatever the gradients have."""

import dataclasses
from collections.abc import Sequence

import torch

from distopt.errors import SettingError
from distopt.numerics.codecs import FloatCodec
from distopt.reducers.elementwise import CodedPlan
from distopt.reducers.reducer import Place, Plan, Reducer, Slot


@dataclasses.dataclass(frozen=True)
class Cast(Reducer):
    """Send gradients as 16-bit numbers, add them up in float32, and keep what rounding took off for the next step.

    Every real gradient is cast, those of norms and embeddings too. In float16 each piece of a tensor travels with a
    power of two, so that nothing overflows and the loss scale does not matter.

    Gradients that have 16 bits already are sent as they are. They too are added up in float32 and divided then: a sum
    in float16 overflows unless it is divided before, and what is divided by a thousand ranks before underflows. This is
    what DALL-E's third guideline is for (Ramesh et al. 2021, arXiv:2102.12092, appendix D).

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        SettingError: if ``dtype`` is neither.

    Example:
        >>> Cast(torch.bfloat16)
        Cast(dtype=torch.bfloat16)
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise SettingError("Cast.dtype", self.dtype, "torch.bfloat16 or torch.float16")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        chosen = [slot.parameter.is_floating_point() and slot.parameter.numel() > 0 for slot in slots]
        return CodedPlan(slots, chosen, place, FloatCodec(self.dtype))
