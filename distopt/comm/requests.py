"""What a reduction may ask the ranks to do together. Plain data: `Communicator` carries it out.

A bare tensor asks for its average in place. Everything else has a name here.
"""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Swap:
    """Row ``i`` goes to rank ``i``; the answer holds what every rank sent here, one row each.

    Args:
        rows: ``(W, ...)`` for ``W`` ranks, contiguous, any dtype that the backend takes (``uint8`` always).
    """

    rows: Tensor


@dataclasses.dataclass(frozen=True)
class Gather:
    """The answer, ``(W, ...)``, holds the tensor of every rank, in the order of ranks.

    Args:
        tensor: contiguous, of the same shape and dtype on every rank.
        returning: whether it is the way back of an average, which the count of bytes leaves out, as it does for an
            all-reduce.
    """

    tensor: Tensor
    returning: bool = False


@dataclasses.dataclass(frozen=True)
class Within:
    """Do something among the ranks of a part of the group only.

    The other parts do it among themselves at the same time, and may see something non-finite where this one does not:
    whoever asks for it looks at the answer himself.

    Args:
        part: a name from `Reducer.parts`.
        request: what to do there.
    """

    part: str
    request: "Tensor | Swap | Gather"


Request = Tensor | Swap | Gather | Within
"""Whatever a reduction may yield."""
