"""Which ranks make up a pipeline, and which hold the same stage."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distopt.errors import SettingError

_ALLOWED = "None or a DeviceMesh: (stages), (stages, replicas) or (stages, replicas, shards)"


class Place(NamedTuple):
    """One rank's place; ranks by their number in the world."""

    pipe: list[int]
    """Those that a batch of this rank goes through, in the order of stages."""
    replicas: list[int]
    """Those that hold the same pieces of the same stages."""
    shards: list[int]
    """Those that hold a replica of the same stages together."""
    column: list[int]
    """Those that hold one replica of the whole model together."""
    everyone: list[int]
    mesh: DeviceMesh | None
    """The user's mesh of the shards; ``None`` if there is one shard."""


def place_of(mesh: object) -> Place:
    """Find this rank's place.

    Args:
        mesh: stages, by replicas, by shards; ``None`` for all ranks as one pipeline.

    Raises:
        SettingError: if it is neither.
    """
    rank = dist.get_rank()
    if mesh is None:
        ranks = list(range(dist.get_world_size()))
        return Place(ranks, [rank], [rank], ranks, ranks, None)
    if not isinstance(mesh, DeviceMesh):
        raise SettingError("mesh", type(mesh).__name__, _ALLOWED)
    if not 1 <= mesh.ndim <= 3:
        raise SettingError("mesh", tuple(mesh.mesh.shape), _ALLOWED)
    grid: Tensor = mesh.mesh.reshape(*mesh.mesh.shape, *[1] * (3 - mesh.ndim))
    found = (grid == rank).nonzero().tolist()
    if not found:
        raise SettingError("mesh", sorted(grid.flatten().tolist()), f"one that rank {rank} is part of")
    stage, replica, shard = found[0]
    return Place(
        pipe=grid[:, replica, shard].tolist(),
        replicas=grid[stage, :, shard].tolist(),
        shards=grid[stage, replica].tolist(),
        column=grid[:, replica].flatten().tolist(),
        everyone=sorted(grid.flatten().tolist()),
        mesh=_last(mesh) if mesh.ndim == 3 else None,
    )


def _last(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names
    return DeviceMesh.from_group(mesh.get_group(2), mesh.device_type) if names is None else mesh[names[2]]
