"""What a step takes under one way of reducing: bytes from shapes, seconds from a few rates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from distopt.numerics.matricize import nearest_to_square
from distopt.planning.foreseen import HALF, WHOLE, Way, collectives, numbers_sent, sent, width_of
from distopt.planning.machine import Network, Processor, Wire
from distopt.planning.timeline import Work, step_seconds
from distopt.planning.workload import bytes_of
from distopt.reducers.memory import working_dtype
from distopt.reducers.reducer import Reducer, Slot
from distopt.reducers.rehearsal import Asked


class Effort(NamedTuple):
    """What computing a compression goes through.

    Args:
        passes: over the gradient's numbers in the working dtype, reads and writes both counted.
        products: of the gradient's matrix with a thin one.
    """

    passes: float
    products: int


# Until the last bucket is through, and after it, as a test counts them. PowerSGD adds the residual (3 passes), takes a
# product for each factor (1 each), and writes the new residual and the average (2 products, 3 passes).
BOTH = (Effort(5, 2), Effort(3, 2))
ALTERNATE = (Effort(4, 1), Effort(3, 2))
CAST = (Effort(37, 0), Effort(9, 0))
_BESIDE = (Effort(2, 0), Effort(2, 0))
"""What is sent whole with the factors: copied into their payload, and out of it."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way of reducing a whole model.

    Args:
        label: for people.
        reducer: what does it; ``None`` for DDP by itself.
        ways: how each gradient is sent, by name.
        alternate: whether the factors take turns, so that two steps are one period.
        wire_dtype: what factors travel in.
    """

    label: str
    reducer: Reducer | None
    ways: Mapping[str, Way]
    alternate: bool = False
    wire_dtype: torch.dtype | None = None


class Share(NamedTuple):
    """One gradient's part of a step: bytes sent for it, and the seconds that depend on its size."""

    nbytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a scheme is predicted to take: the mean over its period.

    Args:
        scheme: which one.
        nbytes: that a rank hands to collectives in a step, one copy.
        step_seconds: of forward, backward and what of the reduction they do not hide.
        shares: of each gradient, by name.
        fixed_seconds: what the reduction takes besides those, whatever the sizes: latency and the work on a bucket.
        collectives: in a step.
    """

    scheme: Scheme
    nbytes: float
    step_seconds: float
    shares: Mapping[str, Share]
    fixed_seconds: float
    collectives: float

    @property
    def reducing_seconds(self) -> float:
        """What the reduction takes, which is the sum of all parts, hidden or not."""
        return self.fixed_seconds + sum(share.seconds for share in self.shares.values())


class Estimator:
    """Predicts schemes for one model on one machine.

    Args:
        buckets: in their order.
        network: between the ranks.
        processor: of each rank.
        compute_seconds: forward and backward alone.
    """

    def __init__(
        self, buckets: Sequence[Sequence[Slot]], network: Network, processor: Processor, compute_seconds: float
    ) -> None:
        self._buckets = [list(bucket) for bucket in buckets]
        self._network = network
        self._processor = processor
        self._compute = compute_seconds

    def estimate(self, scheme: Scheme) -> Estimate:
        """Predict a step."""
        count = 2 if scheme.alternate else 1
        known: dict[tuple[object, ...], _Taken] = {}
        shares: dict[str, Share] = {slot.name: Share(0.0, 0.0) for bucket in self._buckets for slot in bucket}
        total = step = fixed = collectives = 0.0
        for number in range(count):
            works: list[Work] = []
            for bucket in self._buckets:
                taken = self._taken(scheme, bucket, number, known)
                for slot, share in zip(bucket, taken.shares, strict=True):
                    before = shares[slot.name]
                    shares[slot.name] = Share(before[0] + share[0] / count, before[1] + share[1] / count)
                works.append(taken.work)
                total += taken.nbytes
                fixed += taken.fixed
                collectives += len(taken.work.stages)
            step += step_seconds(self._compute, works)
        return Estimate(scheme, total / count, step / count, shares, fixed / count, collectives / count)

    def _taken(
        self, scheme: Scheme, bucket: Sequence[Slot], step: int, known: "dict[tuple[object, ...], _Taken]"
    ) -> "_Taken":
        """What one bucket takes; one of the same shapes that is treated alike takes the same."""
        key = (step, *((s.parameter.shape, s.parameter.dtype, scheme.ways[s.name]) for s in bucket))
        if key not in known:
            asked = self._asked(scheme, bucket, step)
            wires = [self._network.seconds(collective) for collective in asked]
            computing = [self._computing(slot, scheme) for slot in bucket]
            transfer, nbytes = sum(wire.transfer for wire in wires), sent(asked)
            parts = zip(self._parts(bucket, scheme), computing, strict=True)
            shares = [Share(nbytes * part, transfer * part + sum(own)) for part, own in parts]
            fixed = sum(wire.latency for wire in wires) + self._bucket_seconds(scheme)
            known[key] = _Taken(self._work(bucket, wires, computing, scheme), nbytes, shares, fixed)
        return known[key]

    def alone(self, slot: Slot, way: Way, *, alternate: bool = False, wire_dtype: torch.dtype | None = None) -> float:
        """Seconds that depend on one gradient's size if it is sent in this way, hidden or not."""
        nbytes = numbers_sent(slot, way) * width_of(slot, way, wire_dtype)
        if alternate and isinstance(way, int):
            nbytes //= 2
        computing = self.computing(slot, way, alternate=alternate, mixed=False)
        return self._network.seconds(Asked("average", nbytes)).transfer + sum(computing)

    def computing(self, slot: Slot, way: Way, *, alternate: bool, mixed: bool) -> "Computing":
        """What compressing one gradient takes.

        Args:
            slot: the gradient.
            way: how it is sent.
            alternate: whether factors take turns.
            mixed: whether others of its bucket are compressed, so that what is sent whole is copied.
        """
        numbers = slot.parameter.numel()
        nbytes = numbers * working_dtype(slot).itemsize
        if way == WHOLE:
            efforts = _BESIDE if mixed else (Effort(0, 0), Effort(0, 0))
        elif way == HALF:
            efforts = CAST
        else:
            efforts = ALTERNATE if alternate else BOTH
        rank = way if isinstance(way, int) else 0
        before, after = (
            self._processor.seconds(effort.passes * nbytes, 2.0 * effort.products * numbers * rank)
            for effort in efforts
        )
        # Householder reflections on the shorter factor, or on either in turn.
        rows = min(nearest_to_square(slot.parameter.shape)) if rank else 0
        before += self._processor.seconds(0.0, 4.0 * rows * rank**2)
        return Computing(before + (self._processor.matrix_seconds if rank else 0.0), after)

    def _computing(self, slot: Slot, scheme: Scheme) -> "Computing":
        return self.computing(
            slot, scheme.ways[slot.name], alternate=scheme.alternate, mixed=scheme.reducer is not None
        )

    def _asked(self, scheme: Scheme, bucket: Sequence[Slot], step: int) -> list[Asked]:
        return collectives(
            bucket,
            [scheme.ways[slot.name] for slot in bucket],
            self._network.peers,
            passes="alternate" if scheme.alternate else "both",
            wire_dtype=scheme.wire_dtype,
            step=step,
        )

    def _parts(self, bucket: Sequence[Slot], scheme: Scheme) -> list[float]:
        """Which part of what a bucket sends is each gradient's."""
        dtypes = [width_of(slot, scheme.ways[slot.name], scheme.wire_dtype) for slot in bucket]
        sizes = [numbers_sent(s, scheme.ways[s.name]) * w for s, w in zip(bucket, dtypes, strict=True)]
        if scheme.alternate:
            ranked = [isinstance(scheme.ways[slot.name], int) for slot in bucket]
            sizes = [size / 2 if halved else size for size, halved in zip(sizes, ranked, strict=True)]
        total = sum(sizes)
        return [size / total if total else 0.0 for size in sizes]

    def _work(
        self, bucket: Sequence[Slot], wires: Sequence[Wire], computing: Sequence["Computing"], scheme: Scheme
    ) -> Work:
        before = sum(c.before for c in computing) + self._bucket_seconds(scheme)
        # What the processor does in order to send comes first, as if the wire were free meanwhile.
        stages = [
            (before / len(wires) + wire.computing, wire.transfer - wire.computing + wire.latency) for wire in wires
        ]
        stages = stages or [(before, 0.0)]
        return Work(sum(map(bytes_of, bucket)), stages, sum(c.after for c in computing))

    def _bucket_seconds(self, scheme: Scheme) -> float:
        return 0.0 if scheme.reducer is None else self._processor.bucket_seconds


class _Taken(NamedTuple):
    work: Work
    nbytes: int
    shares: Sequence[Share]
    fixed: float


class Computing(NamedTuple):
    """Seconds of computing, until the bucket is through, and after the last one."""

    before: float
    after: float
