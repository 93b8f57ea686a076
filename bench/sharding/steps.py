"""The steps of one rank: torch's own hybrid sharding and distopt's in turn, over networks of several speeds."""

import dataclasses
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import distopt
from bench.scaling.network import CONTEXT, Attention, Feedforward
from distopt.reducers.reducer import Reducer

NATIVE = "native HSDP"
WAYS: dict[str, Reducer | None] = {
    NATIVE: None,
    "distopt, AllReduce": distopt.AllReduce(),
    "distopt, PowerSGD rank 4": distopt.PowerSGD(rank=4),
    "distopt, PowerSGD rank 16": distopt.PowerSGD(rank=16),
    "distopt, PowerSGD rank 32": distopt.PowerSGD(rank=32),
}


class Network(Protocol):
    """What lies between the nodes."""

    def limit(self, megabits: int | None) -> None:
        """Let this node send so many megabits a second from now on; all it can if ``None``."""
        ...

    def sent(self) -> int:
        """Bytes that this node has sent to others so far."""
        ...


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


class Gpt(nn.Module):
    """Predicts the next symbol, and gives the loss.

    Args:
        size: its width and branches.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.symbols = nn.Embedding(256, size.width)
        self.branches = nn.ModuleList(
            (Attention, Feedforward)[i % 2](size.width, size.branches) for i in range(size.branches)
        )
        self.lm_head = nn.Linear(size.width, 256)

    def forward(self, symbols: Tensor) -> Tensor:
        """The loss for integers ``(rows, length)``."""
        x = self.symbols(symbols[:, :-1])
        for branch in self.branches:
            x = x + branch(x)
        return nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), symbols[:, 1:].flatten())


class Runner:
    """One way at work on a model of its own.

    Args:
        size: of the model.
        reducer: distopt's; torch's own sharding if ``None``.
        mesh: replicas by shards.
    """

    def __init__(self, size: Size, reducer: Reducer | None, mesh: DeviceMesh) -> None:
        torch.manual_seed(0)
        self.model = Gpt(size)
        self.bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self._seconds = 0.0
        self.registration: distopt.Registration | None = None
        if reducer is None:
            for branch in self.model.branches:
                fully_shard(branch, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:
            self.registration = distopt.shard(self.model, "branches.*", mesh=mesh, reducer=reducer, recompute=False)
            engine = self.registration._engine
            engine.propose, engine.finish = self._timed(engine.propose), self._timed(engine.finish)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def step(self, symbols: Tensor) -> None:
        """Forward, backward and the optimizer's step."""
        self.optimizer.zero_grad()
        self.model(symbols).backward()
        self.optimizer.step()

    def reducing(self) -> float:
        """Seconds that the reducer has computed since the last call; waiting for the network does not count."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return act(*args)
            finally:
                self._seconds += time.thread_time() - started

        return timed


def measure(network: Network, limits: Sequence[int | None], ways: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Time steps of all ways in turn, so that whatever else the machine does meets all of them. Collective.

    Args:
        network: this node's.
        limits: in megabits a second, one after another.
        ways: names out of `WAYS`.
        size: of the model, and of the measurement.

    Returns:
        A record for each way over each network, the same on all ranks: in the order of the rounds, seconds of the
        slowest rank, seconds of computing of all ranks and of their reducers, and bytes that a node has sent.
    """
    mesh = distopt.node_mesh()
    runners = {way: Runner(size, WAYS[way], mesh) for way in ways}
    generator = torch.Generator().manual_seed(dist.get_rank())
    records: list[dict[str, Any]] = []
    for limit in limits:
        dist.barrier()
        network.limit(limit)
        found: dict[str, list[list[float]]] = {way: [] for way in ways}
        for number in range(size.warmup + size.rounds):
            for way in ways:
                symbols = torch.randint(256, (size.rows, CONTEXT + 1), generator=generator)
                figures = _step(runners[way], symbols, network)
                if number >= size.warmup:
                    found[way].append(figures)
        for way, rows in found.items():
            columns = dict(zip(("seconds", "computing", "reducing", "sent"), zip(*rows, strict=True), strict=True))
            records.append({"way": way, "megabits": limit, "model_bytes": runners[way].bytes, **columns})
    dist.barrier()
    network.limit(None)
    return records


def _step(runner: Runner, symbols: Tensor, network: Network) -> list[float]:
    runner.reducing()
    dist.barrier()
    sent, computed, started = network.sent(), _computed(), time.perf_counter()
    runner.step(symbols)
    seconds, computed = time.perf_counter() - started, _computed() - computed
    mine = torch.tensor([seconds, computed, runner.reducing(), 0.0], dtype=torch.float64)
    dist.barrier()  # whatever the slowest rank sends belongs to the step
    mine[3] = network.sent() - sent
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    times, *others = torch.stack(everyone).unbind(1)
    return [times.max().item(), others[0].sum().item(), others[1].sum().item(), others[2].max().item()]


def _computed() -> float:
    """Seconds that this process, with all its threads, has had a core."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
