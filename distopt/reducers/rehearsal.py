"""What a step would send and keep, found by going through it without numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.comm.requests import Gather, Swap, Within
from distopt.numerics.storage import nbytes
from distopt.reducers.reducer import Bucket, Place, Proposal, Reducer, Reduction, Slot, State


class Asked(NamedTuple):
    """A collective that was asked for, and the bytes that this rank hands over for it, the way back included."""

    kind: Literal["average", "swap", "gather"]
    nbytes: int


class Rehearsal(NamedTuple):
    """One rank's share of one bucket, in bytes.

    ``compressed`` are the bytes of the gradients that were compressed, before and after; both zero if none were.
    ``asked`` are the collectives, in their order.
    """

    uncompressed: int
    sent: int
    compressed: tuple[int, int]
    residuals: int
    factors: int
    asked: tuple[Asked, ...]


def rehearse(reducer: Reducer, slots: Sequence[Slot], place: Place, step: int = 0) -> Rehearsal:
    """Go through a step on the meta device, where tensors have shapes and no memory.

    It is the reducer's own code that runs, a user's included, so that there is nothing to be kept in agreement with it.
    Wherever the code looks at a number to decide something, it finds a 1, or true.

    Args:
        reducer: the settings.
        slots: of the bucket, with parameters on the meta device.
        place: the rank.
        step: which one, for a reducer that follows a schedule.

    Returns:
        What `Communicator` would count, and what would be kept after the step.

    Raises:
        RuntimeError: if the reduction gives the step up, or asks for an operation that needs numbers.

    Example:
        >>> from distopt.reducers.allreduce import AllReduce
        >>> slot = Slot("w", torch.nn.Parameter(torch.empty(3, 4, device="meta")))
        >>> rehearse(AllReduce(), [slot], Place(0, 2)).sent
        48
    """
    plan, state = reducer.plan(slots, place), State(step)
    parts = reducer.parts(place.world_size)
    ranks = {name: len(next(group for group in groups if place.rank in group)) for name, groups in parts.items()}
    sizes = [slot.parameter.numel() for slot in slots]
    with _WithoutNumbers():
        flat = torch.empty(sum(sizes), dtype=slots[0].parameter.dtype, device="meta")
        segments = flat.split(sizes)
        gradients = [s.view(slot.parameter.shape) for s, slot in zip(segments, slots, strict=True)]
        sent, asked, proposal = _carry_out(
            plan.reduce(Bucket(gradients, segments, flat), state), {"": place.world_size, **ranks}
        )
        if proposal is None:
            raise RuntimeError("the reduction found gradients that are not finite where there are no numbers")
        proposal.commit()
        plan.prepare(state)
    return Rehearsal(
        uncompressed=nbytes(flat),
        sent=sent,
        compressed=proposal.bytes_compressed,
        residuals=sum(nbytes(kept) for kept in state.residuals.values()),
        factors=sum(nbytes(kept) for kept in state.factors.values()),
        asked=tuple(asked),
    )


def _carry_out(reduction: Reduction, ranks: Mapping[str, int]) -> tuple[int, list[Asked], Proposal | None]:
    sent, collectives = 0, list[Asked]()
    try:
        request = next(reduction)
        while True:
            part, asked = (request.part, request.request) if isinstance(request, Within) else ("", request)
            answer, collective, counts = _answer(asked, ranks[part])
            collectives.append(collective)
            sent += collective.nbytes if counts else 0
            request = reduction.send(answer)
    except StopIteration as returned:
        return sent, collectives, returned.value


def _answer(request: Tensor | Swap | Gather, ranks: int) -> tuple[Tensor, Asked, bool]:
    """What ``ranks`` ranks would get, what this one hands over for it, and whether that counts as sent."""
    if isinstance(request, Swap):
        return torch.empty_like(request.rows), Asked("swap", nbytes(request.rows)), True
    if isinstance(request, Gather):
        answer = request.tensor.new_empty((ranks, *request.tensor.shape))
        return answer, Asked("gather", nbytes(request.tensor)), not request.returning
    return request, Asked("average", nbytes(request)), True


class _WithoutNumbers(TorchDispatchMode):
    """Lets code that looks at numbers, or draws them, run on the meta device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and cast(Tensor, args[0]).is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is aten._to_copy.default and args[0].is_meta and (kwargs or {}).get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if func is aten.randn.generator:
            # What is drawn on the CPU goes to the device at once.
            return torch.empty(args[0], device="meta")
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten.geqrf.default:
            matrix = cast(Tensor, args[0])
            return torch.empty_like(matrix), matrix.new_empty((*matrix.shape[:-2], min(matrix.shape[-2:])))
        return func(*args, **(kwargs or {}))
