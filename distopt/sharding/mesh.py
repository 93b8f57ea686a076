"""Which ranks hold a replica together, and which hold the same piece of different ones."""

from typing import NamedTuple, cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distopt.errors import SettingError

_ALLOWED = "None or a DeviceMesh: (replicas, shards), or shards alone"


class Grid(NamedTuple):
    """Replicas, each of them cut into shards."""

    shards: DeviceMesh  # the ranks that hold a replica together, for `fully_shard`
    replicas: list[int]  # those that hold the same piece as this one


def members(mesh: object) -> list[int]:
    """Tell which ranks a mesh is made of, ascending.

    Args:
        mesh: one- or two-dimensional, or ``None`` for all ranks.

    Raises:
        SettingError: if it is neither, or this rank is not among them.
    """
    if mesh is None:
        return list(range(dist.get_world_size()))
    if not isinstance(mesh, DeviceMesh):
        raise SettingError("mesh", type(mesh).__name__, _ALLOWED)
    if mesh.ndim not in (1, 2):
        raise SettingError("mesh", tuple(mesh.mesh.shape), _ALLOWED)
    ranks: list[int] = sorted(mesh.mesh.flatten().tolist())
    if dist.get_rank() not in ranks:
        raise SettingError("mesh", ranks, f"one that rank {dist.get_rank()} is part of")
    return ranks


def grid_of(mesh: DeviceMesh) -> Grid:
    """Find this rank's place.

    Args:
        mesh: two-dimensional, replicas by shards; one-dimensional, without replicas.
    """
    if mesh.ndim == 1:
        return Grid(mesh, [dist.get_rank()])
    names = cast(tuple[str, str] | None, mesh.mesh_dim_names)
    shards = DeviceMesh.from_group(mesh.get_group(1), mesh.device_type) if names is None else mesh[names[1]]
    return Grid(shards, dist.get_process_group_ranks(mesh.get_group(0)))
