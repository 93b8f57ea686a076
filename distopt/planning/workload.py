"""The gradients of a model as a reducer meets them: without memory, and bucket by bucket."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from distopt.attach.exemptions import exempt_names, is_exempt_by_name, plain_name
from distopt.attach.replicas import named_parameters
from distopt.attach.selection import Blocks, select, unwrapped
from distopt.attach.shards import Cut
from distopt.errors import SettingError
from distopt.reducers.reducer import Slot

Shape: TypeAlias = Sequence[int]
Gradients: TypeAlias = nn.Module | Iterable[tuple[str, Shape, torch.dtype]]
"""A model, on the meta device too, or the name, shape and dtype of each of its gradients, first to last."""

FIRST_BUCKET_BYTES = 2**20
"""DDP's first bucket is small, so that the first collective begins early."""


def gradients_of(
    model: Gradients, *, shards: int = 1, shard_placement_fn: Callable[[nn.Parameter], Any] | None = None
) -> list[Slot]:
    """Give one slot a gradient, on the meta device, in the order of the model.

    Args:
        model: see `Gradients`. Of a module, parameters that take gradients; what is sent whole is found as `register`
            finds it. Of a list, vectors are sent whole, and what is called an embedding or a norm.
        shards: ranks of a node that hold a model together: each gradient is the first one's piece.
        shard_placement_fn: as for `distopt.shard`.

    Raises:
        SettingError: if that is no model.

    Example:
        >>> [slot.exempt for slot in gradients_of([("a", (3, 4), torch.float32), ("b", (4,), torch.float32)])]
        [False, True]
    """
    if isinstance(model, nn.Module):
        module = cast(nn.Module, unwrapped(model))
        exempt = {plain_name(name) for name in exempt_names(module)}
        found = [(name, p, name in exempt) for name, p in named_parameters(module).items() if p.requires_grad]
    else:
        found = [(name, p, is_exempt_by_name(name) or _is_vector(p)) for name, p in _listed(model)]
    slots: list[Slot] = []
    for name, parameter, exempt_here in found:
        shape, placement = tuple(parameter.shape), shard_placement_fn and shard_placement_fn(parameter)
        if shards > 1 and shape:
            shape = Cut(shape, placement.dim if placement else 0).piece(0, shards)
        piece = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
        slots.append(Slot(name, piece, exempt=exempt_here))
    return slots


def buckets_of(slots: Sequence[Slot], bucket_bytes: int) -> list[list[Slot]]:
    """Divide gradients into buckets as DDP does: from the last to the first, one dtype in each.

    Args:
        slots: in the order of the model.
        bucket_bytes: a bucket is full when it has as many; the first one earlier, at `FIRST_BUCKET_BYTES`.

    Example:
        >>> slots = gradients_of([(name, (256, 1024), torch.float32) for name in "abcd"])
        >>> [[slot.name for slot in bucket] for bucket in buckets_of(slots, 2 * 2**20)]
        [['d'], ['c', 'b'], ['a']]
    """
    buckets: list[list[Slot]] = []
    open_ones: dict[torch.dtype, tuple[list[Slot], int]] = {}
    for slot in reversed(slots):
        dtype = slot.parameter.dtype
        if dtype not in open_ones:
            open_ones[dtype] = ([], min(FIRST_BUCKET_BYTES, bucket_bytes) if not open_ones else bucket_bytes)
            buckets.append(open_ones[dtype][0])
        bucket, limit = open_ones[dtype]
        if sum(bytes_of(other) for other in bucket) >= limit:
            bucket, limit = [], bucket_bytes
            open_ones[dtype] = (bucket, limit)
            buckets.append(bucket)
        bucket.append(slot)
    return buckets


def units_of(model: nn.Module, slots: Sequence[Slot], units: Blocks) -> list[list[Slot]]:
    """Divide gradients as `distopt.shard` does: a bucket for each unit, from the last to the first, then all others.

    Args:
        model: whose gradients.
        slots: these, as `gradients_of` gives them.
        units: as for `shard`.

    Raises:
        SettingError: if there are no such units.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 1))
        >>> found = units_of(model, gradients_of(model), [model[0], model[1]])
        >>> [[slot.name for slot in bucket] for bucket in found]
        [['1.weight', '1.bias'], ['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    module = cast(nn.Module, unwrapped(model))
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    left = {slot.name: slot for slot in slots}
    buckets: list[list[Slot]] = []
    for part in reversed(select("units", units, module)):
        inside = [names[id(p)] for inner in part.modules for p in inner.parameters()]
        buckets.append([left.pop(name) for name in inside if name in left])
    return [bucket for bucket in [*buckets, list(left.values())] if bucket]


def bytes_of(slot: Slot) -> int:
    """Of the gradient, in its own dtype."""
    return slot.parameter.numel() * slot.parameter.element_size()


def _listed(model: Any) -> list[tuple[str, nn.Parameter]]:
    allowed = "a module, or a (name, shape, dtype) for each gradient"
    if isinstance(model, str) or not isinstance(model, Iterable):
        raise SettingError("model", model, allowed)
    found: list[tuple[str, nn.Parameter]] = []
    for entry in cast(Iterable[Any], model):
        try:
            name, shape, dtype = entry
            found.append((name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"))))
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingError("model", entry, allowed) from error
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise SettingError("model", next(name for name in names if names.count(name) > 1), "a name of its own each")
    return found


def _is_vector(parameter: nn.Parameter) -> bool:
    return sum(side > 1 for side in parameter.shape) < 2
