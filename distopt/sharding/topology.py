"""Which ranks are on one node: told by the launcher or by host names, and the same picture on every rank.

A rank states what it knows of its place. All ranks then have all statements, and come to the same nodes, or to the same
error, by pure functions of them.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distopt.comm.agreement import difference
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, SettingError

SHARDS = "DISTOPT_SHARDS"
"""Environment variable: how many ranks share the parameters, where no mesh is given."""


class Place(NamedTuple):
    """What one rank knows of its place."""

    source: str  # who told it: the name of a variable, or "host name"
    node: str
    size: str | None = None  # ranks of this node, if the launcher told that
    asked: tuple[str, str] | None = None  # how many shards there are to be, and the setting's name before it


def place_of(
    rank: int, world_size: int, environment: Mapping[str, str], host: str, shards: object | None = None
) -> Place:
    """State what a rank knows of its place.

    Variables count only if their launcher speaks of this world: they are inherited by processes that the launcher knows
    nothing of. ``torchrun`` comes first, as it may run in a Slurm job, or several times on one host.

    Args:
        rank: in the world.
        world_size: of the world.
        environment: variables by name.
        host: the machine's name.
        shards: how many there are to be; told by the environment if ``None``.

    Example:
        >>> place_of(3, 4, {"RANK": "3", "WORLD_SIZE": "4", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "h")
        Place(source='GROUP_RANK', node='1', size='2', asked=None)
        >>> place_of(3, 4, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NODEID": "1"}, "h")
        Place(source='SLURM_NODEID', node='1', size=None, asked=None)
        >>> place_of(3, 4, {"DISTOPT_SHARDS": "4"}, "h")
        Place(source='host name', node='h', size=None, asked=('DISTOPT_SHARDS', '4'))
    """
    asked = (SHARDS, environment[SHARDS]) if SHARDS in environment else None
    asked = asked if shards is None else ("shards", repr(shards))
    here = (str(rank), str(world_size))
    if "GROUP_RANK" in environment and (environment.get("RANK"), environment.get("WORLD_SIZE")) == here:
        return Place("GROUP_RANK", environment["GROUP_RANK"], environment.get("LOCAL_WORLD_SIZE"), asked)
    if "SLURM_NODEID" in environment and (environment.get("SLURM_PROCID"), environment.get("SLURM_NTASKS")) == here:
        return Place("SLURM_NODEID", environment["SLURM_NODEID"], None, asked)
    return Place("host name", host, None, asked)


def rows_of(places: Sequence[Place]) -> list[list[int]]:
    """Decide who shares the parameters: the ranks of a node, or as many as were asked for, of one node where it fits.

    Args:
        places: of all ranks, in their order.

    Returns:
        The ranks of each replica, ascending inside a node, all as many. Nodes are in the order of their first ranks;
        their ranks need not follow one another.

    Raises:
        AgreementError: if ranks were told by different launchers, or asked for different numbers.
        SettingError: if nodes have different numbers of ranks and nobody said what to do, a launcher's number of ranks
            is not what there is, or the number asked for does not divide all ranks.

    Example:
        >>> rows_of([Place("SLURM_NODEID", node) for node in "0101"])
        [[0, 2], [1, 3]]
        >>> rows_of([Place("SLURM_NODEID", node, asked=("DISTOPT_SHARDS", "1")) for node in "0101"])
        [[0], [2], [1], [3]]
    """
    stated = {
        rank: [("the source of nodes", place.source), (SHARDS, "nothing" if place.asked is None else place.asked[1])]
        for rank, place in enumerate(places)
    }
    if (error := difference(stated, "setting")) is not None:
        raise error
    nodes: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(place.node, []).append(rank)
    if (asked := places[0].asked) is not None:
        return _cut(list(nodes.values()), *asked)
    counts = {node: len(ranks) for node, ranks in nodes.items()}
    odd = next((p for p in places if p.size is not None and p.size != str(counts[p.node])), None)
    if odd is not None:
        raise _unclear(f"LOCAL_WORLD_SIZE is {odd.size} where {odd.source} {odd.node} has {counts[odd.node]}", places)
    if len(set(counts.values())) > 1:
        least, most = (pick(counts, key=counts.__getitem__) for pick in (min, max))
        told = f"node {least} has {counts[least]} and node {most} has {counts[most]}"
        raise _unclear(f"by {places[0].source}, {told}", places)
    return list(nodes.values())


def mesh_of_nodes(communicator: Communicator, device_type: str, shards: object | None = None) -> DeviceMesh:
    """As `node_mesh`, over all ranks of a communicator, which are those of the world. Collective."""
    mine = place_of(communicator.rank, communicator.world_size, os.environ, socket.gethostname(), shards)
    rows = rows_of([Place(*place) for place in communicator.gather_objects(tuple(mine))])
    return DeviceMesh(device_type, torch.tensor(rows), mesh_dim_names=("replica", "shard"))


def node_mesh(device_type: str = "cpu", *, shards: int | None = None) -> DeviceMesh:
    """Lay out all ranks as nodes by ranks of a node, the mesh that `shard` takes if it is given none. Collective.

    Nodes are told by ``torchrun`` (``GROUP_RANK``), else by Slurm (``SLURM_NODEID``), else by the ranks' host names.

    Args:
        device_type: of the parameters.
        shards: how many ranks share the parameters, where that is not a node: part of one, or several. If ``None``, the
            environment variable ``DISTOPT_SHARDS``, if it is set.

    Returns:
        Two dimensions, ``replica`` and ``shard``: one row a node. With one node there is one row.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised.
        SettingError: if nodes have different numbers of ranks, or ``shards`` does not divide all ranks.
        AgreementError: if ranks were told by different launchers, or have different settings.

    Example:
        >>> import distopt
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> distopt.node_mesh().mesh.tolist()
        [[0]]
        >>> dist.destroy_process_group()
    """
    if not dist.is_initialized():
        raise RegistrationError("torch.distributed is not initialised: call init_process_group before node_mesh")
    return mesh_of_nodes(Communicator(cast(dist.ProcessGroup, dist.group.WORLD)), device_type, shards)


def _cut(nodes: Sequence[Sequence[int]], field: str, text: str) -> list[list[int]]:
    """Rows of as many ranks as were asked for, node after node."""
    ranks = [rank for node in nodes for rank in node]
    count = int(text) if text.isascii() and text.isdigit() else 0
    if count < 1 or len(ranks) % count != 0:
        raise SettingError(field, text, f"a number that divides all {len(ranks)} ranks")
    return [ranks[begin : begin + count] for begin in range(0, len(ranks), count)]


def _unclear(found: str, places: Sequence[Place]) -> SettingError:
    return SettingError("mesh", None, f"given, or {SHARDS} set to a divisor of all {len(places)} ranks: {found}")
