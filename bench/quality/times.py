"""What a step of each way takes over networks of three speeds, on two hosts of `bench.lab`: the time of equal time."""

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from bench.lab import ways as lab
from bench.lab.hosts import Link, check, run_on_hosts
from bench.lab.steps import Network, measure
from bench.lab.workloads import WORKLOADS, Batch, Workload, draw_symbols
from bench.quality import text
from bench.quality.runs import THEIRS
from bench.quality.ways import Way, parse

LIMITS = (None, 1000, 100)
"""Of the networks, in megabits a second."""
WARMUP = 3
WORKLOADS_OF = {
    "dalle": WORKLOADS["dalle"],
    "text": Workload("characters", text.Characters, draw_symbols, "branches.*", rows=text.ROWS),
}
"""By the names of the tasks."""


class Trainer:
    """A model that takes whole steps: forward, backward with gradients averaged, clipping, and the optimizer's step.

    Args:
        workload: whose model it is.
        way: to average gradients; the exact one is plain DDP.
    """

    def __init__(self, workload: Workload, way: Way) -> None:
        torch.manual_seed(0)
        self._model = workload.build()
        self._way = _reducing(workload, self._model, way)
        self._optimizer = text.optimizer_of(self._model)

    def step(self, batch: Batch) -> None:
        """See `bench.lab.ways.Way`."""
        self._way.step(batch)
        nn.utils.clip_grad_norm_(self._model.parameters(), text.CLIP)
        self._optimizer.step()

    def rest(self) -> None:
        """See `bench.lab.ways.Way`."""
        self._way.rest()

    def payload(self) -> float:
        """See `bench.lab.ways.Way`."""
        return self._way.payload()

    def reducing(self) -> float:
        """See `bench.lab.ways.Way`."""
        return self._way.reducing()


def _reducing(workload: Workload, model: nn.Module, way: Way) -> lab.Way:
    if way.theirs:
        return lab.TorchPowerSGD(workload, model, way.rank)
    ddp = DistributedDataParallel(model)
    if way.rank == 0:
        return lab.Trained(workload, ddp)
    return lab.Registered(workload, ddp, distopt.register(ddp, way.reducer(0, None)))


def steps_of(
    task: str, ways: Iterable[Way], network: Network, rounds: int, limits: Sequence[int | None] = LIMITS
) -> list[dict[str, Any]]:
    """Time steps of all ways in turn, over each network. Collective.

    A late way takes steps of two kinds, that of the exact way and that of its rank; these are what is timed.

    Returns:
        A record for each way over each network: ``seconds`` of the steps, in the order of the rounds.
    """
    workload, generator = WORKLOADS_OF[task], torch.Generator().manual_seed(dist.get_rank())
    trainers = {
        way.label: Trainer(workload, way) for way in ways if not way.late and (task in THEIRS or not way.theirs)
    }
    rows = workload.rows or 1
    found = measure(network, limits, trainers, lambda: workload.draw(rows, generator), rounds, WARMUP)
    wanted = ("way", "megabits", "seconds")
    return [{"kind": "times", "task": task, **{name: record[name] for name in wanted}} for record in found]


def timed(tasks: Sequence[str], ways: Sequence[Way], rounds: int) -> list[dict[str, Any]]:
    """Make the hosts, time all tasks there, and take them away.

    Raises:
        HostsError: if this machine cannot be made several hosts.
    """
    check()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records"
        told = json.dumps([str(found), rounds, list(tasks), [way.label for way in ways]])
        run_on_hosts(["bench.quality.times", told])
        return json.loads(found.read_text(encoding="utf-8"))


def _rank(told: str, device: str) -> None:
    """What each host's process does; the first one leaves the records."""
    file, rounds, tasks, labels = json.loads(told)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    records = [r for task in tasks for r in steps_of(task, map(parse, labels), Link(device), rounds)]
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(*sys.argv[1:])
