"""What a reducer is, and what it works on.

A reducer holds settings only. For each bucket it makes a plan once, and a plan turns the bucket's gradients into a
*reduction* at every step: a generator that yields what is to be averaged over the ranks and is sent the average, and
that returns a `Proposal`. It calls no collective itself, so that one piece of code serves DDP, sharded models, plain
lists of gradients and a simulation of all ranks in one process; and it changes nothing that lasts until its proposal is
taken, so that a step can be dropped whole.
"""

import abc
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter's place in a bucket.

    Args:
        name: as in ``model.module.named_parameters()``.
        parameter: whose gradient it is.
        exempt: whether it is to be sent whole: a vector, part of a norm or of an embedding, or named by the user.
        optional: whether a step may leave it without a gradient on every rank. Such a gradient arrives as zeros, and
            whatever is written there is lost.
    """

    name: str
    parameter: nn.Parameter
    exempt: bool = False
    optional: bool = False


@dataclasses.dataclass
class Bucket:
    """The gradients of one bucket, in the order of its slots.

    Args:
        gradients: each with its parameter's shape; the average is written here, where the optimizer looks for it.
        segments: the same memory as 1-D tensors, in the order in which it lies.
        flat: all segments as one 1-D tensor over the same memory, or ``None`` where they lie scattered.
    """

    gradients: Sequence[Tensor]
    segments: Sequence[Tensor]
    flat: Tensor | None = None


@dataclasses.dataclass
class State:
    """What a reducer remembers from step to step, by parameter name. Nothing else is state.

    Args:
        step: steps taken so far; one that was dropped for a non-finite gradient leaves no trace here.
        residuals: what this rank has not sent yet, in the parameter's shape. Ranks differ; their mean decides the
            future.
        factors: whatever else is carried on; the same on all ranks.
    """

    step: int = 0
    residuals: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    factors: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The outcome of a reduction, not yet in force.

    Args:
        commit: writes the averaged gradients, the residuals and the factors. It cannot fail, and runs on all ranks or
            none.
        bytes_compressed: bytes of the gradients that were compressed, before and after; both zero if none were.
    """

    commit: Callable[[], None]
    bytes_compressed: tuple[int, int] = (0, 0)


Reduction = Generator[Tensor, Tensor, Proposal | None]
"""Yields a contiguous tensor to average in place, is sent the average; returns the proposal, or ``None`` if the
averaged gradient cannot be represented in its dtype, which every rank then finds alike."""


class Plan(abc.ABC):
    """A reducer at work on one bucket."""

    @abc.abstractmethod
    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """Average the gradients of ``bucket``; at most two tensors are yielded, none of them empty."""

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of the residuals that are kept, by parameter name; none by default."""
        return {}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of the factors that are kept, by parameter name; none by default."""
        return {}


class Reducer(abc.ABC):
    """How gradients become their average.

    Concrete reducers are frozen dataclasses that check their settings when they are built.
    """

    @abc.abstractmethod
    def plan(self, slots: Sequence[Slot]) -> Plan:
        """Prepare for a bucket that holds ``slots``; the same on all ranks."""
