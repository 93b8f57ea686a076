"""One workload in one layout: what every rank measures, with others and by itself."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bench.lab.steps import Network, measure
from bench.lab.ways import NOOP, OURS, REPLICATED, SHARDED, Way, replicated, sharded
from bench.lab.workloads import WORKLOADS, Batch, rows_for
from distopt import node_mesh

WARMUP = 3
"""DDP lays its buckets out anew after the first step, and torch's hook begins with the third."""


class Job:
    """One workload in one layout, on this rank. Collective.

    Args:
        workload: out of `WORKLOADS`.
        layout: "replicated", or "sharded" over the ranks of each node.
        rounds: measured steps of each way, over each network.
        labels: of the ways; those of another layout are left out.
        warmup: steps of each way before.
    """

    def __init__(self, workload: str, layout: str, rounds: int, labels: Sequence[str], warmup: int = WARMUP) -> None:
        self._workload, self._rounds, self._warmup = WORKLOADS[workload], rounds, warmup
        self._mesh = node_mesh() if layout == "sharded" else None
        self._labels = [label for label in (SHARDED if self._mesh else REPLICATED) if label in labels]
        self._rows = self._workload.rows or rows_for(self._workload)
        self._generator = torch.Generator().manual_seed(dist.get_rank())
        torch.manual_seed(0)
        self._weights = list(self._workload.build().parameters())
        self._facts = {
            "workload": workload,
            "layout": layout,
            "rows": self._rows,
            "model_bytes": sum(p.numel() * p.element_size() for p in self._weights),
            "ring": dist.get_world_size() if self._mesh is None else self._mesh.size(0),
            "rings": 1 if self._mesh is None else self._mesh.size(1),
        }

    def run(self, network: Network, limits: Sequence[int | None], *, alone: bool = False) -> list[dict[str, Any]]:
        """Measure every way over every network. Collective.

        Args:
            network: this host's.
            limits: in megabits a second.
            alone: every rank by itself: of whole models, and distopt's ways only.

        Returns:
            The records of `measure`, with what was trained.
        """
        group = _group_of_one() if alone else None
        labels = [label for label in self._labels if not alone or label in (NOOP, *OURS)]
        ways = {label: self._way(label, group) for label in labels}
        found = measure(network, limits, ways, self._draw, self._rounds, self._warmup)
        return [{**self._facts, "alone": alone, **record} for record in found]

    def _way(self, label: str, group: dist.ProcessGroup | None) -> Way:
        if self._mesh is None:
            return replicated(self._workload, label, self._weights, group)
        return sharded(self._workload, label, self._mesh)

    def _draw(self) -> Batch:
        return self._workload.draw(self._rows, self._generator)


def _group_of_one() -> dist.ProcessGroup:
    """A group of this rank alone. Collective."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]
