"""A rank that dies, stops or fails in the middle of training: a trial, and what the others are told."""

import dataclasses
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.reducers.reducer import Reducer
from tests.faults.draw import WIDTH, batch, loss, net, reducer
from tests.processes import Fate, run_mortals

Fault = Literal["kill", "stop", "raise"]


@dataclasses.dataclass(frozen=True)
class Death:
    """Everything that decides a trial."""

    fault: Fault
    world: int
    victim: int
    step: int
    after: float  # seconds from the start of that step
    reducer: Reducer
    bucket_kib: int
    port: int | None  # of a store that rank 0 hosts, as with torchrun; none: a file
    timeout: float  # of a collective
    buffers: bool  # whether DDP broadcasts some before each forward pass


def death(fault: Fault, seed: int, timeout: float) -> Death:
    """Draw a trial."""
    chance = random.Random(f"{fault} {seed}")
    world = 2 + seed % 3
    return Death(
        fault=fault,
        world=world,
        victim=chance.randrange(world),
        # A rank that stops in DDP's own collective, before the second step, is not ours to find.
        step=chance.choice([*([0, 1] if fault != "stop" else []), *[chance.randrange(2, 20)] * 4]),
        after=chance.random() * 0.02,
        reducer=reducer(chance, world),
        bucket_kib=chance.choice([3, 1000]),
        port=_free_port() if seed % 2 else None,
        timeout=timeout,
        # A rank that stops in DDP's own collective is waited for as long as its group says.
        buffers=fault != "stop" and seed % 3 < 2,
    )


def meet(plan: Death, within: float) -> list[Fate]:
    """Carry out a trial; every rank that was not stopped ends by itself ``within`` so many seconds."""
    stopped = [plan.victim] if plan.fault == "stop" else []
    return run_mortals(plan.world, train, plan, immortal=stopped, timeout=within)


def train(rank: int, say: Callable[[Any], None], folder: str, plan: Death) -> None:
    """Train until the fault ends it."""
    place = f"tcp://127.0.0.1:{plan.port}" if plan.port else f"file://{folder}/store"
    # The trainer's own group waits long: it is ours that must find out.
    patience = timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=plan.world, timeout=patience)
    network = net(4, seed=4)
    if plan.buffers:
        network.append(nn.BatchNorm1d(WIDTH))
    model = DDP(network, bucket_cap_mb=plan.bucket_kib / 1024)
    distopt.register(model, plan.reducer, timeout=timedelta(seconds=plan.timeout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(10**6):
        if rank == plan.victim and step == plan.step:
            say(time.monotonic())
            _strike(plan)
        loss(model(batch(rank, step)), step).backward()
        optimizer.step()
        optimizer.zero_grad()


def _strike(plan: Death) -> None:
    if plan.fault == "raise":
        raise ValueError("the user's own mistake")
    number = signal.SIGKILL if plan.fault == "kill" else signal.SIGSTOP

    def strike() -> None:
        time.sleep(plan.after)
        os.kill(os.getpid(), number)

    threading.Thread(target=strike, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
