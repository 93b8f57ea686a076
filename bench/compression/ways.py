"""Ways of compressing the gradients of one bucket: each a step that is taken again and again."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook

from bench import epfml
from bench.compression.models import Shapes
from distopt.attach.transaction import Transaction
from distopt.reducers.lowrank import LowRankPlan
from distopt.reducers.operand import Operand
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Bucket, Place, Plan, Slot, State


class _Alone:
    """The communicator of a rank that is alone: an average is the tensor itself."""

    def __init__(self) -> None:
        self._request = torch.empty(0)

    def start(self, request: Tensor) -> "_Alone":
        """Begin what is asked for, which is done at once."""
        self._request = request
        return self

    def wait(self) -> Tensor:
        """What was asked for."""
        return self._request


def _planned(shapes: Shapes, bucket: Tensor, rank: int, passes: str, **options: Any) -> tuple[Plan, Sequence[Tensor]]:
    slots = [
        Slot(str(i), nn.Parameter(torch.empty(shape, dtype=bucket.dtype, device=bucket.device)), exempt=len(shape) < 2)
        for i, shape in enumerate(shapes)
    ]
    plan = PowerSGD(rank, passes=passes, **options).plan(slots, Place())
    return plan, bucket.split([math.prod(shape) for shape in shapes])


def _shaped(segments: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
    return [segment.view(shape) for segment, shape in zip(segments, shapes, strict=True)]


def ours(shapes: Shapes, bucket: Tensor, rank: int, passes: str = "both", **options: Any) -> Callable[[], None]:
    """A step of `distopt.PowerSGD`, with whatever other settings."""
    (plan, segments), state = _planned(shapes, bucket, rank, passes, **options), State()
    gradients = _shaped(segments, shapes)

    def step() -> None:
        transaction = Transaction(_Alone())  # pyright: ignore[reportArgumentType]
        transaction.propose(plan.reduce(Bucket(gradients, segments, bucket), state))
        assert transaction.complete()
        transaction.commit()
        state.step += 1

    return step


def products(shapes: Shapes, bucket: Tensor, rank: int) -> Callable[[], None]:
    """Only the four products of a step with both passes: M Q, Mᵀ P, and P Qᵀ taken off M and written in its place.

    Blocks as ours, no residual to add, nothing orthonormalised or averaged: what is left if all else were free.
    """
    plan, segments = _planned(shapes, bucket, rank, "both")
    gradients = dict(zip(map(str, range(len(shapes))), _shaped(segments, shapes), strict=True))
    works: list[tuple[Operand, Tensor, Tensor, Tensor]] = []
    for matrix in plan.matrices if isinstance(plan, LowRankPlan) else ():
        operand = Operand(matrix, gradients[matrix.slot.name], None)
        left, right = (torch.randn(matrix.rank, rows) for rows in (matrix.left, matrix.right))
        works.append((operand, left, right, torch.zeros(matrix.slot.parameter.shape)))

    def step() -> None:
        for operand, left, right, _ in works:
            operand.times_right(right, torch.empty_like(left))
        for operand, left, right, _ in works:
            operand.times_left(left, torch.empty_like(right))
        for operand, left, right, room in works:
            operand.settle(left, right, left, right, room)

    return step


class _GradBucket:
    """What ``powerSGD_hook`` asks of DDP's bucket."""

    def __init__(self, shapes: Shapes, bucket: Tensor) -> None:
        self._flat = bucket
        segments = bucket.split([math.prod(shape) for shape in shapes])
        self._views = [segment.view(shape) for segment, shape in zip(segments, shapes, strict=True)]

    def buffer(self) -> Tensor:
        """All gradients, flat."""
        return self._flat

    def gradients(self) -> list[Tensor]:
        """Each in its shape."""
        return list(self._views)

    def index(self) -> int:
        """Its number."""
        return 0

    def is_last(self) -> bool:
        """Whether it is the only one."""
        return True


class _GroupOfOne:
    """What ``powerSGD_hook`` asks of a process group."""

    def size(self) -> int:
        """How many ranks there are."""
        return 1


def torchs(shapes: Shapes, bucket: Tensor, rank: int, batched: bool = False) -> Callable[[], None]:
    """A step of torch's hook, from the first on compressed."""
    state = torch_hook.PowerSGDState(
        process_group=_GroupOfOne(),  # pyright: ignore[reportArgumentType]
        matrix_approximation_rank=rank,
        start_powerSGD_iter=2,
        batch_tensors_with_same_shape=batched,
    )
    state.iter = 2
    grad_bucket = _GradBucket(shapes, bucket)
    return lambda: torch_hook.powerSGD_hook(state, grad_bucket).wait()  # pyright: ignore[reportArgumentType]


def epfmls(shapes: Shapes, bucket: Tensor, rank: int) -> Callable[[], None]:
    """A step of the package ``powersgd``, whose gradients are its error buffers as well."""
    sizes = [math.prod(shape) for shape in shapes]
    held = torch.zeros_like(bucket)
    gradients = [s.view(shape) for s, shape in zip(held.split(sizes), shapes, strict=True)]
    aggregator = epfml.package().PowerSGD(gradients, epfml.settings(rank))

    def step() -> None:
        held.add_(bucket)  # what backward would do in its place
        aggregator.aggregate(gradients)

    return step


WAYS: Mapping[str, Callable[[Shapes, Tensor, int], Callable[[], None]]] = {
    "both": ours,
    "alternate": lambda shapes, bucket, rank: ours(shapes, bucket, rank, "alternate"),
    "products": products,
    "torch": torchs,
    "torch batched": lambda shapes, bucket, rank: torchs(shapes, bucket, rank, batched=True),
    "epfml": epfmls,
}
