"""What a sharded model takes of each rank, counted before there is one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distopt.attach.exemptions import exempt_names, plain_name
from distopt.attach.replicas import named_parameters
from distopt.attach.selection import Blocks
from distopt.attach.shards import Cut
from distopt.errors import SettingError
from distopt.numerics.storage import nbytes
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.reducer import Place, Reducer, Slot
from distopt.reducers.rehearsal import Rehearsal, rehearse
from distopt.sharding.units import find_units, names_by_unit


@dataclasses.dataclass(frozen=True)
class Budget:
    """One rank's share, in bytes. Bytes sent are those handed to collectives between nodes, one copy.

    Args:
        parameters: its pieces of all parameters.
        gradients: its pieces of all gradients, which are all there when backward ends.
        residuals: what the reducer keeps back.
        factors: what else the reducer keeps.
        gathered: the two largest units, whole: one that computes, and one that is fetched meanwhile.
        bytes_uncompressed: of the gradients, a step.
        bytes_sent: what is sent in their place.
        matrix_bytes_uncompressed: of those gradients that are compressed.
        matrix_bytes_sent: what is sent in their place.
    """

    parameters: int
    gradients: int
    residuals: int
    factors: int
    gathered: int
    bytes_uncompressed: int
    bytes_sent: int
    matrix_bytes_uncompressed: int
    matrix_bytes_sent: int

    @property
    def saving(self) -> float:
        """Fraction of all bytes that is not sent."""
        return 1 - self.bytes_sent / self.bytes_uncompressed if self.bytes_uncompressed else 0.0

    @property
    def matrix_saving(self) -> float:
        """The same, of the compressed gradients alone."""
        return 1 - self.matrix_bytes_sent / self.matrix_bytes_uncompressed if self.matrix_bytes_uncompressed else 0.0


def budget(
    model: nn.Module,
    units: Blocks,
    *,
    shards: int,
    replicas: int,
    reducer: Reducer | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    index: int = 0,
    step: int = 0,
) -> Budget:
    """Count what `distopt.shard` with the same arguments would take of a rank. Nothing is allocated or sent.

    Args:
        model: on any device; on the meta device it may be of any size.
        units: as for `distopt.shard`.
        shards: ranks of a node.
        replicas: nodes.
        reducer: as for `distopt.shard`.
        shard_placement_fn: as for `distopt.shard`.
        index: which shard. The first is never smaller than another.
        step: which step, for a reducer that follows a schedule.

    Raises:
        SettingError: if a number is out of its range, or a setting does not fit a parameter.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096, bias=False))
        >>> from distopt.reducers.powersgd import PowerSGD
        >>> mine = budget(model, list(model), shards=8, replicas=128, reducer=PowerSGD(rank=16))
        >>> mine.parameters / 2**20, round(mine.saving, 3)
        (16.0, 0.965)
    """
    if replicas < 1:
        raise SettingError("replicas", replicas, "an integer of at least 1")
    parameters, exempt = named_parameters(model), {plain_name(name) for name in exempt_names(model)}
    reducer, place = AllReduce() if reducer is None else reducer, Place(0, replicas)
    kept = trained = 0
    whole: list[int] = []
    counts: list[Rehearsal] = []
    known: dict[tuple[object, ...], Rehearsal] = {}
    mine = pieces(model, shards=shards, shard_placement_fn=shard_placement_fn, index=index)
    for names in names_by_unit(find_units(units, model), model):
        slots = [Slot(name, mine[name], exempt=name in exempt) for name in names if mine[name].requires_grad]
        kept += sum(nbytes(mine[name]) for name in names)
        trained += sum(nbytes(slot.parameter) for slot in slots)
        whole.append(sum(nbytes(parameters[name]) for name in names))
        if slots and replicas > 1:
            # Blocks that are treated alike take alike: a hundred of them are counted as fast as one.
            key = (
                reducer.plan(slots, place).describe(),
                *((slot.parameter.shape, slot.parameter.dtype) for slot in slots),
            )
            if key not in known:
                known[key] = rehearse(reducer, slots, place, step)
            counts.append(known[key])
    return Budget(
        parameters=kept,
        gradients=trained,
        residuals=sum(count.residuals for count in counts),
        factors=sum(count.factors for count in counts),
        gathered=sum(sorted(whole)[-2:]),
        bytes_uncompressed=sum(count.uncompressed for count in counts),
        bytes_sent=sum(count.sent for count in counts),
        matrix_bytes_uncompressed=sum(count.compressed[0] for count in counts),
        matrix_bytes_sent=sum(count.compressed[1] for count in counts),
    )


def pieces(
    model: nn.Module,
    *,
    shards: int,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    index: int = 0,
) -> dict[str, nn.Parameter]:
    """Give what one rank will have of every parameter, on the meta device: of no use but for its shape and dtype.

    Args:
        model: as for `budget`.
        shards: as for `budget`.
        shard_placement_fn: as for `budget`.
        index: as for `budget`.

    Raises:
        SettingError: if a number is out of its range.

    Example:
        >>> pieces(nn.Linear(3, 5), shards=2, index=1)["weight"].shape
        torch.Size([2, 3])
    """
    if shards < 1:
        raise SettingError("shards", shards, "an integer of at least 1")
    if not 0 <= index < shards:
        raise SettingError("index", index, f"from 0 to {shards - 1}")
    found: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters(model).items():
        placement = None if shard_placement_fn is None else shard_placement_fn(parameter)
        cut = Cut(tuple(parameter.shape), 0 if placement is None else placement.dim)
        piece = torch.empty(cut.piece(index, shards), dtype=parameter.dtype, device="meta")
        found[name] = nn.Parameter(piece, requires_grad=parameter.requires_grad)
    return found
