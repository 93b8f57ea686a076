"""Ranks that dawdle: a trial is a model in a world whose ranks wait here and there, each as it likes."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.comm.communicator import Communicator, Pending
from distopt.reducers.reducer import Reducer
from tests.faults.draw import WIDTH, batch, loss, net, reducer
from tests.faults.injections import digest

STEPS = 4


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that decides a trial, but for the delays themselves."""

    reducer: Reducer
    layers: int
    bucket_kib: int
    options: dict[str, bool]
    gloo_threads: int
    accumulate: int
    longest: float  # of the delays, in seconds
    often: float


def world_of(seed: int, world: int) -> World:
    """Draw a trial."""
    chance = random.Random(seed)
    layers = chance.randint(1, 8)
    modes: list[dict[str, bool]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
    options = {**chance.choice(modes), **chance.choice([{}, {"gradient_as_bucket_view": True}])}
    layer_kib = 4 * WIDTH * (WIDTH + 1) / 1024
    return World(
        reducer=reducer(chance, world),
        layers=layers,
        bucket_kib=int(layer_kib * chance.choice([1, 1, 1, 3])) + 1,
        options=options,
        gloo_threads=chance.choice([1, 2, 8]),
        accumulate=1 if "static_graph" in options else chance.choice([1, 1, 2]),
        longest=chance.choice([0.001, 0.005, 0.02]),
        often=chance.choice([0.1, 0.3]),
    )


class Branches(nn.Module):
    """A stack of layers of which one is left out in odd steps, where DDP is told that this may be."""

    def __init__(self, plan: World) -> None:
        super().__init__()
        self.body = net(plan.layers, seed=2)
        self.sometimes = nn.Linear(WIDTH, WIDTH) if "find_unused_parameters" in plan.options else None

    def forward(self, x: Tensor, use: bool) -> Tensor:
        x = self.body(x)
        return self.sometimes(x) if self.sometimes is not None and use else x


class Delays:
    """Waits now and then; each rank and trial its own."""

    def __init__(self, seed: int, rank: int, plan: World) -> None:
        self._chance = random.Random(f"{seed} {rank}")
        self._plan = plan

    def wait(self, *_: object) -> None:
        if self._chance.random() < self._plan.often:
            time.sleep(self._chance.random() * self._plan.longest)

    def _around(self, undelayed: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            answer = undelayed(*args, **kwargs)
            self.wait()
            return answer

        return delayed

    @contextlib.contextmanager
    def everywhere(self, model: nn.Module) -> Iterator[None]:
        """In the input, in each layer, in backward as each gradient is made, and around each collective."""
        handles = [module.register_forward_pre_hook(self.wait) for module in model.modules()]
        handles += [p.register_hook(self.wait) for p in model.parameters() if p.requires_grad]
        places = [(Communicator, "guard"), (Communicator, "start"), (Pending, "wait")]
        with contextlib.ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._around(getattr(owner, name))))
            yield
        for handle in handles:
            handle.remove()


class _GlooWithThreads(type):
    """Makes a ``ProcessGroupGloo`` with so many threads, and passes for that class."""

    threads: int

    def __call__(cls, store: Any, rank: int, size: int, timeout: Any) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._threads, options._timeout = cls.threads, timeout
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        return dist.ProcessGroupGloo(store, rank, size, options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, dist.ProcessGroupGloo)


def gloo(threads: int) -> contextlib.AbstractContextManager[object]:
    """Have groups that are made meanwhile run their collectives on so many threads; torch has no setting for it."""
    made = _GlooWithThreads("ProcessGroupGloo", (), {"threads": threads})
    return mock.patch.object(distributed_c10d, "ProcessGroupGloo", made)


def dawdle(rank: int, world: int, seed: int) -> tuple[list[str], list[str], int]:
    """Carry out a trial on this rank: digests of the gradients of each step, without delays and with, and buckets."""
    plan = world_of(seed, world)
    with gloo(plan.gloo_threads):
        group = dist.new_group(range(world))
        swift, _ = _train(plan, rank, group, None)
        slow, buckets = _train(plan, rank, group, Delays(seed, rank, plan))
    dist.destroy_process_group(group)
    return swift, slow, buckets


def _train(plan: World, rank: int, group: Any, delays: Delays | None) -> tuple[list[str], int]:
    model = DDP(
        Branches(plan),
        process_group=group,
        bucket_cap_mb=plan.bucket_kib / 1024,
        **plan.options,  # pyright: ignore[reportArgumentType]
    )
    registration = distopt.register(model, plan.reducer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    digests: list[str] = []
    with delays.everywhere(model) if delays else contextlib.nullcontext():
        for step in range(STEPS):
            for micro in range(plan.accumulate):
                index = step * plan.accumulate + micro
                model.require_backward_grad_sync = micro == plan.accumulate - 1
                loss(model(batch(rank, index), use=step % 2 == 0), index).backward()
            digests.append(digest({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            optimizer.step()
            optimizer.zero_grad()
    return digests, len(registration._attachment.layout())
