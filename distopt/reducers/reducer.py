"""What a reducer is, and what it works on.

A reducer holds settings only. For each bucket it makes a plan once, and a plan turns the bucket's gradients into a
*reduction* at every step: a generator that yields what is to be averaged over the ranks and is sent the average, and
that returns a `Proposal`. It calls no collective itself, so that one piece of code serves DDP, sharded models, plain
lists of gradients and a simulation of all ranks in one process; and it changes nothing that lasts until its proposal is
taken, so that a step can be dropped whole.

To write a reducer with error feedback, begin with `distopt.reducers.feedback.FeedbackPlan`.
"""

import abc
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence

from torch import Tensor, nn

from distopt.comm.requests import Request
from distopt.numerics.storage import Stored


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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands among those that average.

    Args:
        rank: its number, from 0.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1


@dataclasses.dataclass
class Bucket:
    """The gradients of one bucket, in the order of its slots.

    Args:
        gradients: each with its parameter's shape; the average is written here, where the optimizer looks for it. A
            reduction may use their memory as it likes: the gradients of a step that is dropped are made NaN.
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
        residuals: what this rank has not sent yet, in the parameter's shape. Ranks differ. In the unit of the
            gradients, loss scale included.
        factors: whatever else is carried on; the same on all ranks.
        figures: where a reduction writes down how well it did, by parameter name; ``None`` in steps that are not
            measured.
    """

    step: int = 0
    residuals: dict[str, Stored] = dataclasses.field(default_factory=dict[str, Stored])
    factors: dict[str, Stored] = dataclasses.field(default_factory=dict[str, Stored])
    figures: dict[str, "Figures"] | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """How well one gradient was reduced in one step, on this rank.

    Args:
        gradient_norm: Euclidean norm of the gradient as it was handed over.
        input_norm: of gradient plus residual, which is what was compressed.
        residual_norm: of what was left behind.
        bytes_uncompressed: of the gradient in its own dtype.
        bytes_sent: of what was sent in its place.
    """

    gradient_norm: float
    input_norm: float
    residual_norm: float
    bytes_uncompressed: int
    bytes_sent: int

    @property
    def reconstruction_error(self) -> float:
        """``|sent - input| / |input|``; 0 for a zero input."""
        return self.residual_norm / self.input_norm if self.input_norm else 0.0

    @property
    def residual_ratio(self) -> float:
        """``|residual| / |gradient|``; 0 where there is neither."""
        if self.gradient_norm == 0:
            return 0.0 if self.residual_norm == 0 else float("inf")
        return self.residual_norm / self.gradient_norm


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The outcome of a reduction, not yet in force.

    Args:
        commit: writes the averaged gradients, the residuals and the factors. It cannot fail, and runs on all ranks or
            none.
        bytes_compressed: bytes of the gradients that were compressed, before and after; both zero if none were.
        norms: Euclidean norms of averaged gradients, by parameter name, 0-dimensional, where they cost next to nothing.
        sound: 0-dimensional, bool, on the gradients' device: whether the proposal may be taken, alike on all ranks.
            ``None`` if it may. A reduction on an accelerator leaves it to whoever drives it to ask the device, once for
            all buckets of a step and before the first ``commit``.
    """

    commit: Callable[[], None]
    bytes_compressed: tuple[int, int] = (0, 0)
    norms: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    sound: Tensor | None = None


Reduction = Generator[Request, Tensor, Proposal | None]
"""Yields a contiguous tensor to average in place and is sent the average, or yields another request and is sent its
answer; returns the proposal, or ``None`` if the averaged gradient is not finite or cannot be represented in its dtype,
which every rank then finds alike. A bare tensor whose average is not finite ends the reduction where it is, on a CPU;
an accelerator is not asked, so that the reduction goes on with it, and the step is dropped in its end."""


class Plan(abc.ABC):
    """A reducer at work on one bucket."""

    @abc.abstractmethod
    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """Average the gradients of ``bucket``, in at most two rounds, none of them empty.

        A round is the average of a tensor, or the `Swap` and the `Gather` of a coded one.
        """

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of the residuals that are kept, by parameter name; none by default."""
        return {}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of the factors that are kept, by parameter name; none by default."""
        return {}

    def describe(self) -> str:
        """What ranks must have alike, in words: how the plan treats its slots, whatever the settings' text says."""
        return f"{type(self).__name__} with residuals {_text(self.residual_shapes())}"

    def prepare(self, state: State) -> None:  # noqa: B027  most plans have nothing to prepare
        """Put what the plan would begin with into ``state``, where it is missing: a template for a loader to fill."""


def _text(shapes: Mapping[str, Sequence[int]]) -> str:
    return str([list(shape) for shape in shapes.values()])


class Reducer(abc.ABC):
    """How gradients become their average.

    Concrete reducers are frozen dataclasses that check their settings when they are built.
    """

    @abc.abstractmethod
    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """Prepare for a bucket that holds ``slots``; the same on all ranks but for their ``place``."""

    def parts(self, world_size: int) -> Mapping[str, Sequence[Sequence[int]]]:
        """How the ranks ``0 .. world_size - 1`` fall into groups that talk among themselves, by name; none by default.

        Raises:
            SettingError: if they cannot.
        """
        return {}
