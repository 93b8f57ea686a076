"""Times steps of several ways in turn, in the same processes, over links of several rates."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from bench.lab.ways import Way
from bench.lab.workloads import Batch

COLUMNS = ("seconds", "computing", "reducing", "sent", "payload")


class Network(Protocol):
    """What lies between the hosts."""

    def limit(self, megabits: int | None) -> None:
        """Let this host send so many megabits a second from now on; all it can if ``None``."""
        ...

    def sent(self) -> int:
        """Bytes that this host has sent to others so far."""
        ...


def measure(
    network: Network,
    limits: Sequence[int | None],
    ways: Mapping[str, Way],
    draw: Callable[[], Batch],
    rounds: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Time steps of all ways in turn, so that whatever else the machine does meets all of them. Collective.

    Args:
        network: this host's.
        limits: in megabits a second, one after another.
        ways: by their labels; all on the same batches.
        draw: gives the next batch of this rank.
        rounds: measured steps of each way, over each network.
        warmup: steps of each way before, over the first network; one more over each other.

    Returns:
        A record for each way over each network, the same on all ranks. In the order of the rounds: seconds of the
        slowest rank, seconds of computing of all ranks and of their reducers, bytes that the busiest host has sent,
        headers included, and bytes that a rank has handed to be averaged.
    """
    records: list[dict[str, Any]] = []
    for limit in limits:
        dist.barrier()
        network.limit(limit)
        dist.barrier()
        found: dict[str, list[list[float]]] = {label: [] for label in ways}
        skipped = 1 if records else warmup
        for turn in range(skipped + rounds):
            batch = draw()
            for label in _turned(list(ways), turn):
                figures = _step(ways[label], batch, network)
                if turn >= skipped:
                    found[label].append(figures)
        for label, rows in found.items():
            columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
            records.append({"way": label, "megabits": limit, **columns})
    dist.barrier()
    network.limit(None)
    return records


def _turned(labels: list[str], turn: int) -> list[str]:
    """The same labels, begun at another in each turn, so that none always follows the same other."""
    return labels[turn % len(labels) :] + labels[: turn % len(labels)]


def _step(way: Way, batch: Batch, network: Network) -> list[float]:
    way.reducing()
    way.payload()
    dist.barrier()
    sent, computed, started = network.sent(), _computed(), time.perf_counter()
    way.step(batch)
    seconds, computed = time.perf_counter() - started, _computed() - computed
    dist.barrier()  # whatever the slowest rank sends belongs to the step
    sent = network.sent() - sent
    way.rest()
    mine = torch.tensor([seconds, computed, way.reducing(), sent, way.payload()], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    times, computing, reducing, bytes_sent, payload = torch.stack(everyone).unbind(1)
    largest = (times.max(), computing.sum(), reducing.sum(), bytes_sent.max(), payload.max())
    return [figure.item() for figure in largest]


def _computed() -> float:
    """Seconds that this process, with all its threads, has had a core."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
