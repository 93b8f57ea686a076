"""What is trained in the bench of sharded steps: torch's own hybrid sharding and distopt's, at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import distopt
from bench.lab.steps import Network
from bench.lab.steps import measure as measure_ways
from bench.lab.ways import NATIVE, sharded_by
from bench.lab.workloads import Gpt, Workload, draw_symbols
from distopt.reducers.reducer import Reducer

WAYS: dict[str, Reducer | None] = {
    NATIVE: None,
    "distopt, AllReduce": distopt.AllReduce(),
    "distopt, PowerSGD rank 4": distopt.PowerSGD(rank=4),
    "distopt, PowerSGD rank 16": distopt.PowerSGD(rank=16),
    "distopt, PowerSGD rank 32": distopt.PowerSGD(rank=32),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and for how long.

    Args:
        width: of the residual stream.
        branches: attention and feedforward in turn; each is a unit. A pair has ``12 width ** 2`` weights.
        rows: sequences a rank.
        rounds: measured steps of each way, over each network.
        warmup: steps of each way before.
    """

    width: int = 384
    branches: int = 8
    rows: int = 2
    rounds: int = 7
    warmup: int = 2


def measure(network: Network, limits: Sequence[int | None], ways: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Time steps of all ways in turn. Collective.

    Args:
        network: this node's.
        limits: in megabits a second, one after another.
        ways: names out of `WAYS`.
        size: of the model, and of the measurement.

    Returns:
        What `bench.lab.steps.measure` returns, with the model's bytes.
    """
    workload = Workload("", lambda: Gpt(size.width, size.branches), draw_symbols, "branches.*", size.rows)
    mesh = distopt.node_mesh()
    made = {way: sharded_by(workload, WAYS[way], mesh) for way in ways}
    generator = torch.Generator().manual_seed(dist.get_rank())
    records = measure_ways(network, limits, made, lambda: workload.draw(size.rows, generator), size.rounds, size.warmup)
    total = sum(p.numel() * p.element_size() for p in workload.build().parameters())
    return [{**record, "model_bytes": total} for record in records]
