"""One reducer inside a node, another between nodes."""

import dataclasses
import math
import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from distopt.comm.requests import Gather, Request, Swap, Within
from distopt.errors import SettingError
from distopt.numerics.finite import all_finite
from distopt.reducers.allreduce import AllReduce, split_into
from distopt.reducers.memory import clone
from distopt.reducers.reducer import Bucket, Place, Plan, Proposal, Reducer, Reduction, Slot, State
from distopt.reducers.settings import is_integer

INSIDE, BETWEEN = "inside nodes", "between nodes"


@dataclasses.dataclass(frozen=True)
class Hierarchical(Reducer):
    """Average exactly inside a node, where links are fast, and compressed between nodes, where they are not.

    The ranks of a node first average their gradients; then each takes care of a part of the parameters, which it
    reduces with its counterparts on the other nodes; then the node shares the results. Residuals are those of the
    node's average, and each is kept by one rank of a node.

    Args:
        inner: ``AllReduce()``; the reducer inside a node.
        outer: the reducer between nodes, ``PowerSGD(rank=8)`` for example.
        ranks_per_node: consecutive ranks that share a node; the environment's ``LOCAL_WORLD_SIZE``, which ``torchrun``
            sets, if ``None``.

    Raises:
        SettingError: if ``inner`` is not ``AllReduce()``, ``outer`` no reducer or itself hierarchical, or the ranks do
            not divide into nodes.

    Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.5: reduce inside the machine, compress between machines.

    Example:
        >>> from distopt import PowerSGD
        >>> Hierarchical(inner=AllReduce(), outer=PowerSGD(rank=8), ranks_per_node=8).ranks_per_node
        8
    """

    inner: Reducer
    outer: Reducer
    _: dataclasses.KW_ONLY
    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, AllReduce):
            raise SettingError("Hierarchical.inner", self.inner, "AllReduce()")
        if not isinstance(cast(object, self.outer), Reducer) or _divides(self.outer):
            raise SettingError("Hierarchical.outer", self.outer, "a reducer without Hierarchical in it")
        if self.ranks_per_node is not None and (not is_integer(self.ranks_per_node) or self.ranks_per_node < 1):
            raise SettingError("Hierarchical.ranks_per_node", self.ranks_per_node, "None or an integer of at least 1")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        size = self._node_size(place.world_size)
        owners = [_owner(slot, size) for slot in slots]
        between = Place(place.rank // size, place.world_size // size)
        mine = [i for i, owner in enumerate(owners) if owner == place.rank % size]
        outer = self.outer.plan([slots[i] for i in mine], between) if mine else None
        return _HierarchicalPlan(outer, [slot.name for slot in slots], mine, owners, size)

    def parts(self, world_size: int) -> Mapping[str, Sequence[Sequence[int]]]:
        """See `Reducer.parts`."""
        size = self._node_size(world_size)
        nodes = [tuple(range(first, first + size)) for first in range(0, world_size, size)]
        return {INSIDE: nodes, BETWEEN: [tuple(range(first, world_size, size)) for first in range(size)]}

    def _node_size(self, world_size: int) -> int:
        size = self.ranks_per_node or _local_world_size(world_size)
        if world_size % size != 0:
            raise SettingError("Hierarchical.ranks_per_node", size, f"a divisor of the world size {world_size}")
        return size


class _HierarchicalPlan(Plan):
    """Reduces a bucket inside the node, between nodes, and shares the outcome inside the node.

    Args:
        outer: for the slots that this rank takes care of; ``None`` if there are none in this bucket.
        names: of all slots of the bucket.
        mine: places of these slots in the bucket.
        owners: which rank of a node takes care of each slot.
        size: ranks of a node.
    """

    def __init__(
        self, outer: Plan | None, names: Sequence[str], mine: Sequence[int], owners: Sequence[int], size: int
    ) -> None:
        self._outer = outer
        self._names = names
        self._my_names = [names[i] for i in mine]
        self._mine = mine
        self._owners = owners
        self._size = size

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        flat = torch.cat(list(bucket.segments))
        if flat.numel() == 0:
            return Proposal(lambda: None)
        flat = yield Within(INSIDE, flat)
        split_into(bucket.segments, flat)
        # What one node finds not finite, the others may not know yet: nobody leaves before the outcome is shared. So
        # the outer reducer commits to a copy of its state, which comes into force with the whole step.
        scratch = self._scratch(state)
        proposal = None
        if self._outer is not None:
            part = Bucket([bucket.gradients[i] for i in self._mine], [bucket.segments[i] for i in self._mine])
            proposal = yield from _between(self._outer.reduce(part, scratch))
            if proposal is not None:
                proposal.commit()
        sound = self._outer is None or proposal is not None
        shared = yield from self._share(bucket.segments, sound)
        if shared is None:
            return None
        parts = shared

        def commit() -> None:
            for segment, part in zip(bucket.segments, parts, strict=True):
                segment.copy_(part)
            for name in self._names:  # those of the others are in their care
                state.residuals.pop(name, None)
            state.residuals.update(scratch.residuals)
            state.factors.update(scratch.factors)

        return Proposal(commit, (0, 0) if proposal is None else proposal.bytes_compressed)

    def _share(self, segments: Sequence[Tensor], sound: bool) -> Generator[Request, Tensor, list[Tensor] | None]:
        """Give what this rank took care of to its node, and take the rest; ``None`` if any of it is not finite."""
        sizes = [
            sum(s.numel() for s, owner in zip(segments, self._owners, strict=True) if owner == rank)
            for rank in range(self._size)
        ]
        message = segments[0].new_zeros(max(sizes))
        mine = [segments[i] for i in self._mine]
        if mine:
            message[: sum(s.numel() for s in mine)] = torch.cat(mine)
        if not sound:
            message.fill_(math.nan)
        answer = yield Within(INSIDE, Gather(message))
        if not all_finite(answer):
            return None
        taken = [0] * self._size
        parts: list[Tensor] = []
        for segment, owner in zip(segments, self._owners, strict=True):
            parts.append(answer[owner, taken[owner] : taken[owner] + segment.numel()])
            taken[owner] += segment.numel()
        return parts

    def _scratch(self, state: State) -> State:
        residuals = {n: clone(r) for n in self._my_names if (r := state.residuals.get(n)) is not None}
        factors = {n: f for n in self.factor_shapes() if (f := state.factors.get(n)) is not None}
        return State(state.step, residuals, factors, state.figures)

    def describe(self) -> str:
        """See `Plan.describe`."""
        return "" if self._outer is None else self._outer.describe()

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return self._outer.residual_shapes() if self._outer is not None else {}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.factor_shapes`."""
        return self._outer.factor_shapes() if self._outer is not None else {}

    def prepare(self, state: State) -> None:
        """See `Plan.prepare`."""
        if self._outer is not None:
            self._outer.prepare(state)


def _divides(reducer: Reducer) -> bool:
    """Whether a reducer divides the ranks into groups."""
    try:
        return bool(reducer.parts(1))
    except SettingError:
        return True


def _local_world_size(world_size: int) -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", str(world_size))
    if not text.isdecimal() or int(text) < 1:
        raise SettingError("LOCAL_WORLD_SIZE", text, "the number of ranks on this node")
    return int(text)


def _between(reduction: Reduction) -> Generator[Request, Tensor, Proposal | None]:
    """Carry a reduction out between nodes; ``None`` if what it averages is not finite."""
    try:
        request = next(reduction)
        while True:
            answer = yield Within(BETWEEN, cast(Tensor | Swap | Gather, request))
            if isinstance(request, Tensor) and not all_finite(answer):
                reduction.close()
                return None
            request = reduction.send(answer)
    except StopIteration as returned:
        proposal: Proposal | None = returned.value
        # What comes next, among the ranks of a node, depends on it.
        dropped = proposal is not None and proposal.sound is not None and not bool(proposal.sound)
        return None if dropped else proposal


def _owner(slot: Slot, size: int) -> int:
    """Which rank of a node takes care of a parameter: by its name, as buckets change and residuals must not move."""
    return zlib.crc32(slot.name.encode()) % size
